"""Several routers over a `LocalCluster`, which may be killed at any message. No Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from actors.errors import PeerLost
from actors.router.replica import Replica
from actors.router.roster import Peer
from actors.router.router import Router
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.transport.message import Message
from actors.transport.socket import SocketLink, SocketServer
from actors.trunk.model import ModelSource
from tests.local import MAX_BYTES, LocalCluster, _Mortal, cluster

PIECE_BYTES = 1 << 14
"""So small that the trunk's gradients and state take several messages."""
WrapReplica = Callable[[str, Link], Link]


class Killed(Exception):
    """The process that runs this code dies here: nothing above cleans up."""


@dataclass
class Seat:
    """One router, as its process."""

    name: str
    replica: Replica
    server: SocketServer | None = None
    dead: bool = False

    @property
    def router(self) -> Router:
        return self.replica.router

    def kill(self) -> None:
        self.dead = True
        if self.server is not None:
            self.server.stop()
        links, work = self.router.state.training.links, self.replica._work
        links.cut(list(links))
        if work is not None and work._thread is not threading.current_thread():
            work.end()  # it may be in the middle of the very links that are closed now
        self.router.close()


@dataclass
class Routers:
    local: LocalCluster
    wrap: WrapReplica = lambda name, link: link
    seats: dict[str, Seat] = field(default_factory=dict)
    leader: str = "router-0"
    term: int = 0

    def __post_init__(self) -> None:
        first = self.local.router
        self.seats["router-0"] = Seat("router-0", Replica("router-0", first, self._find_peer, leads=True))

    @property
    def router(self) -> Router:
        """That leads."""
        return self.seats[self.leader].router

    @property
    def living(self) -> dict[str, Router]:
        left_out = self.router.replicas.lost
        return {n: seat.router for n, seat in self.seats.items() if not seat.dead and n not in left_out}

    def add(self) -> str:
        """Another router, which has joined."""
        name = f"router-{len(self.seats)}"
        local = self.local
        router = Router(
            local.source,
            None,
            gate=local.gate,
            timeout_s=local.timeout_s,
            find_roster=local.without,
            piece_bytes=PIECE_BYTES,
            in_flight=local.in_flight,
        )
        seat = Seat(name, Replica(name, router, self._find_peer))
        if local.links == "socket":
            seat.server = SocketServer(name, seat.replica.handle, max_bytes=MAX_BYTES)
            seat.server.start()
        self.seats[name] = seat
        self.router.join(name, self.open(name))
        return name

    def open(self, name: str) -> Link:
        seat = self.seats[name]
        if seat.dead:
            raise PeerLost("killed by the test", peer=name)
        if seat.server is None:
            return self.wrap(name, _Mortal(seat, seat.replica.handle))  # type: ignore[arg-type]
        timeout_s = self.local.timeout_s
        link = SocketLink(name, seat.server.address, name="leader", max_bytes=MAX_BYTES, timeout_s=timeout_s)
        return self.wrap(name, link)

    def promote(self, name: str) -> Any:
        """What a coordinator does after the leader's death."""
        self.term += 1
        others = {n: (lambda n=n: self.open(n)) for n in self.seats if n != name and not self.seats[n].dead}
        promotion = self.seats[name].replica.promote(others, self.term)
        self.leader = name
        self.local.router = self.router
        return promotion

    def agree(self) -> None:
        """Bit for bit: weights, moments, gate biases, version and run of every router."""
        first, *others = self.living.values()
        state = {**first.learner.state(), **first.learner.moments()}
        for other in others:
            assert (other.version, other.course) == (first.version, first.course)
            theirs = {**other.learner.state(), **other.learner.moments()}
            assert set(theirs) == set(state)
            assert all(torch.equal(theirs[name], tensor) for name, tensor in state.items())

    def close(self) -> None:
        for seat in self.seats.values():
            if not seat.dead:
                seat.kill()

    def _find_peer(self, name: str, contact: Mapping[str, Any]) -> Peer:
        member = self.local.members[name]
        return Peer(member.open, member.exchange_address)


class DeadlyLink(FaultyLink):
    """At the nth message of a kind `strike` is called, before it is sent or after."""

    def __init__(self, inner: Link, op: str, nth: int, strike: Callable[[], None], *, after: bool = False) -> None:
        super().__init__(inner, [Fault(op, nth, "delay")])
        self._strike, self._after, self._op, self._nth, self._count = strike, after, op, nth, 0

    def _send(self, question: Message) -> None:
        self._count += question.op == self._op
        strikes = question.op == self._op and self._count == self._nth
        if strikes and not self._after:
            self._strike()
        super()._send(question)
        if strikes and self._after:
            self._strike()


@contextmanager
def routers_of(
    source: ModelSource, count: int, *, wrap_replica: WrapReplica = lambda name, link: link, **changes: Any
) -> Iterator[Routers]:
    """So many routers over two expert hosts; `changes` as of `tests.local.cluster`."""
    with cluster(source, 2, piece_bytes=PIECE_BYTES, **changes) as local:
        group = Routers(local, wrap_replica)
        try:
            for _ in range(1, count):
                group.add()
            yield group
        finally:
            group.close()
