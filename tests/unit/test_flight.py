"""Whose turn it is: always in the same order, whatever the threads' timing; and nobody waits for who has failed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import StepAborted
from actors.router.flight import Flight
from actors.trunk.shared import nothing

Event = tuple[int, str]


def dispatcher() -> Any:
    """As much of one as a flight sees."""
    return SimpleNamespace(current=None, while_away=nothing)


def fly(
    num_slots: int,
    num_passes: int,
    *,
    fails: Callable[[int, str], bool] = lambda number, stage: False,
) -> list[Event]:
    """Passes of two layers. -> (pass, stage) in the order of computation; threads dawdle at random."""
    away, done = dispatcher(), []
    threads = ThreadPoolExecutor(max(1, num_slots - 1))
    flight = Flight(away, num_slots, threads)

    def stage(number: int, name: str) -> None:
        assert away.current == number, "what is computed now must be known"
        time.sleep(random.random() * 1e-3)
        done.append((number, name))
        if fails(number, name):
            raise ValueError(f"{number} {name}")
        away.while_away()
        assert away.current == number

    def one(number: int) -> None:
        away.current = number
        stage(number, "f0")
        stage(number, "f1")
        stage(number, "b1")
        stage(number, "b0")

    passes: list[Callable[[], None]] = [lambda n=n: one(n) for n in range(num_passes)]  # type: ignore[misc]
    try:
        flight.run(passes)
    finally:
        threads.shutdown(wait=True)  # no slot is left that would wait for ever
        assert away.while_away is nothing
    return done


def test_one_slot_is_one_after_the_other() -> None:
    assert fly(1, 3) == [(n, stage) for n in range(3) for stage in ("f0", "f1", "b1", "b0")]


@pytest.mark.parametrize("num_slots", [2, 3, 8])
def test_passes_take_turns_in_their_order(num_slots: int) -> None:
    done = fly(num_slots, 7)
    assert done == fly(num_slots, 7)
    for stage in ("f0", "f1", "b1", "b0"):
        assert [number for number, name in done if name == stage] == list(range(7))
    first = min(num_slots, 7)
    assert done[: 2 * first] == [(n, stage) for stage in ("f0", "f1") for n in range(first)]


def test_a_slot_that_has_no_more_to_do_is_passed_over() -> None:
    assert fly(2, 3)[8:] == [(2, stage) for stage in ("f0", "f1", "b1", "b0")]


@pytest.mark.parametrize("where", [(0, "f0"), (1, "f0"), (1, "f1"), (0, "b1"), (2, "b0"), (5, "f1")])
def test_the_first_error_ends_all(where: Event) -> None:
    with pytest.raises(ValueError, match=f"{where[0]} {where[1]}"):
        fly(3, 6, fails=lambda number, stage: (number, stage) == where)


def test_those_that_wait_are_told_why() -> None:
    away, told = dispatcher(), []
    flight = Flight(away, 2, ThreadPoolExecutor(1))

    def waits() -> None:
        try:
            away.while_away()
        except StepAborted as error:
            told.append(str(error))
            raise

    def fails() -> None:
        raise ValueError("of the second")

    with pytest.raises(ValueError, match="of the second"):
        flight.run([waits, fails])
    assert len(told) == 1
    assert "of the second" in told[0]
