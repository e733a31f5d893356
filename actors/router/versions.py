"""Keeps a forward and an update apart: what is computed belongs to one version, trunk and experts alike."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from actors.errors import MoeClusterError


class VersionGate:
    """Readers (forwards of serving) share it with one writer (the commit), who goes first when both wait."""

    def __init__(self, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s
        self._condition = threading.Condition()
        self._readers = 0
        self._writer_waits = 0
        self._writing = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._condition:
            self._wait(lambda: not self._writing and not self._writer_waits)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._condition:
            self._writer_waits += 1
            try:
                self._wait(lambda: not self._writing and not self._readers)
            finally:
                self._writer_waits -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._condition.notify_all()

    def _wait(self, free: Callable[[], bool]) -> None:
        if not self._condition.wait_for(free, self._timeout_s):
            raise MoeClusterError(f"a forward or an update did not end within {self._timeout_s:.0f} s")
