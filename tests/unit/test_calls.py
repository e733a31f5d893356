"""Calls that are awaited: their ends, and that they can be cancelled."""

from __future__ import annotations

import asyncio

import pytest

from actors.errors import LinkTimeout
from cluster.fabric.calls import acall


def test_an_answer_and_a_cancellation_at_once_is_a_cancellation() -> None:
    """A task that loops over calls would never end otherwise."""

    async def test() -> None:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asking = asyncio.create_task(acall("expert-0", answer, 10.0))
        for _ in range(3):
            await asyncio.sleep(0)
        answer.set_result(1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(test())


def test_no_answer_in_time() -> None:
    async def test() -> None:
        with pytest.raises(LinkTimeout, match="expert-0"):
            await acall("expert-0", asyncio.get_running_loop().create_future(), 0.01)

    asyncio.run(test())
