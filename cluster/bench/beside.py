"""`hidden_optimizer_share`: how much of the updates' time a step does not wait for, when experts are one step behind.

    hidden = (seconds of a step with s = 0 - seconds of a step with s = 1) / seconds of an update with s = 0

A router, which is this process, and an expert actor in a process of its own, over sockets, each with one thread of
torch and, where there are two, a core of its own, as actors of a cluster have. An update is the optimizer work for all
experts: with s = 0 it is made between two steps, so its time is what a step waits for, but for what the router computes
before it asks the experts for the first layer; with s = 1 it is made beside the step, while the router computes.

Both are timed in turn. A round is some steps of each in a steady state, what is pending at its end was so at its begin.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import Any

import torch

from actors.expert.host import ExpertHost
from actors.router.roster import Peer, Roster
from actors.router.router import Router
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Placement
from cluster.bench.result import Advance, Row
from cluster.bench.steady import Training, TrainingShape, torch_threads
from cluster.errors import StartupError

NAME = "expert-0"
START_S, ANSWER_S = 120.0, 60.0
MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Timed:
    """Of one round, seconds a step."""

    step_s: float
    beside_s: float
    update_s: float

    @property
    def hidden(self) -> float:
        return (self.step_s - self.beside_s) / self.update_s


@dataclass(frozen=True)
class SpreadRow(Row):
    low: float
    """Quartiles of the rounds."""
    high: float


def num_rounds(rounds: int) -> int:
    """With those that are not counted."""
    return rounds + 1


def hidden_rows(
    *, rounds: int, shape: TrainingShape | None = None, advance: Advance = lambda doing: None
) -> list[SpreadRow]:
    shape = shape or TrainingShape()
    with _cores() as (own, other), _expert(shape, other) as (address, control), _pinned(own), torch_threads(1):
        peer = Peer(lambda: SocketLink(NAME, address, name="router", max_bytes=MAX_BYTES, timeout_s=ANSWER_S))
        roster = Roster(Placement(1, ((NAME,),), shape.num_experts), {NAME: peer})
        router = Router(shape.source(), roster, timeout_s=ANSWER_S)
        try:
            timing = _Timing(shape, router, control)
            timed = []
            for number in range(num_rounds(rounds)):
                advance(f"updates beside forwards, round {number}")
                timed.append(timing.round())
            return rows_of(timed[1:])
        finally:
            router.close()


def rows_of(timed: Sequence[Timed]) -> list[SpreadRow]:
    """Medians over the rounds; ratios are of rounds too."""
    hidden = [100 * t.hidden for t in timed]
    share = median(100 * t.update_s / t.step_s for t in timed)
    step_ms = median(1e3 * t.step_s for t in timed)
    beside_ms = [1e3 * t.beside_s for t in timed]
    update_ms = [1e3 * t.update_s for t in timed]
    faster = median(t.step_s / t.beside_s for t in timed)
    return [
        _row("hidden_optimizer_share", hidden, "%", "updates' share of a step with s0", share, 0.01 * median(hidden)),
        _row("step_s1", beside_ms, "ms", "s0", step_ms, faster),
        _row("update_s0", update_ms, "ms", "a step with s0", step_ms, 100 / share),
    ]


def _row(case: str, values: Sequence[float], unit: str, peer: str, peer_value: float, ratio: float) -> SpreadRow:
    return SpreadRow(case, median(values), unit, peer, peer_value, ratio, len(values), *_quartiles(values))


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


class _Timing:
    def __init__(self, shape: TrainingShape, router: Router, control: Connection) -> None:
        self._shape, self._control = shape, control
        self._training = Training(router, shape)

    def round(self) -> Timed:
        step_s, update_s = self._seconds(0)
        beside_s, _ = self._seconds(1)
        return Timed(step_s, beside_s, update_s)

    def _seconds(self, staleness: int) -> tuple[float, float]:
        """-> of a step, and of an update."""
        self._training.begin(staleness)
        self._steps(self._shape.warmups)
        busy_s, started = self._busy_s(), time.perf_counter()
        self._steps(self._shape.steps)
        took_s = time.perf_counter() - started
        return took_s / self._shape.steps, (self._busy_s() - busy_s) / self._shape.steps

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self._training.step()

    def _busy_s(self) -> float:
        self._control.send("busy")
        return float(_heard(self._control, ANSWER_S))


# --- Processes and cores -----------------------------------------------------------------------------------------


@contextmanager
def _cores() -> Iterator[tuple[set[int], set[int]]]:
    """One for this process and one for the other, where there are two."""
    here = sorted(os.sched_getaffinity(0))
    yield ({here[0]}, {here[1]}) if len(here) > 1 else (set(here), set(here))


@contextmanager
def _pinned(cores: set[int]) -> Iterator[None]:
    """This thread, and those that it starts inside."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _heard(control: Connection, timeout_s: float) -> Any:
    if not control.poll(timeout_s):
        raise StartupError(f"the expert actor has not answered within {timeout_s:.0f} s")
    return control.recv()


@contextmanager
def _expert(shape: TrainingShape, cores: set[int]) -> Iterator[tuple[Any, Connection]]:
    """-> where it listens, and where to ask it for the time that its updates took."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, shape, cores), daemon=True)
    process.start()
    there.close()
    try:
        yield _heard(here, START_S), here
    finally:
        here.close()  # ends it
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(control: Connection, shape: TrainingShape, cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    host = ExpertHost(NAME, shape.source(), [0], group_size=shape.num_experts, timeout_s=ANSWER_S)
    server = SocketServer(NAME, host.handle, max_bytes=MAX_BYTES, idle=host.idle, ready=host.ready, keep_s=ANSWER_S)
    server.start()
    try:
        control.send(server.address)
        while True:
            control.recv()
            control.send(host.updates.busy_s)
    except (EOFError, OSError):  # the bench is over
        server.stop()
        host.close()
        os._exit(0)  # libraries' threads may keep an interpreter that ends by itself
