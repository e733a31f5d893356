"""The ring of a job's events: what comes out is what went in, in a fraction of the memory."""

from __future__ import annotations

import tracemalloc
from collections import deque
from collections.abc import Callable

from cluster.backend import JobEvent, JobState
from cluster.control.events import EventRing

NAMES = ("loss", "grad_norm", "lr", "tokens", "tokens_per_s", "load_max_over_mean", "retries", "staleness_mean")


def metrics(number: int) -> dict[str, float]:
    return {name: number + i / 8 for i, name in enumerate(NAMES)}


def filled(ring: EventRing, count: int) -> EventRing:
    for n in range(1, count + 1):
        ring.append(n, n / 2, "step", JobState.RUNNING, n, metrics(n), "")
    return ring


def test_events_come_back_as_they_were() -> None:
    ring = filled(EventRing(10), 2)
    ring.append(3, 1.5, "note", JobState.CANCELLING, 2, {}, "a router died")
    assert ring.after(0, 10) == (
        JobEvent(1, 0.5, "step", JobState.RUNNING, 1, metrics(1)),
        JobEvent(2, 1.0, "step", JobState.RUNNING, 2, metrics(2)),
        JobEvent(3, 1.5, "note", JobState.CANCELLING, 2, {}, "a router died"),
    )


def test_the_oldest_go_first() -> None:
    ring = filled(EventRing(4), 9)
    assert [event.number for event in ring.after(0, 10)] == [6, 7, 8, 9]
    assert [event.number for event in ring.after(7, 10)] == [8, 9]
    assert [event.number for event in ring.after(6, 2)] == [7, 8]
    assert ring.after(9, 10) == ()
    assert EventRing(4).after(0, 10) == ()


def test_a_full_ring_takes_less_than_half_of_what_its_events_take() -> None:
    def plain() -> deque[JobEvent]:
        return deque(JobEvent(n, n / 2, "step", JobState.RUNNING, n, metrics(n)) for n in range(1, 1001))

    assert _bytes_of(lambda: filled(EventRing(1000), 1000)) < 0.5 * _bytes_of(plain)


def _bytes_of(make: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        kept = make()
        found, _ = tracemalloc.get_traced_memory()
        assert kept
        return found
    finally:
        tracemalloc.stop()
