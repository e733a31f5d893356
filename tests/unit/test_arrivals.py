"""A group that is given up on its way, and set out for again at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pytest
import torch

from actors.errors import LinkError, StepAborted
from actors.expert.arrivals import Arrivals
from actors.expert.exchange import Exchange
from actors.fairlock import FairLock
from actors.optim import OptimizerSettings
from actors.transport.message import Message
from actors.values import Address

WAIT_S = 10.0
HERE = Address("host", "ipc://x", "tcp://x")
LAYER = Message("ok", {"version": 3, "updates": 3, "run": 1, "optimizer": asdict(OptimizerSettings())})


class Holdings:
    """Two layers; what arrives is noted."""

    def __init__(self) -> None:
        self.stacks = (0, 1)
        self.arriving: tuple[int, ...] = ()
        self.written: list[int] = []
        self.free_places = 0
        self.on_room: Callable[[], None] = lambda: None

    def places_with(self, count: int) -> int:
        return 3 + max(0, count - self.free_places)

    def room_for(self, layer: int, num_places: int) -> list[Any]:
        self.on_room()
        return [layer, num_places]

    def widen(self, layer: int, num_places: int, room: list[Any]) -> None:
        assert room == [layer, num_places]
        self.free_places = num_places - 3

    def reserve(self, group: int, settings: OptimizerSettings, coming: int = 1) -> None:
        assert self.free_places >= coming, "room is made before, for all at once"
        self.free_places -= 1
        self.arriving += (group,)

    def write(self, group: int, layer: int, tensors: object, updates: int) -> None:
        assert group in self.arriving
        self.written.append(layer)

    def free(self, group: int) -> None:
        self.arriving, self.written = tuple(g for g in self.arriving if g != group), []
        self.free_places += 1


class Asking:
    """To the group's owner, who is asked for one layer after the other."""

    peer = "owner"

    def __init__(self, answer: Callable[[int], Message]) -> None:
        self._answer, self.cut_off = answer, threading.Event()

    def call(self, question: Message, timeout_s: float) -> Message:
        return self._answer(question.fields["layer"])

    def start(self, question: Message) -> None: ...

    def cut(self) -> None:
        self.cut_off.set()

    def close(self) -> None: ...


def link(answer: Callable[[int], Message]) -> Any:
    return Asking(answer)


def unreachable(name: str, address: Address) -> Any:
    raise LinkError("nobody is there", peer=name)


def update(group: int, version: int) -> Message:
    fields = {"group": group, "layer": 0, "version": version, "lr": 0.1, "scale": 1.0}
    return Message("update", fields, (torch.ones(1),))


def test_one_that_was_given_up_does_not_take_the_next_with_it() -> None:
    holdings: Any = Holdings()
    asked, go_on = threading.Event(), threading.Event()

    def late(layer: int) -> Message:
        asked.set()
        assert go_on.wait(WAIT_S)
        return LAYER

    def meanwhile(layer: int) -> Message:
        if layer == 1:
            go_on.set()
            with pytest.raises(StepAborted, match="given up on its way"):
                first.result(WAIT_S)
        return LAYER

    links = [link(meanwhile), link(late)]
    exchange = Exchange("expert-1", lambda name, address: links.pop(), timeout_s=1.0)
    arrivals, lock = Arrivals(exchange, lambda: holdings), FairLock()
    bring = lambda: arrivals.bring(lock, 5, "owner", HERE, HERE, WAIT_S)  # noqa: E731
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(bring)
        assert asked.wait(WAIT_S)
        with lock:
            arrivals.drop(5)
        bring()
    assert holdings.written == [0, 1]
    assert arrivals.behind([5], 3, 1) == []


def test_who_is_cut_off_is_waited_for_no_longer() -> None:
    """Its node is gone: its connection stays open, and nothing comes."""
    asked, other = threading.Event(), Asking(lambda layer: LAYER)

    def nothing(layer: int) -> Message:
        asked.set()
        assert owner.cut_off.wait(WAIT_S)
        raise LinkError("cut", peer="owner")

    owner, holdings = Asking(nothing), Holdings()
    other.peer = "another"
    links: list[Any] = [owner, other]
    as_holdings: Any = holdings
    exchange = Exchange("expert-1", lambda name, address: links.pop(), timeout_s=1.0)
    exchange.open("another", HERE)
    arrivals = Arrivals(exchange, lambda: as_holdings)
    with ThreadPoolExecutor(1) as pool:
        brought = pool.submit(arrivals.bring, FairLock(), 5, "owner", HERE, HERE, 10 * WAIT_S)
        assert asked.wait(WAIT_S)
        exchange.cut(["owner"])
        with pytest.raises(LinkError, match="cut"):
            brought.result(WAIT_S)
    assert not other.cut_off.is_set()


@pytest.mark.parametrize("for_itself", [False, True])
def test_who_is_cut_off_while_a_link_to_it_is_opened_is_not_waited_for(for_itself: bool) -> None:
    owner = Asking(lambda layer: LAYER)

    def opened_late(name: str, address: Address) -> Any:
        exchange.cut(["owner"])
        return owner

    exchange = Exchange("expert-1", opened_late, timeout_s=1.0)
    if for_itself:
        exchange.connect({"owner": HERE})
        exchange.start("owner", Message("layer", {"layer": 0}))
    else:
        exchange.open("owner", HERE)
    assert owner.cut_off.is_set()


def test_updates_of_a_group_that_nobody_waits_for_are_dropped() -> None:
    """Its owner sends them after every step."""
    exchange = Exchange("expert-1", unreachable, timeout_s=1.0)
    assert exchange.handle("owner", update(5, 1)).op == "ok"
    exchange.expect_updates(5)
    exchange.handle("owner", update(5, 2))
    assert exchange.update(5, 0, 1) is None
    assert exchange.update(5, 0, 2) is not None
    exchange.forget_updates(5)
    exchange.handle("owner", update(5, 3))
    assert exchange.update(5, 0, 3) is None


def test_a_question_comes_between_whatever_arrives() -> None:
    """Room for all groups is made at once, and not while the host is held; then piece by piece, one group after the
    other."""
    holdings, lock = Holdings(), FairLock()
    is_held, made = threading.Event(), []

    def on_room() -> None:
        assert lock.acquire(timeout_s=0), "the host is free while memory is touched"
        lock.release()
        made.append(len(holdings.arriving))

    def one_after_the_other(layer: int) -> Message:
        assert is_held.wait(WAIT_S)
        return LAYER

    holdings.on_room = on_room
    exchange = Exchange("expert-1", lambda name, address: link(one_after_the_other), timeout_s=1.0)
    as_holdings: Any = holdings
    arrivals, groups = Arrivals(exchange, lambda: as_holdings), range(5)
    with ThreadPoolExecutor(len(groups)) as pool:
        brought = [pool.submit(arrivals.bring, lock, group, "owner", HERE, HERE, WAIT_S) for group in groups]
        until(lambda: len(arrivals.behind(groups, 3, 1)) == len(arrivals.coming) == len(groups))
        with lock:  # as a question does
            is_held.set()
            until(lambda: lock.num_waiting > 0)
            time.sleep(0.05)
            assert lock.num_waiting == 1, "one of them is before the next question, not all"
        for future in brought:
            future.result(WAIT_S)
    assert made == [0, 0], "once for both layers, before the first of five"
    assert sorted(holdings.arriving) == list(groups)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)
