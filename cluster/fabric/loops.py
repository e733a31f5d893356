"""For loops that must go on whatever one of their steps does."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


def each(who: str, steps: Iterable[Callable[[], object]]) -> None:
    """All of them in order. An error ends one step alone and is logged: news that come once, and decisions that are
    given out once, must not be lost with those before them."""
    for step in steps:
        try:
            step()
        except Exception:
            logger.exception("%s stumbled", who)


class Beside(Generic[T]):
    """What a loop wants to know of somebody who may not answer for minutes, as Ray's control store while Ray's head is
    away. It is asked for in another thread, one at a time."""

    def __init__(self, what: str, ask: Callable[[], T], keep_s: float) -> None:
        """An answer counts for `keep_s`."""
        self._what, self._ask, self._keep_s = what, ask, keep_s
        self._answer: tuple[float, T | None] | None = None
        """When it came (monotonic); None for one that was an error."""
        self._thread: threading.Thread | None = None

    def answer(self) -> T | None:
        """Without waiting, from the loop alone. None if it is not known: then it is being asked for."""
        if self._answer is not None and time.monotonic() < self._answer[0] + self._keep_s:
            return self._answer[1]
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name=self._what, daemon=True)
            self._thread.start()
        return None

    def _run(self) -> None:
        found: T | None = None
        try:
            found = self._ask()
        except Exception:
            logger.exception("%s is not known", self._what)
        self._answer = time.monotonic(), found
