"""The router that answers now, for requests that outlive one."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from actors.errors import LinkError, MoeClusterError, StepAborted
from cluster.errors import Unavailable
from cluster.fabric.calls import acall
from cluster.fabric.options import COORDINATOR

LOOK_EVERY_S = 0.1
AGAIN_S = 0.25
"""Between two tries where the coordinator sees no fault: news of a death take a moment to reach it."""
LOOK_TIMEOUT_S = 10.0


class Reach:
    """One for any number of requests: however many wait, one asks the coordinator."""

    def __init__(self, control: Any, router: Any) -> None:
        """Handles of the coordinator and of the router there is now."""
        self._control = control
        self.router = router
        self._looking: asyncio.Task[None] | None = None

    async def after(self, error: MoeClusterError, deadline: float) -> None:
        """Returns when it is time to try again: a router is there, and every expert group has a holder.

        Raises the error if it is of no kind that passes, `Unavailable` if that takes longer than until the deadline.
        """
        if not isinstance(error, Unavailable | LinkError | StepAborted):
            raise error
        try:
            # A little before the caller gives up, so that it learns why.
            async with asyncio.timeout(0.9 * (deadline - time.monotonic())):
                await asyncio.sleep(AGAIN_S)
                if self._looking is None or self._looking.done():
                    self._looking = asyncio.create_task(self._look())
                await asyncio.shield(self._looking)
        except TimeoutError:
            raise Unavailable(f"the cluster did not recover within this call's deadline: {error}") from error

    async def _look(self) -> None:
        while True:
            try:
                found = await acall(COORDINATOR, self._control.ready_router.remote(), LOOK_TIMEOUT_S)
            except MoeClusterError:
                found = None
            if found is not None:
                self.router = found
                return
            await asyncio.sleep(LOOK_EVERY_S)
