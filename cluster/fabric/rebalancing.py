"""The load watched, and groups moved by themselves when that pays."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from actors.errors import MoeClusterError
from cluster.fabric.changes import Changes

logger = logging.getLogger(__name__)

MIN_GAIN = 0.05
"""Of the balance (average over maximum load): less is noise of the load, and would move groups to and fro."""
TIMEOUT_S = 3600.0


class Rebalancer:
    """Every `every_s` seconds; 0: never."""

    def __init__(self, changes: Changes, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._changes, self._every_s, self._clock = changes, every_s, clock
        self._next_s = clock() + every_s

    def look(self) -> None:
        """To be called often."""
        if self._every_s and self._clock() >= self._next_s:
            self._next_s = self._clock() + self._every_s
            threading.Thread(target=self.rebalance_if_it_pays, name="rebalancing", daemon=True).start()

    def rebalance_if_it_pays(self) -> None:
        try:
            plan = self._changes.rebalance(True, TIMEOUT_S)
            if plan.balance_after - plan.balance_before >= MIN_GAIN:
                done = self._changes.rebalance(False, TIMEOUT_S)
                logger.info("balance from %.2f to %.2f", done.balance_before, done.balance_after)
        except MoeClusterError as error:  # no load yet, another change under way, a death meanwhile
            logger.info("not rebalanced: %s", error)
