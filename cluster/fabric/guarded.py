"""The coordinator's state machine behind one lock, for the threads of the coordinator's actor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.control.coordinator import Coordinator


class Guarded:
    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._changed = threading.Condition()

    @contextmanager
    def reading(self) -> Iterator[Coordinator]:
        with self._changed:
            yield self._coordinator

    @contextmanager
    def changing(self) -> Iterator[Coordinator]:
        """Whoever waits looks again afterwards."""
        with self._changed:
            try:
                yield self._coordinator
            finally:
                self._changed.notify_all()

    def wait_for(self, predicate: Callable[[Coordinator], bool], timeout_s: float) -> bool:
        """Whether it became true in time."""
        with self._changed:
            return self._changed.wait_for(lambda: predicate(self._coordinator), timeout_s)
