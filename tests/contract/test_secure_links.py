"""Links with keys: who holds them talks as without, and nobody else is heard."""

from __future__ import annotations

import logging
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import zmq

from actors.errors import InvalidInput, PeerLost
from actors.transport import curve
from actors.transport.curve import LinkKeys
from actors.transport.message import Message, encode
from actors.transport.socket import SocketLink, SocketServer
from actors.transport.socket.zeromq import PIECE_BYTES
from actors.values import Address

MAX_BYTES = 1 << 20
OURS, THEIRS = LinkKeys.generate(), LinkKeys.generate()


class Echo:
    """A server that counts what reaches its handler."""

    def __init__(self, keys: LinkKeys | None, max_bytes: int) -> None:
        self.heard = 0
        self.server = SocketServer("peer", self._handle, max_bytes=max_bytes, keys=keys)
        self.server.start()

    def _handle(self, peer: str, question: Message) -> Message:
        self.heard += 1
        return Message("ok", {}, question.tensors)

    @property
    def over_tcp(self) -> Address:
        return Address("another host", "", self.server.address.tcp)


@contextmanager
def serving(keys: LinkKeys | None, max_bytes: int = MAX_BYTES) -> Iterator[Echo]:
    echo = Echo(keys, max_bytes)
    try:
        yield echo
    finally:
        echo.server.stop()


def open_link(address: Address, keys: LinkKeys | None, timeout_s: float = 20, max_bytes: int = MAX_BYTES) -> SocketLink:
    return SocketLink("peer", address, name="router", max_bytes=max_bytes, timeout_s=timeout_s, keys=keys)


@pytest.mark.parametrize(
    ("on_ipc", "way", "kind"),
    [(False, "tcp", "socket/tcp+curve"), (False, "ipc", "socket/ipc+shm"), (True, "ipc", "socket/ipc+curve+shm")],
)
def test_with_the_keys_it_works_as_without(on_ipc: bool, way: str, kind: str) -> None:
    keys = LinkKeys.generate(on_ipc=on_ipc)
    with serving(keys) as echo:
        link = open_link(echo.over_tcp if way == "tcp" else echo.server.address, keys)
        assert link.kind == kind
        tensor = torch.randn(200, 300)
        assert torch.equal(link.call(Message("echo", {}, (tensor,)), 20).tensors[0], tensor)
        pending = [link.start(Message("echo", {}, (torch.full((2,), n),))) for n in range(5)]
        assert [int(p.result(20).tensors[0][0]) for p in reversed(pending)] == [4, 3, 2, 1, 0]
        link.close()


@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize("count", [1, 3])
def test_frames_of_any_size_cross_in_pieces(count: int, off: int) -> None:
    sizes = (count * PIECE_BYTES + off, 5, count * PIECE_BYTES - off)
    tensors = tuple(torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes)
    with serving(OURS, max_bytes=1 << 22) as echo:
        link = open_link(echo.over_tcp, OURS, max_bytes=1 << 22)
        assert all(map(torch.equal, link.call(Message("echo", {}, tensors), 20).tensors, tensors))
        link.close()


def test_a_stranger_cannot_make_a_server_hold_more_than_a_piece() -> None:
    """It announces a frame of 200 MB before it has said who it is, as ZMTP 3.1 has it."""
    greeting = b"\xff" + bytes(8) + b"\x7f" + bytes([3, 1]) + b"CURVE".ljust(20, b"\0") + bytes(32)
    with serving(OURS, max_bytes=1 << 28) as echo:
        host, port = echo.server.address.tcp.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as stranger:
            stranger.sendall(greeting)
            assert stranger.recv(10), "it is greeted"
            stranger.sendall(b"\x06" + (200 << 20).to_bytes(8, "big"))
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                stranger.sendall(bytes(200 << 20))
        link = open_link(echo.over_tcp, OURS)
        assert link.call(Message("echo"), 20).op == "ok"
        link.close()


def test_a_message_of_the_largest_size_fits_when_it_is_encrypted() -> None:
    with serving(OURS) as echo:
        link = open_link(echo.over_tcp, OURS)
        header = len(encode(Message("echo", {}, (torch.zeros(MAX_BYTES - 100, dtype=torch.uint8),), id=2))[0])
        largest = torch.ones(MAX_BYTES - header, dtype=torch.uint8)
        assert torch.equal(link.call(Message("echo", {}, (largest,)), 20).tensors[0], largest)
        link.close()


MIXED = {
    "no keys": (OURS, None, "encrypts"),
    "other keys": (OURS, THEIRS, "other keys"),
    "the server's key, another of its own": (
        OURS,
        LinkKeys(OURS.public, THEIRS.secret),
        "handshake failed",
    ),
    "keys for a peer without": (None, OURS, "encrypts"),
}


@pytest.mark.parametrize("what", MIXED)
def test_a_link_with_wrong_keys_ends_at_once_and_says_why(what: str) -> None:
    of_server, of_link, why = MIXED[what]
    with serving(of_server) as echo:
        started = time.monotonic()
        with pytest.raises(PeerLost, match=rf"{why}.*links\.secure.*peer"):
            open_link(echo.over_tcp, of_link)
        assert time.monotonic() - started < 10
        assert echo.heard == 0


def test_a_stranger_with_the_public_key_is_refused_and_hardly_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The public key is all that a CURVE client needs of a server; that it has the pair is what the gate asks."""
    own_public, own_secret = zmq.curve_keypair()
    caplog.set_level(logging.DEBUG)
    with serving(OURS) as echo:
        for _ in range(8):
            stranger = zmq.Context.instance().socket(zmq.DEALER)
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.curve_serverkey = OURS.public
            stranger.curve_publickey, stranger.curve_secretkey = own_public, own_secret
            monitor = stranger.get_monitor_socket(curve.HANDSHAKE_FAILED)
            stranger.connect(echo.server.address.tcp)
            with suppress(zmq.Again):  # refused already, and then a send would wait for ever
                stranger.send_multipart(encode(Message("echo", id=1)), zmq.DONTWAIT)
            assert monitor.poll(10_000)
            assert "does not know this side's key" in curve.refusal(monitor)
            stranger.disable_monitor()
            monitor.close(0)
            stranger.close(0)
        link = open_link(echo.over_tcp, OURS)
        assert link.call(Message("echo"), 20).op == "ok"
        link.close()
        assert echo.heard == 1
    assert len([r for r in caplog.records if "cluster's key" in r.message]) <= 1


def test_what_is_no_zmq_at_all_disturbs_nobody() -> None:
    with serving(OURS) as echo:
        host, port = echo.server.address.tcp.removeprefix("tcp://").split(":")
        noise = [socket.create_connection((host, int(port)), timeout=10) for _ in range(20)]
        for number, connection in enumerate(noise):
            connection.sendall(bytes([number]) * 200)
        link = open_link(echo.over_tcp, OURS)
        assert link.call(Message("echo"), 20).op == "ok"
        link.close()
        for connection in noise:
            connection.close()
        assert echo.heard == 1


def test_clusters_in_one_process_do_not_let_each_other_in() -> None:
    with serving(OURS) as ours, serving(THEIRS) as theirs:
        for echo, right, wrong in ((ours, OURS, THEIRS), (theirs, THEIRS, OURS)):
            link = open_link(echo.over_tcp, right)
            assert link.call(Message("echo"), 20).op == "ok"
            link.close()
            with pytest.raises(PeerLost):
                open_link(echo.over_tcp, wrong)
            assert echo.heard == 1


@pytest.mark.parametrize(
    "request_",
    [
        [],
        [b"1.0", b"1", OURS.public, b"127.0.0.1", b"", b"NULL"],
        [b"1.0", b"1", OURS.public, b"127.0.0.1", b"", b"PLAIN", b"name", b"password"],
        [b"1.0", b"1", OURS.public, b"127.0.0.1", b"", b"CURVE", b""],
        [b"1.0", b"1", b"", b"127.0.0.1", b"", b"CURVE", b""],
        [b"1.0", b"1", b"", b"127.0.0.1", b"", b"CURVE", bytes(32)],
        [b"1.0", b"1", OURS.public, b"127.0.0.1", b"", b"CURVE", bytes(31)],
        [b"1.0", b"1", OURS.public, b"127.0.0.1", b"", b"CURVE", bytes(32)],
    ],
)
def test_the_gate_lets_nothing_else_in(request_: list[bytes]) -> None:
    assert not curve.is_let_in(request_)


def test_the_secret_does_not_show() -> None:
    assert OURS.secret.decode() not in repr(OURS)
    assert OURS.secret != THEIRS.secret


def test_without_curve_in_libzmq_the_setting_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: False)
    with pytest.raises(InvalidInput, match=r"links\.secure.*set it to off"):
        LinkKeys.generate()


def test_the_directory_of_ipc_is_for_this_user_alone() -> None:
    before = os.umask(0)
    try:
        with serving(None) as echo:
            directory = Path(echo.server.address.ipc.removeprefix("ipc://")).parent
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            assert directory.stat().st_uid == os.getuid()
    finally:
        os.umask(before)


_CHILD = """
from actors.transport.curve import LinkKeys
from actors.transport.message import Message
from actors.transport.socket import SocketLink, SocketServer
from actors.transport.socket.zeromq import PIECE_BYTES
from actors.values import Address
keys = LinkKeys.generate()
server = SocketServer("child", lambda peer, question: Message("ok"), max_bytes=1 << 20, keys=keys)
server.start()
address = Address("another host", "", server.address.tcp)
link = SocketLink("child", address, name="r", max_bytes=1 << 20, timeout_s=20, keys=keys)
print(link.call(Message("x"), 20).op)
link.close()
server.stop()
"""


def test_the_gate_does_not_keep_a_process_from_ending() -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "ok"
