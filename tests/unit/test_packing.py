"""Packing, shuffling and batching, without Ray."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import InvalidInput
from cluster.config import BatchConfig
from cluster.jobs.batches import EVALUATION_POOL, StepBatches, evaluation_batches
from cluster.jobs.packing import pack, shuffle_window

EOS = 99
documents_of_tokens = st.lists(st.lists(st.integers(0, 98), max_size=40), max_size=20)


@given(documents_of_tokens, st.integers(1, 17))
def test_nothing_but_the_tail_is_dropped(documents: list[list[int]], length: int) -> None:
    joined = [token for document in documents for token in (*document, EOS)]
    packed = list(pack(documents, length, EOS))
    assert [token for sequence in packed for token in sequence] == joined[: len(joined) - len(joined) % length]
    assert all(sequence.shape == (length,) and sequence.dtype == np.int64 for sequence in packed)


def test_pack_takes_arrays_and_is_lazy() -> None:
    def endless() -> Iterator[np.ndarray]:
        for i in itertools.count():
            yield np.full(3, i, dtype=np.int32)

    sequences = list(itertools.islice(pack(endless(), 8, EOS), 2))
    assert sequences[0].tolist() == [0, 0, 0, EOS, 1, 1, 1, EOS]
    assert sequences[1].tolist() == [2, 2, 2, EOS, 3, 3, 3, EOS]


def test_a_sequence_that_is_kept_does_not_keep_its_document() -> None:
    """A window keeps few sequences of every document for long: whole documents would come to many times its size."""
    for sequence in pack([np.arange(100)], 10, EOS):
        assert sequence.base is None


def test_pack_refuses_no_length() -> None:
    with pytest.raises(ValueError, match="positive"):
        next(pack([[1]], 0, EOS))


@given(st.lists(st.integers()), st.integers(1, 50), st.integers(0, 5))
def test_shuffle_window_permutes_and_repeats(items: list[int], size: int, seed: int) -> None:
    once = list(shuffle_window(items, size, seed))
    assert sorted(once) == sorted(items)
    assert list(shuffle_window(items, size, seed)) == once


def test_shuffle_window_depends_on_the_seed_and_holds_no_more_than_its_size() -> None:
    assert list(shuffle_window(range(100), 10, 0)) != list(shuffle_window(range(100), 10, 1))
    taken: list[int] = []
    source = (taken.append(i) or i for i in itertools.count())
    given_out = list(itertools.islice(shuffle_window(source, 10, 0), 5))
    assert len(given_out) == 5
    assert len(taken) == 14  # ten to fill the window, one more for each but the first


CONFIG = BatchConfig(sequences=2, sequence_length=4, gradient_accumulation=3)


def numbered(count: int = 1000) -> list[list[int]]:
    return [[i % 90] * (i % 7) for i in range(count)]


def test_a_step_is_micro_batches_in_the_order_of_the_text() -> None:
    batches = StepBatches(numbered(), CONFIG, EOS)
    first = next(batches)
    assert [micro.shape for micro in first] == [(2, 4)] * 3
    expected = np.stack(list(itertools.islice(pack(numbered(), 4, EOS), 6)))
    assert np.concatenate(first).tolist() == expected.tolist()
    assert batches.step == 1


@pytest.mark.parametrize("shuffle_seed", [None, 0])
def test_a_stream_resumes_at_a_step(shuffle_seed: int | None) -> None:
    unbroken = StepBatches(numbered(), CONFIG, EOS, shuffle_seed=shuffle_seed)
    steps = [next(unbroken) for _ in range(8)]
    resumed = StepBatches(numbered(), CONFIG, EOS, shuffle_seed=shuffle_seed, start_step=5)
    assert resumed.step == 5
    for step in steps[5:]:
        assert np.array_equal(np.stack(next(resumed)), np.stack(step))


def test_shuffled_batches_are_the_same_sequences_in_another_order() -> None:
    def rows(seed: int | None) -> list[tuple[int, ...]]:
        batches = StepBatches(numbered(), CONFIG, EOS, shuffle_seed=seed)
        return [tuple(row) for step in batches for micro in step for row in micro.tolist()]

    assert rows(0) == rows(0) != rows(1)
    assert rows(0) != rows(None)
    assert len(rows(0)) == len(rows(None))


def test_a_stream_that_ends_gives_whole_steps_only() -> None:
    assert len(list(StepBatches([[1] * 23], CONFIG, EOS))) == 1  # 24 tokens are exactly one step
    assert len(list(StepBatches([[1] * 22], CONFIG, EOS))) == 0


def test_evaluation_spreads_over_the_documents() -> None:
    documents = [[document] * 99 for document in range(10)]  # 25 sequences each
    batches = evaluation_batches(documents, CONFIG, EOS, num_batches=5)
    assert [batch.shape for batch in batches] == [(2, 4)] * 5
    assert {int(row[0]) for batch in batches for row in batch} == set(range(10))
    again = evaluation_batches(documents, CONFIG, EOS, num_batches=5)
    assert np.array_equal(np.stack(batches), np.stack(again))


def test_evaluation_looks_at_a_bounded_number_of_documents() -> None:
    read = itertools.count()
    batches = evaluation_batches(([next(read)] * 7 for _ in itertools.count()), CONFIG, EOS, num_batches=2)
    assert len(batches) == 2
    assert next(read) == EVALUATION_POOL


def test_evaluation_uses_what_there_is() -> None:
    assert len(evaluation_batches([[1] * 20], CONFIG, EOS, num_batches=5)) == 2
    with pytest.raises(InvalidInput, match=r"data\.heldout_every.*too few for a batch of 2"):
        evaluation_batches([[1] * 4], CONFIG, EOS, num_batches=5)
