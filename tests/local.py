"""A whole cluster in this process: hosts and a router over any kind of link. No Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

from actors.errors import PeerLost
from actors.expert.host import ExpertHost
from actors.moe.cache import CacheSettings
from actors.moe.fp8 import Payload
from actors.moe.settings import GateSettings
from actors.relay.relay import Relay
from actors.router.pieces import PIECE_BYTES
from actors.router.roster import Peer, Relaying, Roster
from actors.router.router import Router
from actors.transport.contract import Link
from actors.transport.local import LocalLink
from actors.transport.meter import Meter
from actors.transport.socket import SocketLink, SocketServer
from actors.trunk.model import ModelSource, skeleton
from actors.values import Address, Grown, Growth, Placement
from cluster.placement.placement import ActorSlot, spread

P = ParamSpec("P")
T = TypeVar("T")
LinkWrap = Callable[[int, Link], Link]
MAX_BYTES = 1 << 28


class Member:
    """One expert host with its servers."""

    def __init__(self, number: int, source: ModelSource, groups: Sequence[int], cluster: LocalCluster) -> None:
        self.name, self.number = f"expert-{number}", number
        self._cluster = cluster
        self.host = ExpertHost(
            self.name,
            source,
            groups,
            group_size=cluster.group_size,
            device=cluster.device,
            open_peer=cluster.open_exchange,
            timeout_s=cluster.timeout_s,
            cache=cluster.cache,
        )
        self.servers: list[SocketServer] = []
        self._locks: list[threading.Lock] = []
        self.dead = False
        if cluster.links == "socket":
            self.servers = [
                SocketServer(
                    self.name,
                    self._unless_frozen(self.host.handle),
                    max_bytes=MAX_BYTES,
                    idle=self.host.idle,
                    ready=self.host.ready,
                    keep_s=cluster.timeout_s,
                ),
                SocketServer(self.name, self._unless_frozen(self.host.exchange.handle), max_bytes=MAX_BYTES),
            ]
            for server in self.servers:
                server.start()
        self.relay: Relay | None = None
        if cluster.nodes:
            self.relay = Relay(self.name, cluster.open_neighbour, max_bytes=MAX_BYTES, timeout_s=cluster.timeout_s)
            self.relay._bundle = self._unless_frozen(self.relay._bundle)  # type: ignore[method-assign]
            self.relay.start()

    @property
    def exchange_address(self) -> Address:
        return self.servers[1].address if self.servers else Address("", self.name, "")

    def open(self) -> Link:
        if self.dead:
            raise PeerLost("killed by the test", peer=self.name)
        if not self.servers:
            return self._cluster.wrap(self.number, _Mortal(self, self.host.handle))
        return self._cluster.wrap(self.number, self._open(self.servers[0].address))

    def _open(self, address: Address) -> Link:
        """From another host, if there are nodes."""
        address = replace(address, host_id="another host") if self._cluster.nodes else address
        link = SocketLink(self.name, address, name="router", max_bytes=MAX_BYTES, timeout_s=self._cluster.timeout_s)
        return self._cluster.meter.watch(link)

    def open_relay(self) -> Link:
        assert self.relay is not None
        if self.dead:
            raise PeerLost("killed by the test", peer=self.name)
        self._cluster.relayed_over.append(self.name)
        return self._open(self.relay.address)

    @property
    def relaying(self) -> Relaying | None:
        if self.relay is None or not self._cluster.relays:
            return None
        node = self._cluster.nodes[self.number]
        return Relaying(node, self.servers[0].address, self.open_relay, self._cluster.worth_bytes)

    def open_exchange(self) -> Link:
        if self.dead:
            raise PeerLost("killed by the test", peer=self.name)
        if not self.servers:
            return _Mortal(self, self.host.exchange.handle)
        return SocketLink(
            self.name, self.servers[1].address, name="peer", max_bytes=MAX_BYTES, timeout_s=self._cluster.timeout_s
        )

    def freeze(self) -> None:
        """As a process that is stopped: connections are taken, and nothing is answered."""
        for lock in self._locks:
            lock.acquire()

    def thaw(self) -> None:
        for lock in self._locks:
            lock.release()

    def _unless_frozen(self, handler: Callable[P, T]) -> Callable[P, T]:
        lock = threading.Lock()
        self._locks.append(lock)

        def handle(*args: P.args, **kwargs: P.kwargs) -> T:
            with lock:
                return handler(*args, **kwargs)

        return handle

    def kill(self) -> None:
        """As a process that dies: nothing of it answers any more."""
        self.dead = True
        for server in self.servers:
            server.stop()
        if self.relay is not None:
            self.relay.stop()


class _Mortal(LocalLink):
    def __init__(self, member: Member, handler: Callable[..., object]) -> None:
        super().__init__(member.name, handler)  # type: ignore[arg-type]
        self._member = member

    def _send(self, question: object) -> None:
        if self._member.dead:
            self.close()
            raise PeerLost("killed by the test", peer=self.peer)
        super()._send(question)  # type: ignore[arg-type]


@dataclass
class LocalCluster:
    source: ModelSource
    group_size: int
    links: str
    wrap: LinkWrap
    timeout_s: float
    device: str
    cache: CacheSettings | None = None
    gate: GateSettings | None = None
    in_flight: int = 1
    nodes: str = ""
    """A letter for the node of each actor, all of them other hosts than the router's; empty: all are on its own."""
    relays: bool = True
    """Whether tokens go to these nodes over relays."""
    worth_bytes: int = 0
    relayed_over: list[str] = field(default_factory=list)
    """Actors to whose relay a link was opened, in order."""
    meter: Meter = field(default_factory=Meter)
    """Of the router's links to other hosts."""
    members: dict[str, Member] = field(default_factory=dict)
    router: Router = field(init=False)
    placement: Placement = field(init=False)

    @property
    def hosts(self) -> list[ExpertHost]:
        return [member.host for member in self.members.values()]

    def add(self, groups: Sequence[int] = ()) -> str:
        """Another expert actor, which holds these groups as they were at the start."""
        number = len(self.members)
        member = Member(number, self.source, groups, self)
        self.members[member.name] = member
        return member.name

    def open_exchange(self, name: str, address: Address) -> Link:
        return self.members[name].open_exchange()

    def open_neighbour(self, name: str, address: Address) -> Link:
        return SocketLink(name, address, name="relay", max_bytes=MAX_BYTES, timeout_s=self.timeout_s)

    def roster(self, placement: Placement) -> Roster:
        members = {name: self.members[name] for name in placement.actors}
        peers = {n: Peer(m.open, m.exchange_address, relaying=m.relaying) for n, m in members.items()}
        return Roster(placement, peers)

    def without(self, gone: Sequence[str]) -> Roster:
        """What a coordinator answers when actors are gone."""
        self.placement = self.placement.without(gone)
        return self.roster(self.placement)

    def adopt(self, *holders: str) -> float:
        """`holders[g]`: actor numbers that hold group g, as digits, its owner first. What is missing there arrives."""
        held = tuple(tuple(f"expert-{n}" for n in numbers) for numbers in holders)
        for group, names in enumerate(held):
            for name in names:
                if group not in self.members[name].host.groups:
                    self.arrive(group, self.placement.owner(group), name)
        placement = Placement(self.placement.epoch + 1, held, self.group_size)
        waited = self.router.placing.adopt(self.roster(placement))
        self.placement = placement
        return waited

    def grow(self, growth: Growth) -> Grown:
        """What a coordinator does with a growth; who is added later is told of it."""
        grown = self.router.grow(growth)
        self.placement = grown.placement
        self.source = replace(self.source, num_experts=growth.num_experts)
        return grown

    def cut(self, name: str) -> None:
        """What a coordinator does with an actor that does not answer."""
        self.router.cut([name])
        for other in self.members.values():
            if other.name != name:
                other.host.exchange.cut([name])

    def arrive(self, group: int, source: str, target: str) -> int:
        giver, taker = self.members[source], self.members[target]
        return taker.host.placing.arrive(group, source, giver.exchange_address, taker.exchange_address, self.timeout_s)


@contextmanager
def cluster(
    source: ModelSource,
    num_actors: int = 2,
    *,
    group_size: int = 2,
    links: str = "local",
    wrap: LinkWrap = lambda actor, link: link,
    timeout_s: float = 20.0,
    max_step_retries: int = 3,
    gate: GateSettings | None = None,
    device: str = "cpu",
    redundancy: int = 1,
    heals: bool = False,
    cache: CacheSettings | None = None,
    piece_bytes: int = PIECE_BYTES,
    payload: Payload = "trunk",
    decode_batch: int = 0,
    max_sessions: int = 16,
    captured: str = "auto",
    in_flight: int = 1,
    prompt_chunk: int | None = None,
    nodes: str = "",
    relays: bool = True,
    worth_bytes: int = 0,
) -> Iterator[LocalCluster]:
    """`wrap` may put a faulty link around each link as it is opened. With `heals` copies take over from the dead.
    `nodes`, `relays`, `worth_bytes`: as of `LocalCluster`."""
    slots = [ActorSlot(f"expert-{i}", f"node-{nodes[i] if nodes else i}") for i in range(num_actors)]
    placement = spread(skeleton(source).num_experts, group_size, slots, redundancy)
    local = LocalCluster(source, group_size, links, wrap, timeout_s, device, cache, gate, in_flight)
    local.nodes, local.relays, local.worth_bytes = nodes, relays, worth_bytes
    local.placement = placement
    for slot in slots:
        local.add(placement.held_by(slot.id))
    local.router = Router(
        source,
        local.roster(placement),
        gate=gate,
        device=device,
        timeout_s=timeout_s,
        max_step_retries=max_step_retries,
        find_roster=local.without if heals else None,
        piece_bytes=piece_bytes,
        payload=payload,
        decode_batch=decode_batch,
        max_sessions=max_sessions,
        captured=captured,
        in_flight=in_flight,
        prompt_chunk=prompt_chunk,
    )
    try:
        yield local
    finally:
        local.router.close()
        for member in local.members.values():
            member.host.close()
            if not member.dead:
                member.kill()
