"""What a slow expert actor costs.

`straggler_4x_s4`: training while the updates of one of two actors take 4 times as long, experts up to 4 steps behind;
the peer is the same actor with experts that are never behind (`s0`). `retained_*`: the same rate as a share of that
without a slow actor, without staleness; `_copy`: every group on both actors. `retained_pause`: over a window that
begins with one pause of an actor, in the first round alone.

Everything runs in this process: a router, two expert actors with their servers and update threads, sockets between
them. Each time is of steps in a steady state: some are made before, and what is pending at the end was so at the begin.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from actors.expert.host import ExpertHost
from actors.expert.updates import Brake
from actors.router.roster import Peer, Roster
from actors.router.router import Router
from actors.transport.contract import Link
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address, Placement
from cluster.bench.result import Advance, Row
from cluster.bench.steady import Training, TrainingShape, torch_threads

FACTORS = (2.0, 4.0)
STALENESS = (0, 1, 4)
COPIES = ("", "_copy")
PAUSE_ROUNDS = 1
NUM_ACTORS = 2
TIMEOUT_S = 60.0
MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Shape(TrainingShape):
    """With more warm-up steps than any bound that is tried."""

    width: int = 1024
    num_layers: int = 2
    sequence_length: int = 128
    warmups: int = 5
    steps: int = 8
    pause_s: float = 5.0
    window_s: float = 8.0
    """That the rate under a pause is taken over."""


def ways(copy: str) -> Iterator[tuple[float, int]]:
    """(factor, staleness). What s = 2 saves is asked without copies; the slowest actor's rates, which differ most from
    round to round, are taken twice there."""
    for factor in (1.0, *FACTORS):
        for staleness in STALENESS:
            yield factor, staleness
    if not copy:
        slowest, most = FACTORS[-1], STALENESS[-1]
        yield from ((slowest, 2), (slowest, 0), (slowest, most))


def num_runs(rounds: int) -> int:
    """How often `straggler_rows` says what is being done."""
    return sum(rounds * len(list(ways(copy))) + min(rounds, PAUSE_ROUNDS) * len(STALENESS) for copy in COPIES)


def straggler_rows(*, rounds: int, shape: Shape | None = None, advance: Advance = lambda doing: None) -> list[Row]:
    """21 ways to train a round, and in the first 8 s for each of those with a pause."""
    shape = shape or Shape()
    shape = replace(shape, sequences=max(1, shape.sequences // 2))  # updates weigh more: they are what is slow
    rates: dict[str, list[float]] = {}
    with torch_threads(1), _fleet(shape, copies=False) as plain, _fleet(shape, copies=True) as copied:
        for number in range(rounds):
            for fleet, copy in zip((plain, copied), COPIES, strict=True):
                found: dict[str, list[float]] = {}
                for factor, staleness in ways(copy):
                    advance(f"stragglers{copy}, round {number}")
                    rate = fleet.rate(staleness, Brake(factor=factor))
                    found.setdefault(f"{factor:.0f}x_s{staleness}{copy}", []).append(rate)
                for name, several in found.items():
                    rates.setdefault(name, []).append(statistics.mean(several))
                for staleness in STALENESS if number < PAUSE_ROUNDS else ():
                    advance(f"a pause{copy}, s = {staleness}")
                    rates.setdefault(f"pause_s{staleness}{copy}", []).append(fleet.rate_with_a_pause(staleness))
    return rows_of(rates)


def rows_of(rates: Mapping[str, Sequence[float]]) -> list[Row]:
    """`rates`: tokens a second of each round, by way."""
    whole = rates["1x_s0"]
    stragglers = [
        _rate_row(f"straggler_{name}", found, "s0", rates[f"{name.partition('_')[0]}_s0"])
        for name, found in rates.items()
        if name.startswith(tuple(f"{factor:.0f}x_" for factor in FACTORS)) and not name.endswith(("_s0", "_copy"))
    ]
    retained = [(name, found) for name, found in rates.items() if name != "1x_s0"]
    return stragglers + [_rate_row(f"retained_{name}", found, "nobody slow, s0", whole) for name, found in retained]


def _rate_row(case: str, ours: Sequence[float], peer: str, theirs: Sequence[float]) -> Row:
    """Of the rounds that both have."""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=False))
    return Row(case, statistics.median(ours), "tokens/s", peer, statistics.median(theirs), ratio, len(ours))


class Fleet:
    """A router and its expert actors; the last one is slowed."""

    def __init__(self, shape: Shape, hosts: Sequence[ExpertHost], router: Router) -> None:
        self._shape, self._hosts = shape, hosts
        self._training = Training(router, shape)
        self.max_staleness = 0
        """Of all steps so far."""

    def rate(self, staleness: int, brake: Brake) -> float:
        """Tokens a second."""
        self._begin(staleness, brake)
        return self._shape.tokens / self._seconds_a_step()

    def rate_with_a_pause(self, staleness: int) -> float:
        """Tokens a second over a window that begins with the pause."""
        self._begin(staleness, Brake())
        self._hosts[-1].updates.brake = Brake(pause_s=self._shape.pause_s)
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < self._shape.window_s:
            self._step()
            done += 1
        return done * self._shape.tokens / (time.perf_counter() - started)

    def _begin(self, staleness: int, brake: Brake) -> None:
        """What another run has left to be done is done then."""
        for host in self._hosts:
            host.updates.brake = Brake()
        self._training.begin(staleness)
        self._hosts[-1].updates.brake = brake
        for _ in range(self._shape.warmups):
            self._step()

    def _seconds_a_step(self) -> float:
        started = time.perf_counter()
        for _ in range(self._shape.steps):
            self._step()
        return (time.perf_counter() - started) / self._shape.steps

    def _step(self) -> None:
        self.max_staleness = max(self.max_staleness, self._training.step().staleness_max)


@contextmanager
def _fleet(shape: Shape, *, copies: bool) -> Iterator[Fleet]:
    source = shape.source()
    names = [f"expert-{i}" for i in range(NUM_ACTORS)]
    group_size = shape.num_experts // NUM_ACTORS
    holders = [[name, *(other for other in names if other != name)] if copies else [name] for name in names]
    placement = Placement(1, tuple(tuple(each) for each in holders), group_size)

    def open_exchange(name: str, address: Address) -> Link:
        return SocketLink(name, address, name="peer", max_bytes=MAX_BYTES, timeout_s=TIMEOUT_S)

    hosts = [
        ExpertHost(
            name,
            source,
            placement.held_by(name),
            group_size=group_size,
            open_peer=open_exchange,
            timeout_s=TIMEOUT_S,
        )
        for name in names
    ]
    servers = {
        host.name: SocketServer(
            host.name, host.handle, max_bytes=MAX_BYTES, idle=host.idle, ready=host.ready, keep_s=TIMEOUT_S
        )
        for host in hosts
    }
    exchanges = {host.name: SocketServer(host.name, host.exchange.handle, max_bytes=MAX_BYTES) for host in hosts}
    for server in (*servers.values(), *exchanges.values()):
        server.start()

    def peer(name: str) -> Peer:
        address = servers[name].address
        return Peer(
            lambda: SocketLink(name, address, name="router", max_bytes=MAX_BYTES, timeout_s=TIMEOUT_S),
            exchanges[name].address,
        )

    router = Router(source, Roster(placement, {name: peer(name) for name in names}), timeout_s=TIMEOUT_S)
    try:
        yield Fleet(shape, hosts, router)
    finally:
        router.close()
        for host in hosts:
            host.close()
        for server in (*servers.values(), *exchanges.values()):
            server.stop()
