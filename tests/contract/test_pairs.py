"""Links with communicators of their own, as between two GPUs, here over gloo: the same class, its order, deaths,
aborts and building anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch

from actors.errors import PeerLost, ProtocolError
from actors.transport.message import Message
from actors.transport.payload.contract import PayloadSettings
from actors.transport.payload.pair import GlooPair, PairCarrier
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address

MAX_BYTES = 1 << 24
PAIR = PayloadSettings("gloo", region_bytes=1 << 20, carry_from_bytes=1 << 10)
QUARTER = (1 << 20) // 4 // 4
"""Elements of float32 that are a quarter of what may be on its way."""
WAIT_S = 60.0
SOON_S = 20.0
"""Less than any deadline that a payload has."""

_CHILD = """
import json, sys, time
from dataclasses import asdict
import torch
from actors.transport.message import Message
from actors.transport.payload.contract import PayloadSettings
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address
settings = PayloadSettings("gloo", region_bytes=1 << 20, carry_from_bytes=1 << 10)

class Mute:
    def __init__(self, way):
        self.way = way  # which would close its connections otherwise
    def send(self, *args):
        pass
    def abort(self):
        pass

def mute(carrier):
    there, here = carrier._ends
    carrier._ends = Mute(there), here

if len(sys.argv) > 1:
    address = Address(**json.loads(sys.argv[1]))
    link = SocketLink("peer", address, name="child", max_bytes=1 << 24, timeout_s=60, payload=settings)
    link.call(Message("x", {}, (torch.ones(1 << 16),)), 60)
    mute(link._line.carrier)
    link.start(Message("x", {}, (torch.ones(1 << 16),)))
else:
    def handle(peer, question):
        if question.op == "mute":
            for line in server._inbox._attachments._lines.values():
                mute(line.carrier)
        return Message("ok", {}, question.tensors)
    server = SocketServer("child", handle, max_bytes=1 << 24, payload=settings)
    server.start()
    print(json.dumps(asdict(server.address)), flush=True)
if len(sys.argv) > 1:
    print("sent", flush=True)
time.sleep(120)
"""


@contextmanager
def child(*args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen([sys.executable, "-c", _CHILD, *args], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.wait(10)


def opened(address: Address) -> SocketLink:
    link = SocketLink("peer", address, name="router", max_bytes=MAX_BYTES, timeout_s=WAIT_S, payload=PAIR)
    assert link.kind == "socket/ipc+gloo"
    return link


def carrier_of(link: SocketLink) -> PairCarrier:
    assert link._line is not None
    assert isinstance(link._line.carrier, PairCarrier)
    return link._line.carrier


@pytest.mark.parametrize("how", ["killed", "cut"])
def test_a_payload_that_will_not_come_is_not_waited_for(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, waits = torch.randn(QUARTER), threading.Event()
    ended_at: list[float] = []
    with child() as (process, said):
        pid = process.pid
        link = opened(Address(**json.loads(said)))
        assert torch.equal(link.call(Message("x", {}, (tensor,)), WAIT_S).tensors[0], tensor)
        backend = carrier_of(link)._backend
        settle = backend.settle

        def noted(work: Any, is_over: Callable[[], bool]) -> None:
            waits.set()
            settle(work, is_over)

        monkeypatch.setattr(backend, "settle", noted)
        end = link.cut if how == "cut" else lambda: os.kill(pid, signal.SIGKILL)

        def end_it() -> None:
            assert waits.wait(WAIT_S)
            ended_at.append(time.monotonic())
            end()

        ending = threading.Thread(target=end_it, daemon=True)
        ending.start()
        pending = link.start(Message("mute", {}, (tensor,)))  # the header of its answer comes, the payload does not
        with pytest.raises(PeerLost, match="payload did not come"):
            pending.result(WAIT_S)
        with pytest.raises(PeerLost, match="peer"):
            link.call(Message("x"), WAIT_S)
        assert time.monotonic() - ended_at[0] < SOON_S
        ending.join(WAIT_S)
        link.close()
    with child() as (_, said):  # another in its place
        link = opened(Address(**json.loads(said)))
        assert torch.equal(link.call(Message("x", {}, (tensor,)), WAIT_S).tensors[0], tensor)
        link.close()


def test_a_server_goes_on_without_a_router_that_died_in_the_middle() -> None:
    server = SocketServer("peer", lambda _, q: Message("ok", {}, q.tensors), max_bytes=MAX_BYTES, payload=PAIR)
    server.start()
    link = opened(server.address)
    with child(json.dumps(asdict(server.address))) as (process, said):
        assert said.strip() == "sent"  # a header whose payload does not come: the server waits for it
        os.kill(process.pid, signal.SIGKILL)
        started = time.monotonic()
        tensor = torch.randn(QUARTER)
        assert torch.equal(link.call(Message("x", {}, (tensor,)), WAIT_S).tensors[0], tensor)
        assert time.monotonic() - started < SOON_S
    link.close()
    server.stop()


def test_what_is_too_much_at_once_crosses_the_socket() -> None:
    release, seen = threading.Event(), list[float]()

    def slow(peer: str, question: Message) -> Message:
        release.wait(WAIT_S)
        seen.append(float(question.tensors[0][0]))
        return Message("ok", {}, question.tensors)

    server = SocketServer("peer", slow, max_bytes=MAX_BYTES, payload=PAIR)
    server.start()
    link = opened(server.address)
    pending = [link.start(Message("x", {}, (torch.full((QUARTER,), float(n)),))) for n in range(12)]
    assert len(carrier_of(link)._going) == 4
    release.set()
    answers = [each.result(WAIT_S).tensors[0] for each in pending]
    assert all(torch.equal(answer, torch.full((QUARTER,), float(n))) for n, answer in enumerate(answers))
    assert seen == list(range(12))
    link.call(Message("x", {}, (torch.zeros(QUARTER),)), WAIT_S)
    assert not carrier_of(link)._going, "all are there, as the last answer has told"
    link.close()
    server.stop()


@pytest.fixture
def pair() -> Iterator[tuple[PairCarrier, PairCarrier]]:
    first, second = (PairCarrier(PAIR, "stranger", rank, GlooPair()) for rank in (0, 1))
    second.meet(first.offer(), [])
    first.meet(second.offer(), [])
    yield first, second
    first.close()
    second.close()


@pytest.mark.parametrize("place", [(2,), (0,), (1, 0), ()])
def test_payloads_out_of_turn_end_the_pair(pair: tuple[PairCarrier, PairCarrier], place: tuple[int, ...]) -> None:
    first, second = pair
    assert first.put(torch.ones(QUARTER)) == (1,)
    with pytest.raises(ProtocolError, match="stranger"):
        second.take(torch.float32, (QUARTER,), place)
    with pytest.raises((ProtocolError, PeerLost), match="stranger"):
        second.take(torch.float32, (QUARTER,), (1,))
    assert second.put(torch.ones(QUARTER)) is None, "the rest crosses the socket"


def test_a_peer_that_does_not_come_is_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.transport.payload.pair.BUILD_TIMEOUT_S", 1.0)
    alone = PairCarrier(PAIR, "nobody", 0, GlooPair())
    with pytest.raises(ProtocolError, match="nobody"):
        alone.meet({}, [])
    assert alone.put(torch.ones(QUARTER)) is None
    directory = os.path.dirname(alone.offer()["store"])
    alone.close()
    deadline = time.monotonic() + SOON_S
    while os.path.exists(directory):
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Mark:
    """Of the device's way through what it was given."""

    is_through = False

    def query(self) -> bool:
        return self.is_through


class OnDevice(GlooPair):
    """As with a GPU nobody waits on the host, once the ends have met."""

    is_ordered = True

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.have_met = False

    def settle(self, work: Any, is_over: Callable[[], bool]) -> None:
        if not self.have_met:
            super().settle(work, is_over)

    def mark(self) -> Mark:
        self.marks.append(Mark())
        return self.marks[-1]


@pytest.fixture
def on_device() -> Iterator[tuple[PairCarrier, PairCarrier, OnDevice]]:
    """Both ends, and the second one's device."""
    backends = OnDevice(), OnDevice()
    first, second = (PairCarrier(PAIR, "stranger", rank, backend) for rank, backend in enumerate(backends))
    second.meet(first.offer(), [])
    first.meet(second.offer(), [])
    second._built()
    for backend in backends:
        backend.have_met = True
    yield first, second, backends[1]
    first.close()
    second.close()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_index_that_never_comes_is_one_of_something(
    on_device: tuple[PairCarrier, PairCarrier, OnDevice], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its peer ends the device goes on with the memory as it is."""
    _, second, device = on_device
    monkeypatch.setattr(device, "room", lambda shape, dtype: torch.full(shape, 1 << 30, dtype=dtype))
    assert not second.take(dtype, (QUARTER,), (1,)).any()


def test_the_device_has_a_deadline_for_a_payload(
    on_device: tuple[PairCarrier, PairCarrier, OnDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host goes on, perhaps to wait for the device: nobody looks at the link then."""
    monkeypatch.setattr("actors.transport.payload.pair.LOOK_EVERY_S", 0.01)
    timeout = "actors.transport.payload.pair.TAKE_TIMEOUT_S"
    first, second, device = on_device
    over = second.over
    assert over is not None
    for number in (1, 2):
        assert first.put(torch.ones(QUARTER)) == (number,)
        second.take(torch.float32, (QUARTER,), (number,))
        device.marks[-1].is_through = True
        with monkeypatch.context() as patched:
            patched.setattr(timeout, 0.3)
            assert not over.wait(0.5), "what came in time ends nothing"
    monkeypatch.setattr(timeout, 0.3)
    second.take(torch.float32, (QUARTER,), (3,))
    assert len(second._coming) == 1
    assert over.wait(SOON_S)
    with pytest.raises(PeerLost, match="stranger"):
        second.take(torch.float32, (QUARTER,), (4,))


def test_without_memory_for_a_payload_the_next_one_is_not_taken_for_it(
    on_device: tuple[PairCarrier, PairCarrier, OnDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, device = on_device

    def full(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        raise torch.OutOfMemoryError

    assert first.put(torch.ones(QUARTER)) == (1,)
    with monkeypatch.context() as patched:
        patched.setattr(device, "room", full)
        with pytest.raises(torch.OutOfMemoryError):
            second.take(torch.float32, (QUARTER,), (1,))
    with pytest.raises(PeerLost, match="stranger"):
        second.take(torch.float32, (QUARTER,), (2,))
