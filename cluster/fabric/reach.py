"""The routers that answer now, for requests that outlive one."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from actors.errors import LinkError, MoeClusterError, StepAborted
from cluster.errors import Unavailable
from cluster.fabric.calls import acall, is_death
from cluster.fabric.options import COORDINATOR, ROUTER

LOOK_EVERY_S = 0.1
AGAIN_S = 0.25
"""Between two tries where the coordinator sees no fault: news of a death take a moment to reach it."""
LOOK_TIMEOUT_S = 10.0
NEWS_AFTER_S = 1.0
"""Routers come and go: so old may be what is known of them."""


ANSWER_S = 0.5
"""Kept for the answer on its way to a caller, so that it learns why before it gives up."""


class Reach:
    """One for any number of requests, which it spreads over the routers; however many wait, one asks the
    coordinator."""

    def __init__(self, control: Any, router: Any) -> None:
        """Handles of the coordinator and of the first router."""
        self._control = control
        self._routers: dict[str, Any] = {ROUTER: router}
        self._num_open: Counter[str] = Counter()
        self._looking: asyncio.Task[None] | None = None
        self._looked_s = 0.0

    @contextmanager
    def router(self) -> Iterator[Any]:
        """Handle of the one with the fewest open requests, one of which is the caller's inside. One that dies is not
        given out again."""
        if time.monotonic() - self._looked_s > NEWS_AFTER_S:
            self._look_beside()
        if not self._routers:
            raise Unavailable("no router is ready")
        name = min(self._routers, key=lambda name: self._num_open[name])
        self._num_open[name] += 1
        try:
            yield self._routers[name]
        except MoeClusterError as error:
            if is_death(error):
                self._routers.pop(name, None)
            raise
        finally:
            self._num_open[name] -= 1

    async def after(self, error: MoeClusterError, deadline: float) -> None:
        """Returns when it is time to try again: at once if only a router died and there are others; else when one is
        there, and every expert group has a holder.

        Raises the error if it is of no kind that passes, `Unavailable` if that takes longer than until the deadline.
        """
        if not isinstance(error, Unavailable | LinkError | StepAborted):
            raise error
        if is_death(error) and self._routers:
            return
        try:
            async with asyncio.timeout(_patience_s(deadline - time.monotonic())):
                await asyncio.sleep(AGAIN_S)
                await asyncio.shield(self._look_beside())
        except TimeoutError:
            raise Unavailable(f"the cluster did not recover within this call's deadline: {error}") from error

    def _look_beside(self) -> asyncio.Task[None]:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return self._looking

    async def _look(self) -> None:
        while True:
            try:
                found = await acall(COORDINATOR, self._control.ready_routers.remote(), LOOK_TIMEOUT_S)
            except MoeClusterError:
                found = None
            if found:
                self._routers, self._looked_s = found, time.monotonic()
                return
            await asyncio.sleep(LOOK_EVERY_S)


def _patience_s(left_s: float) -> float:
    """Of a caller that gives up in `left_s`."""
    return max(0.5 * left_s, min(0.9 * left_s, left_s - ANSWER_S))
