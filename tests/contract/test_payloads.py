"""Links whose large tensors cross memory that both ends share: what is read stays as it was, nobody waits for room, and
nothing is left of a link or a process that has ended."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import msgpack
import pytest
import torch

from actors.errors import InvalidInput, LinkTimeout, PeerLost, ProtocolError
from actors.transport.curve import LinkKeys
from actors.transport.message import Message, decode, encode
from actors.transport.payload import attach
from actors.transport.payload.contract import AUTO, SOCKET_ONLY, PayloadSettings
from actors.transport.payload.shm import ShmCarrier
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address

MAX_BYTES = 1 << 24
SMALL = PayloadSettings("shm", region_bytes=1 << 20, carry_from_bytes=1 << 10)
QUARTER = (1 << 20) // 4 // 4
"""Elements of float32 that fill a quarter of the region."""
WAIT_S = 20.0


def answer_back(peer: str, question: Message) -> Message:
    return Message("ok", {"n": question.fields.get("n")}, tuple(t + 1 for t in question.tensors))


@contextmanager
def serving(
    handler: Callable[[str, Message], Message] = answer_back, payload: PayloadSettings = SMALL, **options: Any
) -> Iterator[SocketServer]:
    server = SocketServer("peer", handler, max_bytes=MAX_BYTES, payload=payload, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def opened(address: Address, payload: PayloadSettings = SMALL, keys: LinkKeys | None = None) -> SocketLink:
    return SocketLink("peer", address, name="router", max_bytes=MAX_BYTES, timeout_s=WAIT_S, payload=payload, keys=keys)


@pytest.fixture
def server() -> Iterator[SocketServer]:
    with serving() as server:
        yield server


@pytest.fixture
def link(server: SocketServer) -> Iterator[SocketLink]:
    link = opened(server.address)
    yield link
    link.close()


def carrier_of(link: SocketLink) -> ShmCarrier:
    assert link._line is not None
    assert isinstance(link._line.carrier, ShmCarrier)
    return link._line.carrier


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def is_view_of(carrier: ShmCarrier, tensor: torch.Tensor) -> bool:
    assert carrier._theirs is not None
    start = torch.frombuffer(memoryview(carrier._theirs), dtype=torch.uint8).data_ptr()
    return start <= tensor.data_ptr() < start + len(carrier._theirs)


def test_what_arrives_is_not_copied_and_stays_as_it_was(link: SocketLink) -> None:
    held = [link.call(Message("x", {}, (torch.full((QUARTER,), float(n)),)), WAIT_S).tensors[0] for n in range(10)]
    assert [is_view_of(carrier_of(link), tensor) for tensor in held] == [True] * 4 + [False] * 6, "the region is full"
    assert all(torch.equal(tensor, torch.full((QUARTER,), n + 1.0)) for n, tensor in enumerate(held))


def test_room_comes_back_with_the_next_message(link: SocketLink, server: SocketServer) -> None:
    question = Message("x", {}, (torch.ones(QUARTER),))
    held = [link.call(question, WAIT_S) for _ in range(5)]
    part = held[1].tensors[0][5:9]
    del held
    gc.collect()
    again = [link.call(question, WAIT_S).tensors[0] for _ in range(3)]
    assert all(is_view_of(carrier_of(link), tensor) for tensor in again), "three of the four are free again"
    assert not is_view_of(carrier_of(link), link.call(question, WAIT_S).tensors[0])
    assert torch.equal(part, torch.full((4,), 2.0)), "a part of a tensor holds what it is a part of"


def test_questions_that_wait_hold_their_room_and_others_cross_the_socket() -> None:
    release = threading.Event()
    seen: list[float] = []

    def slow(peer: str, question: Message) -> Message:
        release.wait(WAIT_S)
        seen.append(float(question.tensors[0][0]))
        return Message("ok", {"sum": float(question.tensors[0].sum())})

    with serving(slow) as server:
        link = opened(server.address)
        pending = [link.start(Message("x", {}, (torch.full((QUARTER,), float(n)),))) for n in range(12)]
        assert len(carrier_of(link)._slots) == 4
        release.set()
        assert [each.result(WAIT_S).fields["sum"] for each in pending] == [QUARTER * n for n in range(12)]
        assert seen == list(range(12)), "in the order sent, whichever way they went"
        link.close()


@pytest.mark.parametrize("met", [True, False])
def test_a_line_ends_while_a_child_has_it_too(server: SocketServer, met: bool) -> None:
    """A process that was just forked has all that its parent had open."""
    attachments = server._inbox._attachments
    if met:
        link = opened(server.address)
        until(lambda: bool(attachments._lines))
        (line,) = attachments._lines.values()
        inherited = os.dup(line.fileno())
        link.close()
        until(lambda: not attachments._lines)
    else:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(attachments._path)
            until(lambda: bool(attachments._strangers))
            (accepted,) = attachments._strangers.values()
            inherited = os.dup(accepted.fileno())
        until(lambda: not attachments._strangers)
    try:
        another = opened(server.address)
        assert another.call(Message("x", {}, (torch.ones(3),)), WAIT_S).op == "ok"
        another.close()
    finally:
        os.close(inherited)


def test_a_server_outlives_a_handler_that_raises() -> None:
    def raise_at_times(peer: str, question: Message) -> Message:
        if question.op == "raise":
            raise ZeroDivisionError
        return Message("ok")

    with serving(raise_at_times) as server:
        link = opened(server.address)
        lost, answered = link.start(Message("raise")), link.start(Message("x"))
        assert answered.result(WAIT_S).op == "ok"
        with pytest.raises(LinkTimeout):
            lost.result(0.05)
        link.close()


def test_a_question_that_nobody_can_tell_to_be_ready_is_handled_and_keeps_nobody_waiting() -> None:
    def ready(question: Message) -> bool:
        """Of what is kept back it is asked again and again."""
        if question.op == "odd" and asked:
            raise ZeroDivisionError
        asked.append(question.op)
        return question.op != "odd"

    asked: list[str] = []
    with serving(lambda peer, question: Message(f"did {question.op}"), ready=ready) as server:
        link = opened(server.address)
        odd, plain = link.start(Message("odd")), link.start(Message("plain"))
        assert plain.result(WAIT_S).op == "did plain"
        assert odd.result(WAIT_S).op == "did odd"
        link.close()


def test_short_and_long_messages_keep_their_order() -> None:
    seen: list[int] = []

    def note(peer: str, question: Message) -> Message:
        seen.append(int(question.fields["n"]))
        return Message("ok", {}, question.tensors)

    with serving(note, PayloadSettings("shm", carry_from_bytes=1 << 30)) as server:
        link = opened(server.address, PayloadSettings("shm", carry_from_bytes=1 << 30))
        sizes = [1 << 18 if n % 3 == 0 else 8 for n in range(60)]  # the long ones cross zmq, the short ones the line
        pending = [link.start(Message("x", {"n": n}, (torch.zeros(size),))) for n, size in enumerate(sizes)]
        assert [each.result(WAIT_S).tensors[0].numel() for each in pending] == sizes
        assert seen == list(range(60))
        link.close()


def test_a_line_that_nobody_reads_makes_nobody_wait() -> None:
    release, started = threading.Event(), time.monotonic()

    def slow(peer: str, question: Message) -> Message:
        release.wait(WAIT_S)
        return Message("ok", {"n": question.fields["n"]})

    with serving(slow) as server:
        link = opened(server.address)
        pending = [link.start(Message("x", {"n": n}, (torch.zeros(200),))) for n in range(900)]
        assert time.monotonic() - started < WAIT_S
        release.set()
        assert [each.result(WAIT_S).fields["n"] for each in pending] == list(range(900))
        link.close()


def test_several_links_do_not_disturb_each_other(server: SocketServer) -> None:
    links = [opened(server.address) for _ in range(3)]
    answers = [link.call(Message("x", {}, (torch.full((QUARTER,), float(n)),)), WAIT_S) for n, link in enumerate(links)]
    links[1].close()
    until(lambda: len(server._inbox._attachments._lines) == 2)
    assert [float(answer.tensors[0].mean()) for answer in answers] == [1.0, 2.0, 3.0], "also of the link that is closed"
    assert links[2].call(Message("x"), WAIT_S).op == "ok"
    links[0].close()
    links[2].close()
    until(lambda: not server._inbox._attachments._lines)


def test_closed_links_leave_no_file_open(server: SocketServer) -> None:
    def use() -> None:
        link = opened(server.address)
        link.call(Message("x", {}, (torch.ones(QUARTER),)), WAIT_S)
        link.close()
        until(lambda: not server._inbox._attachments._lines)

    use()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        use()
    gc.collect()
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)


_CHILD = """
import json, sys, time
from dataclasses import asdict
import torch
from actors.transport.message import Message
from actors.transport.payload.contract import PayloadSettings
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address
settings = PayloadSettings("shm", region_bytes=1 << 20, carry_from_bytes=1 << 10)
question = Message("x", {}, (torch.ones(1 << 16),))
if len(sys.argv) > 1:
    address = Address(**json.loads(sys.argv[1]))
    link = SocketLink("peer", address, name="child", max_bytes=1 << 24, timeout_s=20, payload=settings)
    held = link.call(question, 20)
    print("held", flush=True)
else:
    server = SocketServer("child", lambda peer, q: Message("ok", {}, q.tensors), max_bytes=1 << 24, payload=settings)
    server.start()
    print(json.dumps(asdict(server.address)), flush=True)
time.sleep(60)
"""


@contextmanager
def child(*args: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", _CHILD, *args], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def test_what_a_killed_peer_has_sent_can_still_be_read() -> None:
    with child() as process:
        assert process.stdout is not None
        link = opened(Address(**json.loads(process.stdout.readline())))
        assert link.kind == "socket/ipc+shm"
        tensor = torch.randn(QUARTER)
        held = link.call(Message("x", {}, (tensor,)), WAIT_S)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        started = time.monotonic()
        with pytest.raises(PeerLost, match="peer"):
            link.call(Message("x", {}, (tensor,)), WAIT_S)
        assert time.monotonic() - started < 5
        link.close()
        assert torch.equal(held.tensors[0], tensor)


def test_a_server_lets_go_of_a_killed_router(server: SocketServer) -> None:
    with child(json.dumps(asdict(server.address))) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        assert len(server._inbox._attachments._lines) == 1
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not server._inbox._attachments._lines)
    link = opened(server.address)
    assert link.call(Message("x", {}, (torch.ones(QUARTER),)), WAIT_S).op == "ok"
    link.close()


def test_ends_that_want_the_socket_have_nothing_else(server: SocketServer) -> None:
    with serving(payload=SOCKET_ONLY) as plain:
        link = opened(plain.address, AUTO)
        assert link.kind == "socket/ipc"
        assert torch.equal(link.call(Message("x", {}, (torch.zeros(QUARTER),)), WAIT_S).tensors[0], torch.ones(QUARTER))
        link.close()
        with pytest.raises(InvalidInput, match=r"links\.payload: .*wants socket"):
            opened(plain.address)
    with pytest.raises(InvalidInput, match=r"links\.payload: .*different hosts"):
        opened(Address("another host", "", server.address.tcp))


def test_without_such_memory_auto_takes_the_socket(server: SocketServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refused)
    with serving(payload=AUTO) as auto:
        link = opened(auto.address, AUTO)
        assert link.kind == "socket/ipc"
        assert link.call(Message("x", {}, (torch.ones(QUARTER),)), WAIT_S).op == "ok"
        link.close()
    with pytest.raises(InvalidInput, match=r"links\.payload: .*not implemented"):
        opened(server.address)


def test_keys_for_one_host_keep_messages_off_the_line() -> None:
    keys = LinkKeys.generate(on_ipc=True)
    with serving(keys=keys) as server:
        link = opened(server.address, keys=keys)
        assert link.kind == "socket/ipc+curve+shm"
        assert link._line is not None
        assert link._line.send([b"a message"]) == [b"a message"]
        assert torch.equal(link.call(Message("x", {}, (torch.ones(9),)), WAIT_S).tensors[0], torch.full((9,), 2.0))
        link.close()


def line_of(server: SocketServer) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(WAIT_S)
    connection.connect(server._inbox._attachments._path)
    return connection


@pytest.mark.parametrize("said", [b"", b"x" * 32, b"y" * 500])
def test_who_has_no_token_gets_nothing(server: SocketServer, link: SocketLink, said: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with line_of(server) as stranger, open(os.devnull) as file:
        if said:
            socket.send_fds(stranger, [said], [file.fileno()] * 2)
        else:
            stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(100) == b""
    assert link.call(Message("x"), WAIT_S).op == "ok"
    assert len(os.listdir("/proc/self/fd")) <= before, "what it has shown is closed"
    assert len(server._inbox._attachments._lines) == 1


def test_memory_that_could_be_taken_away_is_refused(tmp_path: Any) -> None:
    carrier = ShmCarrier(SMALL, "stranger")
    (tmp_path / "file").write_bytes(bytes(4096))
    for file in (os.open(tmp_path / "file", os.O_RDONLY), os.memfd_create("x")):
        with pytest.raises(ProtocolError, match="stranger"):
            carrier.meet({}, [file])
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(file)
    with pytest.raises(ProtocolError, match="stranger"):
        carrier.meet({}, [])
    carrier.close()


@pytest.mark.parametrize(
    "place", [[1], [1, -256], [1, 1 << 20], [1, (1 << 20) - 4], [1, 2], [1, 0, 0], ["a", 0], 7, [1, 1 << 62], [1, None]]
)
def test_places_outside_of_the_memory_are_refused(place: object) -> None:
    ours, theirs = ShmCarrier(SMALL, "a"), ShmCarrier(SMALL, "stranger")
    theirs.meet({}, [os.dup(fd) for fd in ours.descriptors()])
    ours.meet({}, [os.dup(fd) for fd in theirs.descriptors()])
    frames = encode(Message("x", {}, (torch.ones(1 << 12),), 1), ours)
    assert decode(frames, peer="a", max_bytes=MAX_BYTES, carrier=theirs).tensors[0].sum() == 1 << 12
    version, number, op, fields, specs, told = msgpack.unpackb(frames[0])
    specs[0][2] = place
    bad = [msgpack.packb([version, number, op, fields, specs, told]), *frames[1:]]
    with pytest.raises(ProtocolError, match="stranger"):
        decode(bad, peer="stranger", max_bytes=MAX_BYTES, carrier=theirs)
    with pytest.raises(ProtocolError, match="nothing can be"):
        decode(frames, peer="stranger", max_bytes=MAX_BYTES)
    with pytest.raises(ProtocolError, match="exceeds"):
        decode(frames, peer="stranger", max_bytes=1 << 10, carrier=theirs)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("rank", [0, 1], ids=["link", "server"])
@pytest.mark.parametrize("fails_at", ["__init__", "meet"])
def test_where_the_best_way_fails_the_next_is_taken(fails_at: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []

    class Failing(ShmCarrier):
        def __init__(self, settings: PayloadSettings, peer: str, own_rank: int) -> None:
            super().__init__(settings, peer)
            self._rank = own_rank
            self._fail("__init__")

        def meet(self, *shown: Any) -> None:
            super().meet(*shown)
            self._fail("meet")

        def _fail(self, where: str) -> None:
            if (where, self._rank) == (fails_at, rank):
                raise RuntimeError("this GPU does not reach that one")

        def close(self) -> None:
            super().close()
            closed.append(self._rank)

    def new_carrier(kind: str, settings: PayloadSettings, peer: str, own_rank: int) -> ShmCarrier:
        return Failing(settings, peer, own_rank) if kind == "cuda_ipc" else ShmCarrier(settings, peer)

    monkeypatch.setattr(attach, "new_carrier", new_carrier)
    monkeypatch.setattr(attach, "choose", lambda *ends, on_one_host: ("cuda_ipc", "shm"))
    tensor = torch.arange(1 << 16)
    with serving(payload=AUTO) as server:
        for number in range(20):
            link = opened(server.address, AUTO)
            assert link.kind == "socket/ipc+shm"
            answer = link.call(Message("next", {"n": number}, (tensor,)), WAIT_S)
            assert torch.equal(answer.tensors[0], tensor + 1)
            link.close()
    if fails_at == "meet":
        assert sorted(closed) == [0] * 20 + [1] * 20
