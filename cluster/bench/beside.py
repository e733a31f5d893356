"""`hidden_optimizer_share`: how much of the updates' time no step waits for, when experts are one step behind.

    hidden = 1 - (seconds of a step with s = 1 - seconds of a step whose commit updates no expert)
               / seconds of an update with s = 0

The peer is the same of s = 0, where an update is made between two steps: what the router computes before it asks the
experts for the first layer, and its own update, are beside it then too. With s = 1 it is made beside all that the
router computes, and no more can be hidden than it does: the shape has a vocabulary for which it computes longer than an
update and the experts' gradients take.

A router, which is this process, and an expert actor in a process of its own, over sockets, each with one thread of
torch and, where there are two, a core of its own, as actors of a cluster have. An update is the optimizer work for all
experts.

All three are timed in turn, a few steps each in a steady state (what is pending at their end was so at their begin),
and a round has the median of the steps of each. Others on the cores lengthen steps by more than an update takes, so
what is compared is steps of one round: medians over the rounds of differences, divided once, not each round's. Between
`low` and `high` are 9 of 10 results of rounds drawn from these again (Efron 1979, the bootstrap).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch

from actors.expert.holdings import Holdings
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


NUM_DRAWS = 1000
Estimate = Callable[[Sequence["Timed"]], float]


@dataclass(frozen=True)
class Timed:
    """Of one round, seconds a step."""

    step_s: float
    """With s = 0."""
    beside_s: float
    bare_s: float
    """Without updates."""
    update_s: float
    """With s = 0, as the expert actor times it."""


@dataclass(frozen=True)
class SpreadRow(Row):
    low: float
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
                timed.append(timing.round(number))
            return rows_of(timed[1:])
        finally:
            router.close()


def rows_of(timed: Sequence[Timed]) -> list[SpreadRow]:
    """Values, peers and ratios are made of medians over the rounds."""
    step_ms = 1e3 * median(t.step_s for t in timed)

    def row(case: str, value: Estimate, unit: str, peer: str, peer_value: float, ratio: float) -> SpreadRow:
        return SpreadRow(case, value(timed), unit, peer, peer_value, ratio, len(timed), *_spread(value, timed))

    value, without = _hidden(timed), _hidden_without(timed)
    ratio = value / without if without else math.nan
    return [
        row("hidden_optimizer_share", _hidden, "%", "s0", without, ratio),
        row("step_s1", _beside_ms, "ms", "s0", step_ms, median(t.step_s / t.beside_s for t in timed)),
        row("step_without_updates", _bare_ms, "ms", "s0", step_ms, median(t.step_s / t.bare_s for t in timed)),
        row("update_s0", _update_ms, "ms", "a step with s0", step_ms, median(t.step_s / t.update_s for t in timed)),
    ]


def _hidden(timed: Sequence[Timed]) -> float:
    """Percent of an update that is not waited for with s = 1."""
    return _not_waited_for(median(t.beside_s - t.bare_s for t in timed), timed)


def _hidden_without(timed: Sequence[Timed]) -> float:
    return _not_waited_for(median(t.step_s - t.bare_s for t in timed), timed)


def _not_waited_for(waited_s: float, timed: Sequence[Timed]) -> float:
    return 100 * (1 - waited_s / median(t.update_s for t in timed))


def _beside_ms(timed: Sequence[Timed]) -> float:
    return 1e3 * median(t.beside_s for t in timed)


def _bare_ms(timed: Sequence[Timed]) -> float:
    return 1e3 * median(t.bare_s for t in timed)


def _update_ms(timed: Sequence[Timed]) -> float:
    return 1e3 * median(t.update_s for t in timed)


def _spread(estimate: Estimate, timed: Sequence[Timed]) -> tuple[float, float]:
    """Between which 9 of 10 estimates lie, of as many rounds drawn from these, again and again."""
    draw = random.Random(0)
    found = sorted(estimate(draw.choices(timed, k=len(timed))) for _ in range(NUM_DRAWS))
    return found[NUM_DRAWS // 20], found[-NUM_DRAWS // 20]


class _Timing:
    def __init__(self, shape: TrainingShape, router: Router, control: Connection) -> None:
        self._shape, self._control = shape, control
        self._training = Training(router, shape)

    def round(self, number: int) -> Timed:
        """Each goes first as often as the others."""
        ways: dict[str, Callable[[], tuple[float, float]]] = {
            "step": lambda: self._seconds(0),
            "beside": lambda: self._seconds(1),
            "bare": lambda: self._seconds(0, updates=False),
        }
        names = list(ways)
        order = names[number % len(names) :] + names[: number % len(names)]
        found = {name: ways[name]() for name in order}
        return Timed(found["step"][0], found["beside"][0], found["bare"][0], found["step"][1])

    def _seconds(self, staleness: int, *, updates: bool = True) -> tuple[float, float]:
        """-> median of a step, mean of an update."""
        self._training.begin(staleness)
        self._ask("updates", updates)
        try:
            self._steps(self._shape.warmups)
            busy_s = self._ask("busy")
            steps_s = self._steps(self._shape.steps)
            return median(steps_s), (self._ask("busy") - busy_s) / self._shape.steps
        finally:
            self._ask("updates", True)

    def _steps(self, count: int) -> list[float]:
        """Seconds of each."""
        times = [time.perf_counter()]
        for _ in range(count):
            self._training.step()
            times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]

    def _ask(self, *question: object) -> float:
        self._control.send(question)
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


class _Switch:
    """Of an expert actor's updates: without them a commit leaves everything as it is, gradients too."""

    def __init__(self, holdings: Holdings) -> None:
        self.is_on = True
        self._update = holdings.update
        holdings.update = self._maybe  # type: ignore[method-assign]

    def _maybe(self, lr: float, scale: float) -> None:
        if self.is_on:
            self._update(lr, scale)


def _serve(control: Connection, shape: TrainingShape, cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    host = ExpertHost(NAME, shape.source(), [0], group_size=shape.num_experts, timeout_s=ANSWER_S)
    server = SocketServer(NAME, host.handle, max_bytes=MAX_BYTES, idle=host.idle, ready=host.ready, keep_s=ANSWER_S)
    server.start()
    switch = _Switch(host.holdings)
    try:
        control.send(server.address)
        while True:
            match control.recv():
                case ("updates", is_on):
                    switch.is_on = is_on
            control.send(host.updates.busy_s)
    except (EOFError, OSError):  # the bench is over
        server.stop()
        host.close()
        os._exit(0)  # libraries' threads may keep an interpreter that ends by itself
