"""For loops that must go on whatever one of their steps does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)


def each(who: str, steps: Iterable[Callable[[], object]]) -> None:
    """All of them in order. An error ends one step alone and is logged: news that come once, and decisions that are
    given out once, must not be lost with those before them."""
    for step in steps:
        try:
            step()
        except Exception:
            logger.exception("%s stumbled", who)
