"""An operation that is carried out in a thread: it tells how far it is, may be cancelled, and always tells its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from actors.errors import MoeClusterError
from cluster.backend import Operation
from cluster.fabric.guarded import Guarded

logger = logging.getLogger(__name__)


class Cancelled(Exception):
    """Whoever asked for the operation wants it no more."""


def nothing() -> None:
    """To be done."""


class UnderWay:
    def __init__(self, state: Guarded, operation: Operation) -> None:
        self._state, self._id = state, operation.id

    def report(self, share: float, message: str) -> None:
        """How much is done. `Cancelled` if it is to stop here."""
        with self._state.changing() as coordinator:
            coordinator.operations.progress(self._id, share, message)
            if coordinator.operations.is_cancelling(self._id):
                raise Cancelled

    def run(
        self,
        work: Callable[[], float],
        *,
        done: Callable[[], None] = nothing,
        cancelled: Callable[[], None] = nothing,
        failed: Callable[[], None] = nothing,
    ) -> bool:
        """`work` -> the longest time that a step waited, in seconds. One of the others is called before the end is
        told, `done` in the same breath. -> whether it succeeded."""
        started = time.monotonic()
        try:
            stall_s = work()
            with self._state.changing() as coordinator:
                done()
                prepare_s = max(0.0, time.monotonic() - started - stall_s)
                coordinator.operations.succeeded(self._id, time.time(), prepare_s, stall_s)
            return True
        except Cancelled:
            self._undo(cancelled)
            with self._state.changing() as coordinator:
                coordinator.operations.cancelled(self._id, time.time())
        except Exception as error:
            is_ours = isinstance(error, MoeClusterError)
            logger.log(logging.WARNING if is_ours else logging.ERROR, "%s failed", self._id, exc_info=not is_ours)
            self._undo(failed)
            text = str(error) if is_ours else f"{type(error).__name__} in the coordinator; see its log"
            with self._state.changing() as coordinator:
                coordinator.operations.failed(self._id, text, time.time())
        return False

    def _undo(self, undo: Callable[[], None]) -> None:
        """The end is told whatever comes of this: while an operation counts as running no other one begins."""
        try:
            undo()
        except Exception:
            logger.exception("%s is not undone", self._id)
