"""Slots on a device and the copies that fill them: what is visited is what is at home, hits first, never too many."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.errors import StepAborted
from actors.moe import shelf as module
from actors.moe.cache import Forecast
from actors.moe.shelf import CacheCounters, Loader, Shelf
from cluster.backend import ExpertCache

NUM_KEYS = 6


@pytest.fixture
def loader() -> Iterator[Loader]:
    loader = Loader(torch.device("cpu"))
    yield loader
    loader.close()


def shelf_over(homes: dict[int, Tensor], capacity: int, loader: Loader) -> Shelf[int]:
    return Shelf[int](capacity, homes.__getitem__, loader, Forecast[int]())


def homes(value: float = 0.0) -> dict[int, Tensor]:
    return {key: torch.full((3, 2), value + key) for key in range(NUM_KEYS)}


def visited(shelf: Shelf[int], keys: list[int]) -> list[tuple[int, float]]:
    return [(key, float(matrix[0, 0])) for key, matrix in shelf.visit(keys, lambda: None)]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["visit", "expect", "anticipate", "write", "drop"]),
        st.lists(st.integers(0, NUM_KEYS - 1), max_size=NUM_KEYS, unique=True),
    ),
    max_size=25,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, NUM_KEYS), OPERATIONS)
def test_whatever_happens_what_is_visited_is_what_is_at_home(
    capacity: int, operations: list[tuple[str, list[int]]]
) -> None:
    loader, at_home, forecast = Loader(torch.device("cpu")), homes(), Forecast[int]()
    shelf = Shelf[int](capacity, at_home.__getitem__, loader, forecast)
    for number, (operation, keys) in enumerate(operations):
        if operation == "visit":
            forecast.note(keys)
            here = sum(key in shelf for key in keys)
            hits = loader.counters.hits
            seen = {}
            for key, matrix in shelf.visit(keys, lambda: None):
                assert len(shelf) <= capacity
                assert torch.equal(matrix, at_home[key])
                seen[key] = matrix
            assert sorted(seen) == sorted(keys)
            assert loader.counters.hits - hits == here
        elif operation == "expect":
            shelf.expect(keys)
            assert sum(key in shelf for key in keys) >= min(capacity, len(keys))
        elif operation == "anticipate":
            shelf.anticipate(range(NUM_KEYS))
        elif operation == "write":
            loader.settle()
            for key in keys:
                at_home[key].fill_(1000 * number + key)
                shelf.reload(key)
        else:
            for key in keys:
                shelf.drop(key)
                assert key not in shelf
        assert len(shelf) <= capacity
        assert loader.counters.device_bytes <= capacity * at_home[0].nbytes
    loader.close()


def test_hits_come_while_the_others_are_on_their_way(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = shelf_over(homes(), 3, loader)
    visited(shelf, [4, 5])
    may_copy = threading.Event()
    copy = loader._copy

    def slow_copy(*args: object) -> None:
        assert may_copy.wait(20)
        copy(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "_copy", slow_copy)
    told: list[str] = []
    visit = shelf.visit([0, 4, 5], lambda: told.append("all loads are started"))
    assert [next(visit)[0], next(visit)[0]] == [4, 5]
    assert told == ["all loads are started"]
    may_copy.set()
    assert [key for key, _ in visit] == [0]
    assert loader.counters.wait_s > 0


def test_with_one_slot_each_is_loaded_when_the_one_before_is_done_with(loader: Loader) -> None:
    shelf = shelf_over(homes(), 1, loader)
    told: list[int] = []
    assert sorted(visited(shelf, [2, 0, 1])) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    for key, _ in shelf.visit([3, 4], lambda: told.append(len(shelf))):
        assert told == ([] if key == 3 else [1])
    assert (loader.counters.hits, loader.counters.misses) == (0, 5)


def test_what_was_loaded_ahead_is_a_hit(loader: Loader) -> None:
    shelf = shelf_over(homes(), 2, loader)
    shelf.expect([3, 1, 0])
    assert sorted(visited(shelf, [3, 1])) == [(1, 1.0), (3, 3.0)]
    counters = loader.counters
    assert (counters.hits, counters.misses, counters.loaded_ahead) == (2, 0, 2)
    assert counters.loaded_bytes == counters.device_bytes == 2 * 3 * 2 * 4


def test_what_is_counted_is_what_a_status_tells() -> None:
    counters = CacheCounters(1, 2, 3, 4, 0.5, 6)
    assert dataclasses.astuple(ExpertCache(**counters.to_dict())) == (1, 2, 3, 4, 0.5, 6)


def test_a_visit_that_ends_early_leaves_nothing_pinned(loader: Loader) -> None:
    shelf = shelf_over(homes(), 2, loader)
    visit = shelf.visit([0, 1, 2], lambda: None)
    next(visit)
    visit.close()
    assert len(visited(shelf, [3, 4, 5])) == 3
    assert len(shelf) == 2


def test_a_home_that_does_not_answer_ends_the_attempt(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOAD_TIMEOUT_S", 0.05)
    go_on = threading.Event()
    monkeypatch.setattr(loader, "_copy", lambda *args: go_on.wait(20))
    shelf = shelf_over(homes(), 2, loader)
    with pytest.raises(StepAborted, match="did not come from their home"):
        visited(shelf, [0])
    go_on.set()


def test_what_could_not_be_copied_is_not_taken_for_a_hit(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = shelf_over(homes(), 2, loader)

    def fail(*args: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(loader, "_copy", fail)
        shelf.expect([1])
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                visited(shelf, [1, 2, 3])
        loader.settle()
    assert sorted(visited(shelf, [1, 2, 3])) == [(1, 1.0), (2, 2.0), (3, 3.0)]
