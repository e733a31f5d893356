"""The bench of relays, on actors of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from actors.relay.relay import Relay
from actors.transport.message import Message
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address
from cluster.bench import relay


@contextmanager
def node() -> Iterator[relay.Addresses]:
    def handle(peer: str, question: Message) -> Message:
        return Message("ok", {}, question.tensors[:1])

    def open_neighbour(name: str, address: Address) -> SocketLink:
        return SocketLink(name, address, name="relay", max_bytes=1 << 22, timeout_s=20)

    servers = [SocketServer(name, handle, max_bytes=1 << 22) for name in relay.NAMES]
    relays = [Relay(name, open_neighbour, max_bytes=1 << 22, timeout_s=20) for name in relay.NAMES]
    for each in (*servers, *relays):
        each.start()
    try:
        yield [(server.address, beside.address) for server, beside in zip(servers, relays, strict=True)]
    finally:
        for each in (*relays, *servers):
            each.stop()


def test_tokens_cross_once_instead_of_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "NUM_TOKENS", 8)
    with node() as addresses:
        time, crossed = relay._rows_of("case", None, addresses, rounds=2)
    rows, pairs, index = 8 * relay.WIDTH * 4, 2 * 8 * (4 + 4), 2 * 8 * 4
    assert (time.case, time.unit, time.rounds) == ("case", "ms", 2)
    assert min(time.value, time.peer_value) > 0
    assert (crossed.case, crossed.unit) == ("case_bytes", "bytes")
    assert (crossed.value, crossed.peer_value) == (2 * rows + pairs + index, 4 * rows + pairs)
    assert crossed.ratio == crossed.peer_value / crossed.value
