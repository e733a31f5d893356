"""Requests are spread over the routers, and go on at another when theirs dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from actors.errors import InvalidInput, StepAborted
from cluster.errors import Unavailable
from cluster.fabric.reach import Reach


class Control:
    """Answers with these routers, as the coordinator does."""

    def __init__(self, *names: str) -> None:
        self.found = {name: f"handle of {name}" for name in names}
        self.num_looks = 0
        self.ready_routers = SimpleNamespace(remote=self._look)

    async def _look(self) -> dict[str, str]:
        self.num_looks += 1
        return dict(self.found)


def death() -> Unavailable:
    error = Unavailable("the router is not there")
    error.__cause__ = RayActorError()
    return error


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


async def known(control: Control) -> Reach:
    reach: Any = Reach(control, "handle of router-0")
    with reach.router() as router:
        assert router == "handle of router-0"
    while not control.num_looks or not reach._looking.done():
        await asyncio.sleep(0)
    return reach  # type: ignore[no-any-return]


def test_the_fewest_open_requests_go_first() -> None:
    async def test() -> None:
        reach = await known(Control("router-0", "router-1", "router-2"))
        with reach.router() as first, reach.router() as second, reach.router() as third:
            assert len({first, second, third}) == 3
            with reach.router() as fourth:
                assert fourth == first
        with reach.router() as again:
            assert again == first

    run(test)


def test_a_request_goes_on_elsewhere_at_once_when_its_router_dies() -> None:
    async def test() -> None:
        control = Control("router-0", "router-1")
        reach = await known(control)
        with pytest.raises(Unavailable), reach.router() as dead:
            raise death()
        looks, started = control.num_looks, time.monotonic()
        await reach.after(death(), started + 10)
        assert (control.num_looks, dead) == (looks, "handle of router-0")
        with reach.router() as other:
            assert other == "handle of router-1"

    run(test)


def test_the_last_one_is_waited_for() -> None:
    async def test() -> None:
        control = Control("router-0")
        reach = await known(control)
        with pytest.raises(Unavailable), reach.router():
            raise death()
        control.found = {}
        asyncio.get_running_loop().call_later(0.4, lambda: control.found.update({"router-3": "handle of router-3"}))
        await reach.after(death(), time.monotonic() + 15)
        with reach.router() as router:
            assert router == "handle of router-3"

    run(test)


def test_trouble_of_the_experts_is_waited_for_where_it_is() -> None:
    async def test() -> None:
        control = Control("router-0", "router-1")
        reach = await known(control)
        looks = control.num_looks
        await reach.after(StepAborted("no expert actor holds it"), time.monotonic() + 15)
        assert control.num_looks == looks + 1
        with pytest.raises(InvalidInput):
            await reach.after(InvalidInput("cannot be"), time.monotonic() + 15)
        control.found = {}
        with pytest.raises(Unavailable, match="within this call's deadline"):
            await reach.after(StepAborted("no expert actor holds it"), time.monotonic() + 0.5)

    run(test)
