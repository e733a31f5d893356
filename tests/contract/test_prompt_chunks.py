"""Prompts in chunks: logits and tokens are those of whole prompts, the streams that decode get their turn in between,
and whatever happens between two chunks all of them see one version."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from actors.errors import MoeClusterError, PeerLost, StepAborted
from actors.moe.settings import GateSettings
from actors.optim import OptimizerSettings
from actors.router.batch import Batch
from actors.router.prompt import Computed, PromptRun, Wish, can_be_chunked, compute
from actors.trunk.model import ModelSource
from actors.values import NEWEST, Sampling, TokenEvent, VersionChoice
from tests.families import FAMILIES, build
from tests.local import LocalCluster, cluster

BATCHES = [torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(t)) for t in range(4)]
PROMPTS = torch.randint(3, 256, (3, 41), generator=torch.Generator().manual_seed(9)).tolist()
CHUNK = 7
SAMPLING = Sampling(max_tokens=6)
LONG = Sampling(max_tokens=80)
WAIT_S = 30.0
MODES = {"in turns": 1, "in a batch": 4}

Hook = Callable[[PromptRun], None]


def source(family: str = "deepseek_v3", dtype: str = "float32") -> ModelSource:
    return ModelSource(values={"model_type": family, **FAMILIES[family], "eos_token_id": None}, dtype=dtype)


def generate(local: LocalCluster, prompt: Sequence[int], choice: VersionChoice = NEWEST) -> list[TokenEvent]:
    return list(local.router.serving.generate(prompt, SAMPLING, timeout_s=WAIT_S, choice=choice))


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token for event in events]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def begin(local: LocalCluster) -> None:
    local.router.begin_run(OptimizerSettings())


def train(local: LocalCluster, count: int = 1) -> None:
    for _ in range(count):
        local.router.train_step([BATCHES[local.router.version % 4]], lr=1e-2, clip_norm=1.0)


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> list[Hook]:
    """What is called between two chunks of a prompt, in the thread that computes them."""
    found: list[Hook] = []
    advance = PromptRun.advance

    def hooked(self: PromptRun) -> None:
        if self._done:
            for hook in found:
                hook(self)
        advance(self)

    monkeypatch.setattr(PromptRun, "advance", hooked)
    return found


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the prompts that were begun."""
    found: list[int] = []
    advance = PromptRun.advance

    def noted(self: PromptRun) -> None:
        if not self._done:
            found.append(len(self.prompts_BS[0]))
        advance(self)

    monkeypatch.setattr(PromptRun, "advance", noted)
    return found


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def end_of(local: LocalCluster, chunk: int) -> Computed:
    return compute(PromptRun(local.router.serving._served(NEWEST), PROMPTS, chunk), Wish())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_whole_prompts(family: str) -> None:
    with cluster(source(family, "float64")) as local:
        whole = end_of(local, 0).logits_BV
        assert whole.dtype == torch.float64
        bound = 1e-6 if family == "deepseek_v2" else 1e-9  # which rotates its queries and keys in float32
        for chunk in (1, CHUNK, 40):
            torch.testing.assert_close(end_of(local, chunk).logits_BV, whole, rtol=bound, atol=bound)


def test_gates_that_look_at_earlier_tokens_see_those_of_earlier_chunks() -> None:
    with cluster(source(dtype="float64"), gate=GateSettings(kind="top_k", attention=True)) as local:
        begin(local)
        train(local, 2)  # before, their attention adds nothing
        whole, chunked = end_of(local, 0), end_of(local, CHUNK)
        torch.testing.assert_close(chunked.logits_BV, whole.logits_BV, rtol=1e-9, atol=1e-9)
        assert chunked.pasts is not None
        assert chunked.pasts[0].length == 41


@pytest.mark.parametrize("lost_at", [1, 3])
def test_a_prompt_begins_anew_where_a_chunk_counts_nothing(lost_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(source(dtype="float64"), gate=GateSettings(kind="top_k", attention=True)) as local:
        begin(local)
        train(local, 2)
        expected = end_of(local, CHUNK)
        dispatcher = local.router.serving._dispatcher
        finish, losing = dispatcher.finish, [number == lost_at for number in range(1, 40)]

        def lose() -> None:
            if losing.pop(0):
                raise PeerLost("its answer never came", peer="expert-0")
            finish()

        monkeypatch.setattr(dispatcher, "finish", lose)
        found = end_of(local, CHUNK)
        assert torch.equal(found.logits_BV, expected.logits_BV)
        assert found.pasts is not None
        assert found.pasts[0].length == 41
        losing[:] = [True] * 40
        with pytest.raises(PeerLost, match="never came"):
            end_of(local, CHUNK)
        assert len(losing) == 38
        assert local.router.serving._gate._holds == 0


@pytest.mark.parametrize("decode_batch", MODES.values(), ids=MODES)
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_tokens_are_those_of_whole_prompts(family: str, decode_batch: int) -> None:
    def streams(prompt_chunk: int) -> list[list[int]]:
        with (
            cluster(source(family), decode_batch=decode_batch, prompt_chunk=prompt_chunk) as local,
            ThreadPoolExecutor(3) as pool,
        ):
            return [tokens(events) for events in pool.map(lambda prompt: generate(local, prompt), PROMPTS)]

    assert streams(CHUNK) == streams(0)


def test_streams_in_turns_decode_between_chunks(hooks: list[Hook], pool: ThreadPoolExecutor) -> None:
    with cluster(source(), decode_batch=1, prompt_chunk=CHUNK) as local:
        expected = tokens(generate(local, PROMPTS[0][:3]))
        other = local.router.serving.generate(PROMPTS[0][:3], SAMPLING, timeout_s=WAIT_S)
        got = [next(other)]
        hooks.append(lambda run: got.append(pool.submit(next, other).result(WAIT_S)))
        generate(local, PROMPTS[1])
        assert tokens(got) == expected, "one before the first of six chunks, and one after each but the last"


def test_a_batch_makes_a_step_between_chunks(monkeypatch: pytest.MonkeyPatch, hooks: list[Hook]) -> None:
    happened: list[str] = []
    step = Batch.step

    def noted(self: Batch, is_alone: Callable[[], bool]) -> None:
        happened.append("step")
        step(self, is_alone)

    monkeypatch.setattr(Batch, "step", noted)
    with cluster(source(), decode_batch=4, prompt_chunk=CHUNK) as local:
        with closing(local.router.serving.generate(PROMPTS[0][:3], LONG, timeout_s=WAIT_S)) as other:
            next(other)
            loop = local.router.serving._engine._loop

            def read_on(run: PromptRun) -> None:
                """Its row stands still while nobody reads many tokens."""
                happened.append("chunk")
                if not loop._batches[0].is_read:
                    next(other)

            hooks.append(read_on)
            generate(local, PROMPTS[1])
        between = happened[happened.index("chunk") : len(happened) - happened[::-1].index("chunk")]
        assert between == ["chunk", "step"] * 4 + ["chunk"]


@pytest.mark.parametrize("decode_batch", MODES.values(), ids=MODES)
def test_an_update_waits_for_the_prompt_that_has_begun(
    decode_batch: int, hooks: list[Hook], pool: ThreadPoolExecutor
) -> None:
    steps: list[Future[None]] = []
    turns: list[int] = []
    with cluster(source(), decode_batch=decode_batch, prompt_chunk=CHUNK) as local:
        begin(local)
        train(local)
        expected = tokens(generate(local, PROMPTS[0])[:1])

        def update(run: PromptRun) -> None:
            if not steps:
                steps.append(pool.submit(train, local))
                until(lambda: local.router.serving._gate.is_awaited)
            assert run.is_awaited
            turns.append(local.router.version)
            if decode_batch == 1:  # the links are free: whoever else asks comes in between, and waits for no update
                local.router.serving.score(PROMPTS[1])

        hooks.append(update)
        stream = local.router.serving.generate(PROMPTS[0], LONG, timeout_s=WAIT_S)
        first = next(stream)
        assert (first.version, [first.token]) == (1, expected)
        assert turns == [1] * 5
        steps[0].result(WAIT_S)
        del hooks[:]
        assert [event.version for event in stream][-1] == 2, "and goes on with the next"


@pytest.mark.parametrize("decode_batch", MODES.values(), ids=MODES)
def test_a_pinned_prompt_holds_no_update_off(decode_batch: int, hooks: list[Hook]) -> None:
    pinned = VersionChoice(pin="kept")
    with cluster(source(), decode_batch=decode_batch, prompt_chunk=CHUNK) as local:
        begin(local)
        train(local)
        local.router.pin("kept")
        before = generate(local, PROMPTS[0], pinned)
        hooks.append(lambda run: train(local))
        beside = generate(local, PROMPTS[0], pinned)
        assert local.router.version == 6
        assert (tokens(beside), {event.version for event in beside}) == (tokens(before), {1})


@pytest.mark.parametrize("decode_batch", MODES.values(), ids=MODES)
def test_a_prompt_that_nobody_waits_for_ends_between_two_chunks(decode_batch: int, hooks: list[Hook]) -> None:
    chunks: list[PromptRun] = []
    hooks.append(chunks.append)
    with cluster(source(), decode_batch=decode_batch, prompt_chunk=CHUNK) as local:
        begin(local)
        serving = local.router.serving
        with pytest.raises(StepAborted, match="session"):
            next(serving.generate(PROMPTS[0], SAMPLING, timeout_s=WAIT_S, is_wanted=lambda: len(chunks) < 2))
        assert len(chunks) == 2
        hooks.append(lambda run: time.sleep(0.3))
        with pytest.raises(TimeoutError, match="deadline"):
            next(serving.generate(PROMPTS[0], SAMPLING, timeout_s=0.2))
        assert len(chunks) < 5
        del hooks[:]
        train(local)  # nothing is held off any more
        assert generate(local, PROMPTS[0])[0].version == 1


@pytest.mark.parametrize("decode_batch", MODES.values(), ids=MODES)
def test_a_prompt_that_nobody_waits_for_any_more_does_not_begin(decode_batch: int, lengths: list[int]) -> None:
    with cluster(source(), decode_batch=decode_batch, prompt_chunk=CHUNK) as local:
        serving = local.router.serving
        with pytest.raises(StepAborted, match="session"):
            next(serving.generate(PROMPTS[0], SAMPLING, timeout_s=WAIT_S, is_wanted=lambda: False))
        with pytest.raises(TimeoutError, match="deadline"):
            next(serving.generate(PROMPTS[0], SAMPLING, timeout_s=0.0))
        assert lengths == []
        assert len(generate(local, PROMPTS[0])) == SAMPLING.max_tokens


def test_a_deadline_may_pass_while_another_prompt_is_computed(
    hooks: list[Hook], lengths: list[int], pool: ThreadPoolExecutor
) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def wait(run: PromptRun) -> None:
        begun.set()
        assert goes_on.wait(WAIT_S)

    hooks.append(wait)
    with cluster(source(), decode_batch=4, prompt_chunk=CHUNK) as local:
        first = pool.submit(generate, local, PROMPTS[0])
        assert begun.wait(WAIT_S)
        late = local.router.serving.generate(PROMPTS[0][:3], SAMPLING, timeout_s=0.05)
        second = pool.submit(next, late)
        until(lambda: len(local.router.serving._engine._loop._waiting) == 1)
        over_s = time.monotonic() + 0.05
        until(lambda: time.monotonic() > over_s)
        goes_on.set()
        with pytest.raises(TimeoutError, match="deadline"):
            second.result(WAIT_S)
        assert len(first.result(WAIT_S)) == SAMPLING.max_tokens
        assert lengths == [len(PROMPTS[0])]


@pytest.mark.parametrize("decode_batch", MODES.values(), ids=MODES)
def test_an_actor_that_dies_between_chunks_ends_the_prompt_and_holds_nothing(
    decode_batch: int, hooks: list[Hook]
) -> None:
    with cluster(source(), decode_batch=decode_batch, prompt_chunk=CHUNK) as local:
        hooks.append(lambda run: local.members["expert-1"].kill())
        with pytest.raises(MoeClusterError):
            generate(local, PROMPTS[0])
        assert local.router.serving._gate._holds == 0


def test_a_copy_goes_on_with_the_rest_of_the_prompt(hooks: list[Hook]) -> None:
    with cluster(source(), prompt_chunk=CHUNK) as local:
        expected = tokens(generate(local, PROMPTS[0]))
    with cluster(source(), prompt_chunk=CHUNK, redundancy=2, heals=True) as local:
        hooks.append(lambda run: None if local.members["expert-1"].dead else local.members["expert-1"].kill())
        assert tokens(generate(local, PROMPTS[0])) == expected


def test_closing_ends_a_prompt_between_two_chunks(hooks: list[Hook], pool: ThreadPoolExecutor) -> None:
    begun, closes = threading.Event(), threading.Event()

    def wait(run: PromptRun) -> None:
        begun.set()
        assert closes.wait(WAIT_S)

    hooks.append(wait)
    with cluster(source(), decode_batch=4, prompt_chunk=CHUNK) as local:
        stream = pool.submit(generate, local, PROMPTS[0])
        assert begun.wait(WAIT_S)
        local.router.serving._engine.stop()
        closes.set()
        with pytest.raises(StepAborted, match="closed"):
            stream.result(WAIT_S)
        assert local.router.serving._gate._holds == 0


def test_models_that_keep_other_things_than_keys_are_not_chunked() -> None:
    assert all(can_be_chunked(build(family)) for family in FAMILIES)
    model = build("deepseek_v3")
    model.config.get_text_config().layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert not can_be_chunked(model)
