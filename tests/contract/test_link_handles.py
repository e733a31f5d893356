"""File handles of a link: none stays when it is closed, though somebody keeps the link itself."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import suppress

import pytest
import torch

from actors.transport.message import Message
from actors.transport.payload.contract import PayloadSettings
from actors.transport.socket import SocketLink, SocketServer

MAX_BYTES = 1 << 24
SHM = PayloadSettings("shm")
WAIT_S = 30.0


def echo(peer: str, question: Message) -> Message:
    return Message("ok", {}, question.tensors)


def handles() -> Counter[str]:
    """Kind -> how many this process has: sockets, memory files, event counters and what else there is."""
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # of the listing itself
            found[os.readlink(f"/proc/self/fd/{number}").partition("[")[0]] += 1
    return found


def more_than(before: Counter[str]) -> Counter[str]:
    """What is there beside that after a while; the server and zmq close theirs in threads of their own."""
    deadline = time.monotonic() + WAIT_S
    while (more := handles() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    return more


def opened(server: SocketServer) -> SocketLink:
    return SocketLink("server", server.address, name="test", max_bytes=MAX_BYTES, timeout_s=20, payload=SHM)


def used(link: SocketLink) -> None:
    sent = torch.randn(64, 1024)
    assert torch.equal(link.call(Message("echo", {}, (sent,)), 20).tensors[0], sent)


@pytest.fixture
def server() -> SocketServer:
    return SocketServer("server", echo, max_bytes=MAX_BYTES, payload=SHM)


def test_a_closed_link_has_no_handle(server: SocketServer) -> None:
    at_first = handles()
    server.start()
    try:
        used(first := opened(server))  # after that there is what zmq makes once and for all
        first.close()
        del first
        assert more_than(at_first)["/memfd:moe-link (deleted)"] == 0
        before = handles()
        kept = [opened(server) for _ in range(3)]
        for link in kept:
            assert link.kind.endswith("+shm")
            used(link)
        for link in kept:
            link.close()
        assert not more_than(before)
    finally:
        server.stop()


def test_a_link_whose_server_ended_has_none_after_its_close(server: SocketServer) -> None:
    before = handles()
    server.start()
    used(link := opened(server))
    server.stop()
    link.close()
    del server
    assert more_than(before)["/memfd:moe-link (deleted)"] == 0
