"""The newest events of a job, kept small: a job that trains for days has the whole ring of them in memory."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from typing import TypeAlias

from cluster.backend import JobEvent, JobState

_Kept: TypeAlias = tuple[str, JobState, tuple[str, ...], bytes, str]
"""Kind, state, names of the metrics, which are one tuple for all events that have the same ones, all numbers, message.
A third of what the event takes with its mapping."""
_HEAD = struct.Struct("=qqd")
"""Number, step, time_s; the metrics' values follow as doubles."""


class EventRing:
    def __init__(self, max_events: int) -> None:
        self._kept: deque[_Kept] = deque(maxlen=max_events)
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}

    def append(
        self, number: int, now: float, kind: str, state: JobState, step: int, metrics: Mapping[str, float], message: str
    ) -> None:
        """`number`: one more than the last one's."""
        names = tuple(metrics)
        names = self._names.setdefault(names, names)
        numbers = _HEAD.pack(number, step, now) + struct.pack(f"={len(names)}d", *metrics.values())
        self._kept.append((kind, state, names, numbers, message))

    def after(self, number: int, max_events: int) -> tuple[JobEvent, ...]:
        """Oldest first. Starts later than `number` + 1 where the ring no longer reaches back that far."""
        if not self._kept:
            return ()
        skip = max(0, number + 1 - _event(self._kept[0]).number)
        return tuple(_event(self._kept[i]) for i in range(skip, min(len(self._kept), skip + max_events)))


def _event(kept: _Kept) -> JobEvent:
    kind, state, names, numbers, message = kept
    number, step, time_s = _HEAD.unpack_from(numbers)
    values = struct.unpack_from(f"={len(names)}d", numbers, _HEAD.size)
    return JobEvent(number, time_s, kind, state, step, dict(zip(names, values, strict=True)), message)
