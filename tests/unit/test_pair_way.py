"""A way over two communicators: what goes where, and its end."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.errors import PeerLost
from actors.transport.payload.pair import PairWay


class Communicator:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Tensor, int]] = []

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        self.calls.append(("send", tensors[0], rank))

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        self.calls.append(("recv", tensors[0], rank))
        tensors[0].fill_(1)


def _nothing() -> None:
    pass


def test_each_direction_has_its_communicator_and_takes_bytes() -> None:
    there, here = Communicator(), Communicator()
    way = PairWay(there, here, "expert-0", 1, threading.Event(), _nothing)
    way.send(torch.zeros(2, 3))
    room = torch.zeros(2, 3, dtype=torch.uint8)
    way.receive(room)
    ((op, sent, rank),) = there.calls
    assert (op, sent.dtype, sent.shape, rank) == ("send", torch.uint8, (24,), 1)
    assert [call[0] for call in here.calls] == ["recv"]
    assert room.eq(1).all(), "it is received in place"


def test_who_holds_graphs_of_it_lets_go_at_its_end() -> None:
    ended, dropped = threading.Event(), list[str]()
    way = PairWay(Communicator(), Communicator(), "expert-0", 1, ended, ended.set)
    way.when_over(lambda: dropped.append("first"))
    assert not way.is_over
    assert not dropped
    way.end()
    assert way.is_over
    way.let_go()
    assert dropped == ["first"]
    held, late = threading.Lock(), threading.Event()

    def drop() -> None:
        with held:
            late.set()

    with held:  # as an expert host's, around every question
        way.when_over(drop)
    assert late.wait(10), "whoever comes too late lets go at once"
    way.forget()
    with pytest.raises(PeerLost, match="expert-0"):
        way.send(torch.zeros(1))
    with pytest.raises(PeerLost, match="has ended"):
        way.receive(torch.zeros(1))


class Aborted(Communicator):
    """By another thread, which has not forgotten it yet."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        raise RuntimeError("NCCL communicator was aborted")

    recv = send


def test_a_communicator_that_is_being_ended_is_a_lost_peer() -> None:
    ended = threading.Event()
    way = PairWay(Aborted(), Aborted(), "expert-0", 1, ended, ended.set)
    with pytest.raises(RuntimeError, match="aborted"):
        way.send(torch.zeros(1))
    ended.set()
    for call in (way.send, way.receive):
        with pytest.raises(PeerLost, match="has ended"):
            call(torch.zeros(1))
