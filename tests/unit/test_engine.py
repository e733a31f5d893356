"""Sampling, and the text that leaves a stream."""

from __future__ import annotations

import pytest
import torch

from actors.router.sampling import choose, choose_each, generator_at
from actors.values import Sampling, TokenEvent
from cluster.jobs.tokenizer import ByteTokenizer
from cluster.serving import TextStream

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def draws(sampling: Sampling, n: int = 400) -> list[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    return [choose(LOGITS, sampling, generator) for _ in range(n)]


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert set(draws(Sampling(temperature=0))) == {1}
    assert choose(torch.zeros(5), Sampling(), torch.Generator()) == 0


def test_a_seed_gives_the_same_tokens_again() -> None:
    assert draws(Sampling(temperature=1.0, seed=3)) == draws(Sampling(temperature=1.0, seed=3))
    assert draws(Sampling(temperature=1.0, seed=3)) != draws(Sampling(temperature=1.0, seed=4))


def test_temperature_follows_the_softmax() -> None:
    counts = torch.bincount(torch.tensor(draws(Sampling(temperature=1.0), 4000)), minlength=4) / 4000
    torch.testing.assert_close(counts, torch.softmax(LOGITS, 0), atol=0.03, rtol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, {1}), (0.7, {1, 2}), (0.95, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(draws(Sampling(temperature=1.0, top_p=top_p), 2000)) == kept


def stream(text: bytes, stop: tuple[str, ...] = (), finish: str = "length") -> tuple[str, str, int]:
    """Pushes byte by byte until the stream ends; returns the text, the reason and the tokens taken."""
    out = TextStream(ByteTokenizer(), stop, num_prompt_tokens=2)
    parts = []
    for number, byte in enumerate(text):
        last = number == len(text) - 1
        chunk = out.push(TokenEvent(byte, 7, finish if last else ""))
        parts.append(chunk.text)
        if chunk.finish_reason:
            return "".join(parts), chunk.finish_reason, number + 1
    raise AssertionError("a stream must end")


def test_characters_come_whole() -> None:
    assert stream("aé漢😀b".encode()) == ("aé漢😀b", "length", 11)
    out = TextStream(ByteTokenizer(), (), num_prompt_tokens=0)
    assert [out.push(TokenEvent(b, 0)).text for b in "é".encode()] == ["", "é"]


def test_a_stop_text_is_never_shown_not_even_its_beginning() -> None:
    assert stream(b"one END two", ("END",)) == ("one ", "stop", 7)
    assert stream(b"EN ENE END", ("END",)) == ("EN ENE ", "stop", 10)
    assert stream(b"abcab", ("abd", "zz")) == ("abcab", "length", 5)


def test_the_end_token_is_no_text() -> None:
    out = TextStream(ByteTokenizer(), (), num_prompt_tokens=1)
    chunk = out.push(TokenEvent(257, 3, "end_of_text"))
    assert (chunk.text, chunk.finish_reason, chunk.version) == ("", "end_of_text", 3)


def test_a_token_depends_on_seed_and_position_and_not_on_the_tokens_before() -> None:
    def draw(seed: int, position: int) -> int:
        return choose(torch.zeros(1000), Sampling(temperature=1.0, seed=seed), generator_at(seed, position))

    whole = [draw(3, position) for position in range(20)]
    assert whole[12:] == [draw(3, position) for position in range(12, 20)]
    assert len(set(whole)) > 15, "each position has randomness of its own"
    assert whole != [draw(4, position) for position in range(20)]


def test_each_row_of_a_batch_gets_what_it_would_get_alone() -> None:
    logits_BV = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    samplings = [Sampling(temperature=[0, 0.7, 1.3][i % 3], top_p=[1.0, 0.8][i % 2], seed=i) for i in range(5)]
    alone = [
        choose(logits_V, sampling, generator_at(sampling.seed, 10 + row))
        for row, (logits_V, sampling) in enumerate(zip(logits_BV, samplings, strict=True))
    ]
    assert choose_each(logits_BV, samplings, range(10, 15)) == alone
