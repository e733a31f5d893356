"""Keeps a forward and an update apart: what is computed belongs to one version, trunk and experts alike.

A prompt that is computed in several forwards holds updates off from the first to the last. While it does, other
forwards come in between although an update waits: they may be in the way of its next one, and it must not wait for what
waits for it. New holds are not given then, so that the update's turn comes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from actors.errors import MoeClusterError, StepAborted


class Hold:
    """Keeps the version as it is, for several forwards. This one is of a version that never changes."""

    is_awaited = False
    """Whether an update waits for its end."""

    def end(self) -> None:
        """Once."""


class VersionGate:
    """Readers (forwards of serving) share it with one writer (the commit), who goes first when both wait. Readers that
    wait for too long get `StepAborted`: their requests may be tried again."""

    def __init__(self, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s
        self._condition = threading.Condition()
        self._readers = self._holds = 0
        self._writer_waits = 0
        self._writing = False
        self._is_shut = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._condition:
            self._wait(lambda: not self._writing and not self._is_shut and (self._holds > 0 or not self._writer_waits))
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    def hold(self) -> Hold:
        """No update until it ends. To be asked for by a thread that keeps nothing which a reader may wait for."""
        with self._condition:
            self._wait(lambda: not self._writing and not self._is_shut and not self._writer_waits)
            self._holds += 1
        return _GateHold(self)

    @property
    def is_awaited(self) -> bool:
        """Whether an update waits."""
        return self._writer_waits > 0

    def _end_hold(self) -> None:
        with self._condition:
            self._holds -= 1
            self._condition.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._condition:
            self._writer_waits += 1
            try:
                self._wait(lambda: not self._writing and not self._readers and not self._holds, MoeClusterError)
            finally:
                self._writer_waits -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._condition.notify_all()

    def shut(self) -> None:
        """Readers wait until `open`, also between one writer and the next. To be called while writing."""
        with self._condition:
            self._is_shut = True

    def open(self) -> None:
        with self._condition:
            self._is_shut = False
            self._condition.notify_all()

    def wait_until_open(self) -> None:
        """For readers that should not keep others waiting meanwhile. `StepAborted` if it stays shut for too long."""
        with self._condition:
            if not self._condition.wait_for(lambda: not self._is_shut, self._timeout_s):
                raise StepAborted("weights were being replaced for too long, or that was cut off")

    @property
    def is_shut(self) -> bool:
        return self._is_shut

    def _wait(self, free: Callable[[], bool], too_long: type[MoeClusterError] = StepAborted) -> None:
        if not self._condition.wait_for(free, self._timeout_s):
            raise too_long(f"a forward or an update did not end within {self._timeout_s:.0f} s")


class _GateHold(Hold):
    def __init__(self, gate: VersionGate) -> None:
        self._gate = gate

    @property
    def is_awaited(self) -> bool:  # type: ignore[override]
        return self._gate.is_awaited

    def end(self) -> None:
        self._gate._end_hold()
