"""Whoever reads a stream is told of its end, also where what decodes is broken; and the next stream is served."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.router.batch import AHEAD, Batch, DecodeLoop, Launched, Stream
from actors.router.served import Served
from actors.values import Sampling, TokenEvent

WAIT_S = 10.0
VOCABULARY = 4


class Model:
    """Every next token is 0."""

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(1))

    def __call__(self, input_ids: torch.Tensor, past_key_values: None, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY), past_key_values=None)


class Slots:
    """What a batch wants of its slots."""

    pasts = None
    num_free = 2

    def __init__(self, **faults: Exception) -> None:
        self.faults = faults
        self.lengths: list[int] = []

    def add(self, cache: object, pasts: object, length: int, row: int) -> None:
        self._raise("add")
        self.lengths.append(length)

    def remove(self, slot: int) -> None:
        self._raise("remove")
        self.lengths[slot] = self.lengths[-1]
        self.lengths.pop()

    def _raise(self, what: str) -> None:
        if (fault := self.faults.get(what)) is not None:
            raise fault


@contextmanager
def guard(length: int, pasts: object) -> Iterator[Callable[[], int]]:
    yield lambda: 1


def served(new_pasts: Callable[[], None] = lambda: None) -> Served:
    model: Any = Model()
    return Served(lambda: model, guard, new_pasts, key=new_pasts.__name__, is_lasting=True)


def forward(model: object, slots: Slots, tokens: Sequence[int]) -> torch.Tensor:
    return torch.zeros(len(tokens), VOCABULARY)


class OnADevice(Launched):
    """`forward`, launched. `told`: of the first stream, what its reader had heard of before and after each launch."""

    def __init__(self) -> None:
        self.first: Stream | None = None
        self.told: list[tuple[int, int]] = []

    def __call__(self, model: object, slots: Slots, tokens: Sequence[int]) -> torch.Tensor:
        before = self._num_told()
        self.meanwhile()
        self.told.append((before, self._num_told()))
        return forward(model, slots, tokens)

    def _num_told(self) -> int:
        return 0 if self.first is None else self.first._events.qsize()


class Bench:
    """A loop whose first batch has these slots; those after it are whole."""

    def __init__(self, slots: Slots, new_forward: Callable[[], Any] = lambda: forward) -> None:
        self._slots, self._new_forward = [slots], new_forward
        self.loop = DecodeLoop(self._new_batch, linger_s=0.01)
        self.pool = ThreadPoolExecutor(2)

    def _new_batch(self, served: Served) -> Batch:
        slots: Any = self._slots.pop() if self._slots else Slots()
        return Batch(served, slots, self._new_forward(), {})

    def read(self, served: Served, num_tokens: int = 3) -> list[int]:
        """In time, or not at all."""
        stream = Stream(served, [1, 2], Sampling(max_tokens=num_tokens), num_tokens, frozenset())
        return [event.token for event in self.pool.submit(lambda: list(self.loop.run(stream))).result(WAIT_S)]

    def until_it_rests(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while not (self.loop._is_resting or self.loop._thread is None):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self) -> None:
        self.pool.shutdown(wait=False)
        self.loop.close()


def no_room() -> None:
    raise RuntimeError("no memory")


@pytest.mark.parametrize("new_forward", [lambda: forward, OnADevice], ids=["at_once", "launched"])
@pytest.mark.parametrize(
    ("slots", "first"),
    [
        (Slots(add=RuntimeError("no memory")), served()),
        (Slots(), served(no_room)),
        (Slots(remove=RuntimeError("no memory")), served()),
    ],
)
def test_a_stream_whose_slot_breaks_ends_and_the_next_is_served(
    slots: Slots, first: Served, new_forward: Callable[[], Any]
) -> None:
    with closing(Bench(slots, new_forward)) as bench:
        if "remove" in slots.faults:  # after its last token, and again for whoever clears up after that
            assert bench.read(first) == [0, 0, 0]
        else:
            with pytest.raises(RuntimeError, match="no memory"):
                bench.read(first)
        bench.until_it_rests()  # whoever waits when something breaks is told of it, too
        assert bench.read(served()) == [0, 0, 0]


def batch_of(num_streams: int, step: Any) -> tuple[Batch, list[Stream]]:
    slots: Any = Slots()
    batch = Batch(served(), slots, step, {})
    batch.streams = [Stream(served(), [1, 2], Sampling(max_tokens=3), 3, frozenset()) for _ in range(num_streams)]
    slots.lengths = [2] * num_streams
    return batch, list(batch.streams)


def test_tokens_of_a_launched_step_are_told_while_the_next_is_computed() -> None:
    step = OnADevice()
    batch, (step.first, *_) = batch_of(2, step)
    for _ in range(3):
        batch.step()
    assert step.told == [(0, 0), (0, 1), (1, 2)]
    batch.drop_ended()  # there is no other step to tell of the last ones
    assert step.first._events.qsize() == 3
    batch, (first,) = batch_of(1, forward)
    batch.step()
    assert first._events.qsize() == 1, "while a forward is computed the host has no time"


def test_an_error_comes_behind_the_tokens_before_it() -> None:
    batch, streams = batch_of(2, OnADevice())
    batch.step()
    batch.fail(RuntimeError("gone"))
    for stream in streams:
        reader = stream.read(lambda: True, lambda: None)
        assert next(reader).token == 0
        with pytest.raises(RuntimeError, match="gone"):
            next(reader)


def test_launched_streams_are_whole_also_where_their_readers_are_slow() -> None:
    with closing(Bench(Slots(), OnADevice)) as bench:
        assert bench.read(served(), 3 * AHEAD) == [0] * (3 * AHEAD)
        stream = Stream(served(), [1, 2], Sampling(max_tokens=3 * AHEAD), 3 * AHEAD, frozenset())
        reader = bench.loop.run(stream)
        assert next(reader).token == 0
        bench.until_it_rests()  # since nobody reads
        assert stream._events.qsize() >= AHEAD - 1
        assert len(list(bench.pool.submit(lambda: list(reader)).result(WAIT_S))) == 3 * AHEAD - 1


class Chained(Launched):
    """Steps that follow each other as long as they may: 0, 0, ... and at last `end`."""

    def __init__(self, end_at: int = 1 << 30) -> None:
        self._end_at = end_at
        self.lengths: list[int] = []
        """Of the chains, in steps; 0: one that was computed as usual."""

    def __call__(self, model: object, slots: Slots, tokens: Sequence[int]) -> torch.Tensor:
        self.lengths.append(0)
        self.meanwhile()
        return forward(model, slots, tokens)

    def chain(
        self, model: object, slots: Any, tokens: Sequence[int], goes_on: Callable[[], bool]
    ) -> Iterator[list[int]]:
        self.lengths.append(0)
        ahead = True
        while ahead:
            ahead = goes_on()
            self.lengths[-1] += 1
            self.meanwhile()
            yield [3 if slots.lengths[0] == self._end_at else 0] * len(slots.lengths)


def test_likely_tokens_come_in_one_chain() -> None:
    step = Chained()
    with closing(Bench(Slots(), lambda: step)) as bench:
        assert bench.read(served(), 20) == [0] * 20
    assert step.lengths == [19], "the first is of the prompt"


def test_nothing_comes_behind_the_end_of_a_text() -> None:
    step = Chained(end_at=6)
    batch, (first, other) = batch_of(2, step)
    for stream in (first, other):
        stream._budget = 100
    other._end_ids, first._end_ids = frozenset(), frozenset({3})
    batch.step(lambda: True)
    batch.drop_ended()
    batch.tell()
    told = [[stream._events.get() for _ in range(stream._events.qsize())] for stream in (first, other)]
    assert [[event.token for event in events] for events in told] == [[0] * 4 + [3], [0] * 4 + [3, 0]]
    assert told[0][-1].finish_reason == "end_of_text"
    assert batch.streams == [other]
    assert batch._slots.lengths == [8]


@pytest.mark.parametrize("reason", ["others", "update", "closed", "temperature", "reader"])
def test_a_chain_gives_way(reason: str) -> None:
    step = Chained()
    batch, (first, other) = batch_of(2, step)
    for stream in (first, other):
        stream._budget = 100
    if reason == "update":
        batch.served = replace(batch.served, is_awaited=lambda: True)
    if reason == "closed":
        other.closed = True
    if reason == "temperature":
        other.sampling = Sampling(max_tokens=100, temperature=1.0)
    if reason == "reader":
        for _ in range(AHEAD - 2):
            other._events.put(TokenEvent(0, 0, ""))
    batch.step(lambda: reason != "others")
    assert step.lengths == ([1] if reason in ("others", "update") else [0])
    assert batch._slots.lengths == [3, 3]
    if reason in ("others", "update"):
        batch.served = served()
        batch.step(lambda: len(step.lengths) < 2 or step.lengths[1] < 4)
        assert step.lengths == [1, 5]
