"""A whole cluster in this process: hosts and a router over any kind of link. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from actors.expert import ExpertHost
from actors.moe.settings import GateSettings
from actors.router import Router
from actors.transport.contract import Link
from actors.transport.local import LocalLink
from actors.transport.socket import SocketLink, SocketServer
from actors.trunk.model import ModelSource, skeleton
from cluster.placement.placement import ActorSlot, spread

LinkWrap = Callable[[int, Link], Link]


@dataclass
class LocalCluster:
    router: Router
    hosts: list[ExpertHost]


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
) -> Iterator[LocalCluster]:
    """`wrap` may put a faulty link around each link as it is opened."""
    slots = [ActorSlot(f"expert-{i}", f"node-{i}") for i in range(num_actors)]
    placement = spread(skeleton(source).num_experts, group_size, slots)
    hosts = [ExpertHost(s.id, source, placement.groups_of(s.id), group_size=group_size, device=device) for s in slots]
    servers = [_serve(host) for host in hosts] if links == "socket" else []

    def opener(i: int) -> Callable[[], Link]:
        def open_link() -> Link:
            if links == "local":
                return wrap(i, LocalLink(hosts[i].name, hosts[i].handle))
            link = SocketLink(hosts[i].name, servers[i].address, name="router", max_bytes=1 << 28, timeout_s=timeout_s)
            return wrap(i, link)

        return open_link

    router = Router(
        source,
        [opener(i) for i in range(num_actors)],
        [host.experts for host in hosts],
        gate=gate,
        device=device,
        timeout_s=timeout_s,
        max_step_retries=max_step_retries,
    )
    try:
        yield LocalCluster(router, hosts)
    finally:
        router.close()
        for server in servers:
            server.stop()


def _serve(host: ExpertHost) -> SocketServer:
    server = SocketServer(host.name, host.handle, max_bytes=1 << 28, idle=host.idle)
    server.start()
    return server
