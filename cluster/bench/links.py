"""What CURVE costs on a tcp:// link: a message to a process of this host and back, against the same without keys.

What a relay saves: `cluster.bench.relay`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from actors.transport.curve import LinkKeys
from actors.transport.message import Message
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address
from cluster.bench.relay import relay_rows
from cluster.bench.result import Report, interleaved, time_row
from cluster.errors import StartupError

CASES = {"small_message": (1 << 10, 100), "4_mb_message": (4 << 20, 10)}
"""(bytes of the tensor, calls a round)"""
MAX_BYTES = 16 << 20
START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0


def bench_links(*, rounds: int) -> Report:
    keys = LinkKeys.generate()
    rows = []
    with (
        _echoing((keys, None)) as addresses,
        _opened(addresses[0], keys) as curve,
        _opened(addresses[1], None) as plain,
    ):
        for case, (size_bytes, calls) in CASES.items():
            question = Message("echo", {}, (torch.zeros(size_bytes, dtype=torch.uint8),))
            links = {"curve": curve, "plain": plain}
            seconds = interleaved({name: _calls(link, question, calls) for name, link in links.items()}, rounds, 2)
            each = {name: [s / calls for s in values] for name, values in seconds.items()}
            rows.append(time_row(case, "ms", 1e3, each["curve"], "tcp without keys", each["plain"]))
    return Report("links", [*rows, *relay_rows(rounds=rounds)])


def _calls(link: SocketLink, question: Message, calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            link.call(question, CALL_TIMEOUT_S)

    return run


@contextmanager
def _opened(tcp: str, keys: LinkKeys | None) -> Iterator[SocketLink]:
    address = Address("another host", "", tcp)
    link = SocketLink("echo", address, name="bench", max_bytes=MAX_BYTES, timeout_s=CALL_TIMEOUT_S, keys=keys)
    try:
        yield link
    finally:
        link.close()


@contextmanager
def _echoing(keys: tuple[LinkKeys | None, ...]) -> Iterator[list[str]]:
    """A process with an echo server for each of the keys; gives where they listen."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_echo, args=(there, keys), daemon=True)
    process.start()
    try:
        if not here.poll(START_TIMEOUT_S):
            raise StartupError(f"the process to talk to did not start within {START_TIMEOUT_S:.0f} s")
        yield here.recv()
    finally:
        here.close()  # which ends it
        process.join(10)
        process.kill()


def _echo(parent: Connection, keys: tuple[LinkKeys | None, ...]) -> None:
    def handle(peer: str, question: Message) -> Message:
        return Message("ok", {}, question.tensors)

    servers = [SocketServer("echo", handle, max_bytes=MAX_BYTES, keys=pair) for pair in keys]
    for server in servers:
        server.start()
    parent.send([server.address.tcp for server in servers])
    parent.poll(None)  # until the parent closes it, or ends
    for server in servers:
        server.stop()
