"""A whole service in this process: the cluster, and a front in a thread of its own."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from cluster.backend import Backend
from cluster.config import ClusterConfig, FrontConfig
from cluster.fabric.launch import RunningCluster, launched
from cluster.service.server import Front, check_front


@dataclass(frozen=True)
class Service:
    target: str
    cluster: RunningCluster


@contextmanager
def served(config: ClusterConfig) -> Iterator[Service]:
    """Ready when entered; on leaving the front drains first, then every process that was started has ended."""
    check_front(config.front)  # before ten seconds of start-up, not after
    with launched(config) as running, fronted(running.backend, config.front, config.ray.start_timeout_s) as target:
        yield Service(target, running)


@contextmanager
def fronted(backend: Backend, config: FrontConfig, ready_timeout_s: float) -> Iterator[str]:
    """Gives the target to reach the front at, once the backend is ready."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="front", daemon=True)
    thread.start()
    try:
        front = _in_loop(loop, lambda: _started(backend, config), 30)
        try:
            _in_loop(loop, lambda: front.wait_ready(ready_timeout_s), ready_timeout_s + 5)
            yield front.target
        finally:
            _in_loop(loop, front.stop, config.shutdown_grace_s + 10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def _started(backend: Backend, config: FrontConfig) -> Front:
    front = Front(backend, config)
    await front.start()
    return front


def _in_loop(loop: asyncio.AbstractEventLoop, make: Callable[[], Any], timeout_s: float) -> Any:
    future: Future[Any] = asyncio.run_coroutine_threadsafe(make(), loop)
    return future.result(timeout_s)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that whatever was started is ended. A second one while unwinding is ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for_signal() -> None:
    """Until SIGTERM or Ctrl-C, which raises KeyboardInterrupt."""
    while True:
        threading.Event().wait(3600)
