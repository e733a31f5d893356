"""One suite for every link: what a router may rely on, whichever way the bytes go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import msgpack
import pytest
import torch
import zmq

from actors.errors import InvalidInput, LinkTimeout, PeerLost, ProtocolError, RemoteError
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.transport.local import LocalLink
from actors.transport.message import WIRE_VERSION, Message, decode, encode, error_answer, id_of
from actors.transport.payload.contract import SOCKET_ONLY, PayloadSettings
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address

MAX_BYTES = 1 << 22
KINDS = ("local", "socket/ipc", "socket/ipc+shm", "socket/ipc+gloo", "socket/tcp", "faulty")
CARRYING_ALL = {
    "shm": PayloadSettings("shm", region_bytes=1 << 20, carry_from_bytes=1),
    "gloo": PayloadSettings("gloo", region_bytes=1 << 20, carry_from_bytes=1),
}
"""Small tensors go the way of large ones, and there is soon no room for them."""


def echo(peer: str, question: Message) -> Message:
    """A peer that answers what it was sent, refuses `refuse` and breaks at `break`."""
    if question.op == "refuse":
        return error_answer(InvalidInput("not like this", field="op"))
    if question.op == "break":
        return error_answer(ZeroDivisionError("secret"))
    return Message("ok", {"op": question.op, **question.fields}, question.tensors)


def over_tcp(address: Address) -> Address:
    return Address("another host", address.ipc, address.tcp)


@contextmanager
def opened(kind: str, handler: Callable[[str, Message], Message] = echo) -> Iterator[Link]:
    if kind == "local":
        yield LocalLink("peer", handler)
        return
    payload = CARRYING_ALL.get(kind.rpartition("+")[2], SOCKET_ONLY)
    server = SocketServer("peer", handler, max_bytes=MAX_BYTES, payload=payload)
    server.start()
    address = over_tcp(server.address) if kind == "socket/tcp" else server.address
    link: Link = SocketLink("peer", address, name="router", max_bytes=MAX_BYTES, timeout_s=5, payload=payload)
    if kind == "faulty":
        link = FaultyLink(link, [])
    try:
        yield link
    finally:
        link.close()
        server.stop()


@pytest.fixture(params=KINDS)
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    with opened(request.param) as link:
        yield link


def test_kind_says_what_it_is(link: Link) -> None:
    assert link.kind in KINDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (1,), (), (700, 64)])
def test_tensors_come_back_as_they_went(link: Link, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 100).to(dtype)
    answer = link.call(Message("echo", {"n": 3, "x": [1, 2], "none": None}, (tensor, torch.empty(0, dtype=dtype))), 5)
    assert answer.fields == {"op": "echo", "n": 3, "x": [1, 2], "none": None}
    assert answer.tensors[0].dtype == dtype
    assert torch.equal(answer.tensors[0], tensor)
    assert answer.tensors[1].numel() == 0


def test_a_strided_tensor_is_sent_by_value(link: Link) -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(link.call(Message("echo", {}, (tensor,)), 5).tensors[0], tensor)


def test_answers_may_be_awaited_in_any_order(link: Link) -> None:
    pending = [link.start(Message("echo", {"n": n})) for n in range(5)]
    assert [p.result(5).fields["n"] for p in reversed(pending)] == [4, 3, 2, 1, 0]


def test_who_looks_may_look_again(link: Link) -> None:
    first, second = link.start(Message("echo", {"n": 1})), link.start(Message("echo", {"n": 2}))
    assert link.look(second.id, 5)
    assert link.look(second.id)
    assert [p.result(0.0).fields["n"] for p in (second, first)] == [2, 1]
    assert not link.look(second.id), "it was taken"


def test_what_is_looked_for_is_told_by_what_can_be_polled(link: Link) -> None:
    """Nothing that has come stays behind where a poller does not see it."""
    poller = zmq.Poller()
    for pollable in link.pollables:
        poller.register(pollable, zmq.POLLIN)
    for round_ in range(20):
        pending = [link.start(Message("echo", {"n": n}, (torch.zeros(100 * n),))) for n in range(4)]
        deadline = time.monotonic() + 10
        for each in pending:
            while not link.look(each.id):
                assert link.pollables
                assert poller.poll(5000), f"an answer of round {round_} came unseen"
                assert time.monotonic() < deadline
            each.result(0.0)


def test_a_refusal_leaves_the_link_usable(link: Link) -> None:
    with pytest.raises(InvalidInput, match=r"not like this.*said peer"):
        link.call(Message("refuse"), 5)
    assert link.call(Message("echo"), 5).op == "ok"


def test_an_inner_error_is_named_but_not_shown(link: Link) -> None:
    with pytest.raises(RemoteError, match="ZeroDivisionError") as caught:
        link.call(Message("break"), 5)
    assert "secret" not in str(caught.value)
    assert "peer" in str(caught.value)


def test_traffic_is_counted(link: Link) -> None:
    before = link.traffic.bytes_sent
    link.call(Message("echo", {}, (torch.zeros(10, 10),)), 5)
    assert link.traffic.bytes_sent - before == 400
    assert link.traffic.bytes_received >= 400


def test_a_closed_link_says_so(link: Link) -> None:
    link.close()
    with pytest.raises(PeerLost, match="peer"):
        link.call(Message("echo"), 5)


@pytest.mark.parametrize("kind", ["socket/ipc", "socket/ipc+shm", "socket/tcp"])
def test_a_slow_peer_ends_in_a_timeout_and_its_late_answer_is_dropped(kind: str) -> None:
    release = threading.Event()

    def slow(peer: str, question: Message) -> Message:
        if question.op == "slow":
            release.wait(10)
        return Message("ok", {"op": question.op})

    with opened(kind, slow) as link:
        started = time.monotonic()
        with pytest.raises(LinkTimeout, match="peer"):
            link.call(Message("slow"), 0.2)
        assert time.monotonic() - started < 3
        release.set()
        assert link.call(Message("quick"), 5).fields["op"] == "quick"


def test_too_large_a_message_is_refused_before_it_is_sent() -> None:
    with opened("socket/ipc") as link:
        with pytest.raises(InvalidInput, match="max_message_bytes"):
            link.call(Message("echo", {}, (torch.zeros(MAX_BYTES // 4 + 1),)), 5)
        assert link.call(Message("echo"), 5).op == "ok"


@pytest.mark.parametrize("on_tcp", [False, True])
def test_an_asker_hears_at_once_that_its_question_could_not_be_read(on_tcp: bool) -> None:
    server = SocketServer("peer", echo, max_bytes=MAX_BYTES // 2, payload=SOCKET_ONLY)
    server.start()
    address = over_tcp(server.address) if on_tcp else server.address
    link = SocketLink("peer", address, name="r", max_bytes=MAX_BYTES, timeout_s=5, payload=SOCKET_ONLY)
    started = time.monotonic()
    with pytest.raises(RemoteError, match="exceeds"):
        link.call(Message("echo", {}, (torch.zeros(MAX_BYTES // 2 + 1, dtype=torch.uint8),)), 60)
    assert time.monotonic() - started < 30
    assert link.call(Message("echo"), 5).op == "ok"
    link.close()
    server.stop()


def test_a_server_may_be_stopped_by_several_at_once() -> None:
    for _ in range(20):
        server = SocketServer("peer", echo, max_bytes=MAX_BYTES)
        server.start()
        together = threading.Barrier(4)

        def stop(server: SocketServer = server, together: threading.Barrier = together) -> None:
            together.wait(5)
            server.stop()

        with ThreadPoolExecutor(4) as pool:
            for stopping in [pool.submit(stop) for _ in range(4)]:
                stopping.result(30)
        assert not os.path.exists(server.address.ipc.removeprefix("ipc://"))


def test_nobody_listens() -> None:
    started = time.monotonic()
    with pytest.raises((PeerLost, LinkTimeout), match="nobody"):
        SocketLink("nobody", Address("x", "", "tcp://127.0.0.1:9"), name="r", max_bytes=MAX_BYTES, timeout_s=1)
    assert time.monotonic() - started < 5


_CHILD = """
import sys, time
from actors.transport.message import Message
from actors.transport.socket import SocketServer
from dataclasses import asdict
import json
def handler(peer, question):
    if question.op == "hang":
        print("hanging", flush=True)
        time.sleep(60)
    return Message("ok", {}, question.tensors)
server = SocketServer("child", handler, max_bytes=1 << 26)
print(json.dumps(asdict(server.address)), flush=True)
server.start()
time.sleep(60)
"""


@pytest.mark.parametrize("way", ["ipc", "tcp"])
@pytest.mark.parametrize("moment", ["waiting", "sending"])
def test_a_peer_that_dies_is_named_at_once(way: str, moment: str) -> None:
    import json

    child = subprocess.Popen([sys.executable, "-c", _CHILD], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        address = Address(**json.loads(child.stdout.readline()))
        address = over_tcp(address) if way == "tcp" else address
        link = SocketLink("child", address, name="router", max_bytes=1 << 26, timeout_s=10)
        if moment == "waiting":
            pending = link.start(Message("hang"))
            assert child.stdout.readline().strip() == "hanging"
        else:
            # A stopped process takes no bytes: most of this message is still on its way when the peer dies.
            os.kill(child.pid, signal.SIGSTOP)
            pending = link.start(Message("echo", {}, (torch.zeros(1 << 23),)))
        os.kill(child.pid, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(PeerLost, match="child"):
            pending.result(20)
        assert time.monotonic() - killed < 5
        with pytest.raises(PeerLost):
            link.call(Message("echo"), 5)
        link.close()
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        child.wait(10)


def header(*parts: object) -> bytes:
    packed: bytes = msgpack.packb(parts)
    return packed


BAD_FRAMES = {
    "nothing": [],
    "no msgpack": [b"\xc1\xff\xfe"],
    "a number": [b"\x07"],
    "cut short": [header(WIRE_VERSION, 1, "x", {}, [])[:-3]],
    "another version": [header(WIRE_VERSION + 1, 1, "x", {}, [])],
    "no fields": [header(WIRE_VERSION, 1, "x", [])],
    "op is a number": [header(WIRE_VERSION, 1, 5, {}, [])],
    "id is a text": [header(WIRE_VERSION, "1", "x", {}, [])],
    "tensor without a frame": [header(WIRE_VERSION, 1, "x", {}, [["float32", [2]]])],
    "shape and bytes differ": [header(WIRE_VERSION, 1, "x", {}, [["float32", [9]]]), b"1234"],
    "negative size": [header(WIRE_VERSION, 1, "x", {}, [["float32", [-1]]]), b"1234"],
    "huge shape": [header(WIRE_VERSION, 1, "x", {}, [["float32", [99999999999999]]]), b""],
    "unknown dtype": [header(WIRE_VERSION, 1, "x", {}, [["object", [1]]]), b"1"],
    "spec is a number": [header(WIRE_VERSION, 1, "x", {}, [7]), b"1"],
    "shared frame too short": [header(WIRE_VERSION, 1, "x", {}, [["uint8", [16]], ["uint8", [16]]]), b"x" * 31],
    "shared frame too long": [header(WIRE_VERSION, 1, "x", {}, [["uint8", [16]], ["uint8", [3]]]), b"x" * 64],
    "shared frame, huge shape": [header(WIRE_VERSION, 1, "x", {}, [["uint8", [1 << 39]], ["uint8", [3]]]), b"x" * 64],
    "deep nesting": [b"\x91" * 5000],
    "claims a huge array": [b"\xdd\xff\xff\xff\xff"],
    "too many frames": [b"\x90"] * 30,
    "too many bytes": [b"\x90", b"x" * (MAX_BYTES + 1)],
}


@pytest.mark.parametrize("what", BAD_FRAMES)
def test_malformed_frames_make_a_protocol_error(what: str) -> None:
    with pytest.raises(ProtocolError, match="stranger"):
        decode(BAD_FRAMES[what], peer="stranger", max_bytes=MAX_BYTES)


@pytest.mark.parametrize(
    ("frames", "number"),
    [
        ([header(WIRE_VERSION, 7, "x", {}, [])], 7),
        ([header(2, 7, "x")], 7),
        ([header(WIRE_VERSION, -7)], 0),
        ([header(WIRE_VERSION, "7")], 0),
        ([header(1)], 0),
        ([b"\x07"], 0),
        ([b"\xc1"], 0),
        ([], 0),
        ([header(WIRE_VERSION, 7, "x" * (1 << 16))], 0),
    ],
)
def test_the_number_of_what_cannot_be_read(frames: list[bytes], number: int) -> None:
    assert id_of(frames) == number


def test_the_server_outlives_a_stranger() -> None:
    with opened("socket/tcp") as link:
        assert isinstance(link, SocketLink)
        stranger = zmq.Context.instance().socket(zmq.DEALER)
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(link._socket.raw.getsockopt_string(zmq.LAST_ENDPOINT))
        for frames in BAD_FRAMES.values():
            if frames and sum(map(len, frames)) < MAX_BYTES:
                stranger.send_multipart(frames)
                assert stranger.poll(5000), "a refusal is answered"
                answer = decode(stranger.recv_multipart(), peer="server", max_bytes=MAX_BYTES)
                assert answer.op == "error"
        stranger.close()
        assert link.call(Message("echo"), 5).op == "ok"


def test_small_tensors_share_a_frame_and_large_ones_do_not() -> None:
    small, large = torch.arange(5, dtype=torch.int32), torch.zeros(1 << 16)
    assert len(encode(Message("op", {}, (small, small)))) == 2
    assert len(encode(Message("op", {}, (small, large)))) == 3
    mixed = Message("op", {}, (small, torch.rand(3, dtype=torch.float64), small[:0], torch.ones(7).bfloat16()))
    for sent, got in zip(mixed.tensors, decode(encode(mixed), peer="x", max_bytes=MAX_BYTES).tensors, strict=True):
        assert torch.equal(sent, got)
        assert got.dtype == sent.dtype


def test_encode_then_decode_is_the_same_message() -> None:
    message = Message("op", {"a": [1, {"b": None}]}, (torch.eye(3, dtype=torch.bfloat16),), id=7)
    again = decode(encode(message), peer="x", max_bytes=MAX_BYTES)
    assert (again.op, again.fields, again.id) == (message.op, message.fields, 7)
    assert torch.equal(again.tensors[0], message.tensors[0])


def test_faults_strike_where_the_script_says() -> None:
    with opened("socket/ipc") as inner:
        script = [
            Fault("a", 2, "drop_question"),
            Fault("b", 1, "drop_answer"),
            Fault("c", 1, "duplicate"),
            Fault("d", 1, "delay", delay_s=0.05),
            Fault("e", 1, "close"),
        ]
        link = FaultyLink(inner, script)
        assert link.call(Message("a"), 5).op == "ok"
        for op in ("a", "b"):
            with pytest.raises(LinkTimeout):
                link.call(Message(op), 0.3)
        assert link.call(Message("c", {"n": 1}), 5).fields["n"] == 1
        started = time.monotonic()
        assert link.call(Message("d"), 5).op == "ok"
        assert time.monotonic() - started >= 0.05
        with pytest.raises(PeerLost, match="script"):
            link.call(Message("e"), 5)
        assert [f.op for f in link.struck] == ["a", "b", "c", "d", "e"]


def test_a_duplicate_is_handled_once() -> None:
    seen: list[int] = []

    def counting(peer: str, question: Message) -> Message:
        seen.append(question.id)
        return Message("ok")

    with opened("socket/ipc", counting) as inner:
        link = FaultyLink(inner, [Fault("x", 1, "duplicate")])
        link.call(Message("x"), 5)
        link.call(Message("y"), 5)
    assert len(seen) == 2
