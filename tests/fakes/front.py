"""Fronts for tests that talk to them from other threads, all in one background event loop.

One loop for the whole process: gRPC's asyncio side keeps a single poller and does not like to see loops end.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from cluster.backend import Backend
from cluster.config import FrontConfig
from cluster.service.server import Front

Result = TypeVar("Result")
WAIT_S = 10.0


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="test-fronts", daemon=True).start()
    return loop


def run(coroutine: Coroutine[Any, Any, Result], timeout_s: float = WAIT_S) -> Result:
    """Runs in the background loop and waits for the result here."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result(timeout_s)


def until(condition: Callable[[], bool]) -> None:
    """Waits here, while the loop goes on."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


@contextmanager
def running_front(backend: Backend, config: FrontConfig | None = None) -> Iterator[Front]:
    front = run(_start(backend, config or FrontConfig(port=0)))
    try:
        yield front
    finally:
        run(front.stop(grace_s=0.0))


async def _start(backend: Backend, config: FrontConfig) -> Front:
    front = Front(backend, config, health_interval_s=0.02)
    await front.start()
    return front
