"""Which streams of a router are still wanted."""

from __future__ import annotations

import threading

MAX_ENDED = 4096
"""Sessions that are remembered as ended."""


class Sessions:
    """Thread-safe. The end of a session comes beside its begin, which may wait for a free thread: it may be first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[str] = set()
        self._ended: dict[str, None] = {}
        """Those that ended while they were not open, oldest first: before their begin, or after all was said."""

    def begin(self, session: str) -> bool:
        """False if nobody wants it any more."""
        with self._lock:
            if session in self._ended:
                return False
            self._open.add(session)
            return True

    def is_wanted(self, session: str) -> bool:
        return session in self._open

    def end(self, session: str) -> None:
        """By whoever asked for it. One that has ended is no error."""
        with self._lock:
            if session in self._open:
                self._open.remove(session)
                return
            self._ended[session] = None
            if len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]

    def leave(self, session: str) -> None:
        """Its stream is over."""
        with self._lock:
            self._open.discard(session)
