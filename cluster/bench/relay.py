"""What a node's relay saves: 4 MB of tokens that two expert actors of another node need, and as much in sums, over its
relay and over a link to each. Each actor is a process of this host, reached over tcp://; it answers what it is asked,
so that only the ways are timed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from actors.moe.dispatch import Share
from actors.relay.bundle import Member, named, raise_if_failed
from actors.relay.relay import Relay
from actors.router.parcels import Parcel, alone, joined
from actors.transport.contract import Link
from actors.transport.curve import LinkKeys
from actors.transport.message import Message
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address
from cluster.bench.result import Row, interleaved, time_row
from cluster.errors import StartupError

NAMES = ("expert-0", "expert-1")
NUM_TOKENS, WIDTH = 1024, 1024
MAX_BYTES = 64 << 20
CALLS = 3
"""A round."""
START_TIMEOUT_S, CALL_TIMEOUT_S = 60.0, 30.0
Addresses = Sequence[tuple[Address, Address]]
"""Of each actor and of the relay beside it."""


def relay_rows(*, rounds: int) -> list[Row]:
    rows = []
    for case, keys in (("relayed_4_mb_curve", LinkKeys.generate()), ("relayed_4_mb_clear", None)):
        with _node(keys) as addresses:
            rows += _rows_of(case, keys, addresses, rounds)
    return rows


def _rows_of(case: str, keys: LinkKeys | None, addresses: Addresses, rounds: int) -> list[Row]:
    """Time of a layer, and its bytes."""
    members = [Member(name, address) for name, (address, _) in zip(NAMES, addresses, strict=True)]
    every = torch.arange(NUM_TOKENS)
    shares = [Share(actor, every, every.int(), [NUM_TOKENS], every) for actor in range(len(NAMES))]
    x_TD, weights_N = torch.zeros(NUM_TOKENS, WIDTH), torch.ones(NUM_TOKENS)

    def question(parcel: Parcel) -> Message:
        message = parcel.forward({"layer": 0}, x_TD, weights_N, "trunk")
        return named(message, members) if parcel.is_shared else message

    with ExitStack() as stack:
        links = [stack.enter_context(_away(address, keys)) for address, _ in addresses]
        relay = stack.enter_context(_away(addresses[0][1], keys))
        direct = [(link, question(alone(name, own))) for link, name, own in zip(links, NAMES, shares, strict=True)]
        ways = {"relayed": [(relay, question(joined(NAMES, shares)))], "direct": direct}
        seconds = interleaved({way: _calls(asked) for way, asked in ways.items()}, rounds, 2)
        each = {way: [s / CALLS for s in values] for way, values in seconds.items()}
        sent, directly = (_crossed(asked) for asked in ways.values())
    time = time_row(case, "ms", 1e3, each["relayed"], "a link to each actor", each["direct"])
    return [
        time,
        replace(time, case=f"{case}_bytes", value=sent, unit="bytes", peer_value=directly, ratio=directly / sent),
    ]


def _calls(asked: Sequence[tuple[Link, Message]]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            for pending in [link.start(question) for link, question in asked]:
                raise_if_failed(pending.result(CALL_TIMEOUT_S))

    return run


def _crossed(asked: Sequence[tuple[Link, Message]]) -> float:
    """Bytes of a layer, both ways."""
    total = 0
    for link, question in asked:
        before = link.traffic.bytes_sent + link.traffic.bytes_received
        raise_if_failed(link.call(question, CALL_TIMEOUT_S))
        total += link.traffic.bytes_sent + link.traffic.bytes_received - before
    return float(total)


@contextmanager
def _away(address: Address, keys: LinkKeys | None) -> Iterator[Link]:
    """A link as from another host."""
    address = replace(address, host_id="another host")
    link = SocketLink("expert", address, name="bench", max_bytes=MAX_BYTES, timeout_s=CALL_TIMEOUT_S, keys=keys)
    try:
        yield link
    finally:
        link.close()


@contextmanager
def _node(keys: LinkKeys | None) -> Iterator[Addresses]:
    """A process for each actor."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in NAMES]
    processes = [
        spawn.Process(target=_serve, args=(name, there, keys), daemon=True)
        for name, (_, there) in zip(NAMES, pipes, strict=True)
    ]
    try:
        for process in processes:
            process.start()
        for here, _ in pipes:
            if not here.poll(START_TIMEOUT_S):
                raise StartupError(f"the process to talk to did not start within {START_TIMEOUT_S:.0f} s")
        yield [here.recv() for here, _ in pipes]
    finally:
        for here, there in pipes:
            there.close()
            here.close()  # which ends it
        for process in processes:
            if process.pid is not None:
                process.join(10)
                process.kill()


def _serve(name: str, parent: Connection, keys: LinkKeys | None) -> None:
    torch.set_num_threads(1)

    def handle(peer: str, question: Message) -> Message:
        return Message("ok", {}, question.tensors[:1])

    def open_neighbour(neighbour: str, address: Address) -> Link:
        return SocketLink(neighbour, address, name=name, max_bytes=MAX_BYTES, timeout_s=CALL_TIMEOUT_S, keys=keys)

    server = SocketServer(name, handle, max_bytes=MAX_BYTES, keys=keys)
    relay = Relay(name, open_neighbour, max_bytes=MAX_BYTES, timeout_s=CALL_TIMEOUT_S, keys=keys)
    server.start()
    relay.start()
    parent.send((server.address, relay.address))
    parent.poll(None)  # until the parent closes it, or ends
    relay.stop()
    server.stop()
