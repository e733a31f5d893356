"""Messages that go ahead of their tensors: read at once, handed on when all of it is there, and never before."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from actors.errors import ProtocolError
from actors.transport.message import Message, Unreadable, encode
from actors.transport.payload import shm
from actors.transport.payload.contract import AUTO
from actors.transport.payload.line import LOOK_OUT_S, Line
from actors.transport.payload.shm import LATE_FROM_BYTES
from actors.transport.socket import SocketLink, SocketServer
from tests.contract.test_payloads import WAIT_S, opened, serving, until

LONG = torch.arange(LATE_FROM_BYTES // 4, dtype=torch.float32)


class Carrier:
    """One whose tensors are as late as it is told."""

    kind = "shm"

    def __init__(self) -> None:
        self.is_late = False
        self.finished = 0

    def finish(self) -> None:
        self.is_late = False
        self.finished += 1

    def hear(self, tickets: list[int]) -> None:
        pass


class Ends:
    """Both ends of a line."""

    def __init__(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.carrier: Any = Carrier()
        self.sends = Line(here, self.carrier, "there", max_bytes=1 << 20, takes_messages=True)
        self.receives = Line(there, self.carrier, "here", max_bytes=1 << 20, takes_messages=True)

    @property
    def ahead(self) -> str:
        """What has been read and may lack tensors."""
        message = self.receives._ahead
        return message.op if isinstance(message, Message) else ""

    def received(self) -> list[str]:
        return ops(self.receives.receive())


def frames(op: str, *tensors: torch.Tensor) -> Any:
    return encode(Message(op, {}, tensors))


def ops(messages: list[Any]) -> list[str]:
    return [message.op for message in messages]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    for line in (ends.sends, ends.receives):
        line._connection.close()


def send_half(ends: Ends, op: str) -> Any:
    """The message goes ahead; what is called later sends the rest."""
    follow_up = ends.sends._follow_up
    ends.sends._follow_up = lambda: None  # type: ignore[method-assign]
    ends.carrier.is_late = True
    assert ends.sends.send(frames(op)) is None
    ends.sends._follow_up = follow_up  # type: ignore[method-assign]
    return follow_up


def test_it_is_read_at_once_and_handed_on_when_it_is_there(ends: Ends) -> None:
    follow_up = send_half(ends, "one")
    before = time.monotonic()
    assert ends.received() == []
    assert ends.ahead == "one"
    assert before + LOOK_OUT_S <= ends.receives.look_out_until <= time.monotonic() + LOOK_OUT_S
    assert ends.carrier.finished == 0
    assert follow_up() is None
    assert ends.carrier.finished == 1
    assert ends.received() == ["one"]
    assert ends.receives.look_out_until == 0.0


def test_what_is_complete_goes_in_one_piece(ends: Ends) -> None:
    assert ends.sends.send(frames("one")) is None
    assert ends.received() == ["one"]
    assert ends.received() == []
    assert ends.carrier.finished == 0


def test_the_next_one_says_as_well_that_all_of_it_is_there(ends: Ends) -> None:
    """A sender begins nothing new before it has finished: were the word lost, this would do."""
    send_half(ends, "one")
    ends.carrier.is_late = False
    ends.sends.send(frames("two"))
    assert ends.received() == []
    assert ends.received() == ["one", "two"]


def test_one_after_the_other_goes_ahead(ends: Ends) -> None:
    for op in ("one", "two", "three"):
        ends.carrier.is_late = True
        ends.sends.send(frames(op))
    assert [ends.received() for _ in range(6)] == [[], ["one"], [], ["two"], [], ["three"]]


def test_a_full_line_sends_the_word_the_other_way(ends: Ends) -> None:
    """It is numbered as a message is, and may be there before what went ahead."""
    send_half(ends, "one")
    ends.sends._say = lambda parts: False  # type: ignore[method-assign]
    word = ends.sends._follow_up()
    assert word is not None
    long = ends.sends.send(frames("two"))
    assert long is not None
    assert ends.receives.arrived(word) == []
    assert ends.receives.arrived(long) == []
    assert ends.received() == ["one", "two"]


def test_what_does_not_fit_the_line_is_complete_before_it_crosses(ends: Ends) -> None:
    ends.carrier.is_late = True
    rest = ends.sends.send(frames("long", torch.zeros(1 << 14)))
    assert rest is not None
    assert ends.carrier.finished == 1
    assert ops(ends.receives.arrived(rest)) == ["long"]


def test_what_cannot_be_read_takes_nothing_along(ends: Ends) -> None:
    send_half(ends, "one")
    ends.carrier.is_late = False
    ends.sends.send([b"\xc1"])
    ends.sends.send(frames("three"))
    found = [message for _ in range(3) for message in ends.receives.receive()]
    assert [getattr(message, "op", "") for message in found] == ["one", "", "three"]
    assert isinstance(found[1], Unreadable)
    assert isinstance(found[1].error, ProtocolError)


# Over links.


@contextmanager
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing long is copied before the event is set; small things are."""
    goes_on, copy = threading.Event(), shm._copy

    def wait(region: torch.Tensor, start: int, tensor: torch.Tensor) -> None:
        if tensor.numel() == LONG.numel():
            assert goes_on.wait(WAIT_S)
        copy(region, start, tensor)

    monkeypatch.setattr(shm, "_copy", wait)
    yield goes_on
    goes_on.set()


def asked(link: SocketLink, answers: list[Any], question: Message) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(link.call(question, WAIT_S)), daemon=True)
    thread.start()
    return thread


def has_been_read(server: SocketServer) -> bool:
    return any(line._ahead is not None for line in list(server._inbox._attachments._lines.values()))


def test_a_peer_that_stops_in_the_middle_keeps_nobody_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[float] = []

    def add_up(peer: str, question: Message) -> Message:
        sums.append(float(question.tensors[0].sum()))
        return Message("ok")

    with serving(add_up, AUTO) as server, stuck(monkeypatch) as goes_on:
        slow, quick = opened(server.address, AUTO), opened(server.address, AUTO)
        answers: list[Any] = []
        thread = asked(slow, answers, Message("x", {}, (LONG,)))
        until(lambda: has_been_read(server))
        for number in range(5):
            quick.call(Message("x", {}, (torch.tensor([float(number)]),)), WAIT_S)
        assert sums == [0.0, 1.0, 2.0, 3.0, 4.0]
        goes_on.set()
        thread.join(WAIT_S)
        assert [answer.op for answer in answers] == ["ok"]
        assert sums[5:] == [float(LONG.sum())]
        for link in (slow, quick):
            link.close()


def test_what_a_peer_left_half_done_is_handled_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[str] = []

    def note(peer: str, question: Message) -> Message:
        handled.append(question.op)
        return Message("ok")

    with serving(note, AUTO) as server, stuck(monkeypatch) as goes_on:
        link = opened(server.address, AUTO)
        thread = threading.Thread(target=lambda: link.start(Message("x", {}, (LONG,))), daemon=True)
        thread.start()
        until(lambda: has_been_read(server))
        assert link._line is not None
        link._line._connection.shutdown(socket.SHUT_RDWR)  # as the death of its process does
        until(lambda: not server._inbox._attachments._lines)
        goes_on.set()
        thread.join(WAIT_S)
        other = opened(server.address, AUTO)
        assert other.call(Message("y"), WAIT_S).op == "ok"
        assert handled == ["y"]
        for each in (link, other):
            each.close()


def test_the_answer_may_go_ahead_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda peer, question: Message("ok", {}, (LONG,)), AUTO) as server:
        link = opened(server.address, AUTO)
        for _ in range(20):
            found = link.call(Message("x"), WAIT_S).tensors[0]
            assert torch.equal(found, LONG)
        with stuck(monkeypatch) as goes_on:
            pending = link.start(Message("x"))
            assert link._line is not None
            deadline = time.monotonic() + WAIT_S
            while link._line._ahead is None:
                assert not link.look(pending.id, 0.05)
                assert time.monotonic() < deadline, "it does not go ahead"
            assert not link.look(pending.id, 0.05)
            goes_on.set()
            assert torch.equal(pending.result(WAIT_S).tensors[0], LONG)
        link.close()


def test_messages_keep_their_order_whatever_goes_ahead() -> None:
    sizes = [LONG.numel() if n % 3 == 0 else 8 if n % 3 == 1 else 1 << 14 for n in range(30)]
    seen: list[int] = []

    def note(peer: str, question: Message) -> Message:
        seen.append(int(question.fields["n"]))  # type: ignore[call-overload]
        return Message("ok", {}, question.tensors)

    with serving(note, AUTO) as server:
        link = opened(server.address, AUTO)
        questions = [Message("x", {"n": n}, (torch.full((size,), float(n)),)) for n, size in enumerate(sizes)]
        pending = [link.start(question) for question in questions]
        for number, each in enumerate(pending):
            assert torch.equal(each.result(WAIT_S).tensors[0], questions[number].tensors[0])
        assert seen == list(range(30))
        link.close()
