"""Who may use what can be used by one at a time: whoever has waited longest."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """First come, first served. A `threading.Lock` lets the thread that has just left it overtake all that wait: one
    stream of many then gets its next token while another waits for seconds."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def acquire(self, timeout_s: float = -1) -> bool:
        """Whether it is the caller's now: it waits for at most so long, for ever if negative."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return True
            if timeout_s == 0:
                return False
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        return mine.acquire(timeout=timeout_s) or not self._leave(mine)  # handed over; nobody comes between

    def release(self) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    def _leave(self, mine: threading.Lock) -> bool:
        """False if it has been handed over meanwhile."""
        with self._guard:
            if mine not in self._waiting:
                return False
            self._waiting.remove(mine)
            return True

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
