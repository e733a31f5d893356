"""Routers with their expert hosts, in this process or in others, without Ray: what benchmarks of decoding measure."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from actors.errors import MoeClusterError
from actors.expert.host import ExpertHost
from actors.router.roster import Peer, Roster
from actors.router.router import Router
from actors.transport.local import LocalLink
from actors.transport.payload.contract import AUTO, PayloadSettings
from actors.transport.socket import SocketLink, SocketServer
from actors.trunk.model import skeleton
from actors.trunk.source import ModelSource
from actors.values import Address, Placement

TIMEOUT_S = 120.0


@contextmanager
def in_process(source: ModelSource, max_sessions: int, device: str, **more: Any) -> Iterator[Router]:
    """A router and one expert host on one device."""
    host = ExpertHost("expert-0", source, [0], group_size=skeleton(source).num_experts, device=device)
    peers = {host.name: Peer(lambda: LocalLink(host.name, host.handle))}
    placement = Placement(1, ((host.name,),), skeleton(source).num_experts)
    roster = Roster(placement, peers)
    router = Router(
        source, roster, device=device, max_sessions=max_sessions, decode_batch=max_sessions, timeout_s=TIMEOUT_S, **more
    )
    try:
        yield router
    finally:
        router.close()
        host.close()


@contextmanager
def apart(source: ModelSource, max_sessions: int, device: str) -> Iterator[Router]:
    """A router on the first GPU, and all experts in another process, on another `device`."""
    num_experts = skeleton(source).num_experts
    with _host_process(source, "expert-0", [0], num_experts, device) as address:
        peers = {"expert-0": Peer(_opener("expert-0", address, PayloadSettings("nccl", "cuda:0")))}
        roster = Roster(Placement(1, (("expert-0",),), num_experts), peers)
        router = Router(
            source,
            roster,
            device="cuda:0",
            max_sessions=max_sessions,
            decode_batch=max_sessions,
            timeout_s=TIMEOUT_S,
        )
        try:
            yield router
        finally:
            router.close()


@contextmanager
def beside_hosts(source: ModelSource) -> Iterator[Roster]:
    """Half of the experts in each of two other processes; the cores that these leave are for a router's threads."""
    names = ("expert-0", "expert-1")
    placement = Placement(1, tuple((name,) for name in names), skeleton(source).num_experts // len(names))
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        peers = {
            name: Peer(_opener(name, stack.enter_context(_host_process(source, name, [i], placement.group_size))))
            for i, name in enumerate(names)
        }
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - len(names)))
        yield Roster(placement, peers)


def _opener(name: str, address: Address, payload: PayloadSettings = AUTO) -> Callable[[], SocketLink]:
    return lambda: SocketLink(name, address, name="bench", max_bytes=1 << 28, timeout_s=TIMEOUT_S, payload=payload)


@contextmanager
def _host_process(
    source: ModelSource, name: str, groups: Sequence[int], group_size: int, device: str = "cpu"
) -> Iterator[Address]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(source, name, groups, group_size, device, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(TIMEOUT_S):
            raise MoeClusterError(f"{name} did not start within {TIMEOUT_S:.0f} s")
        yield ours.recv()
    finally:
        ours.close()
        process.join(5.0)
        if process.is_alive():
            process.kill()


def _serve(source: ModelSource, name: str, groups: Sequence[int], group_size: int, device: str, parent: Any) -> None:
    """An expert host's process, until its parent closes the pipe or ends."""
    payload = AUTO
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        payload = PayloadSettings("nccl", device)
    host = ExpertHost(name, source, groups, group_size=group_size, device=device)
    server = SocketServer(name, host.handle, max_bytes=1 << 28, idle=host.idle, ready=host.ready, payload=payload)
    server.start()
    parent.send(server.address)
    ended = threading.Event()
    while not ended.is_set():
        try:
            if parent.poll(1.0):
                parent.recv()
        except (EOFError, OSError):
            ended.set()
    server.stop()
    host.close()
