"""Who computes what of a step that several processes capture, and what becomes of one whose peers end in it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.errors import LinkTimeout, PeerLost
from actors.router import apart
from actors.router.apart import Ensemble, divided
from actors.transport.contract import Link
from actors.transport.message import Message
from tests.fakes.graphs import FakeWay


class Quiet(Link):
    """A peer that says nothing, and may be gone."""

    is_gone = False

    def _send(self, question: Message) -> None:
        pass

    def _receive(self, deadline: float) -> Message:
        if self.is_gone:
            raise PeerLost("killed by the test", peer=self.peer)
        raise LinkTimeout("nothing", peer=self.peer)


class Peers(dict[str, Quiet]):
    timeout_s = 30.0


class Dispatched:
    epoch = 1

    def __init__(self, *names: str) -> None:
        self.links = Peers({name: Quiet(name) for name in names})


class Done:
    """Of a device that waits for a link until it is closed."""

    def __init__(self, link: Link) -> None:
        self._link, self.asked = link, 0

    def query(self) -> bool:
        self.asked += 1
        return self._link.closed


@pytest.fixture
def dispatched() -> Dispatched:
    return Dispatched("a", "b")


def ensemble(dispatched: Any) -> Ensemble:
    ways = {name: FakeWay.pair()[0] for name in dispatched.links}
    return Ensemble(dispatched, ways, {"a": [0], "b": [1]}, torch.device("cpu"))


def test_experts_are_divided_evenly_among_those_who_hold_them() -> None:
    held = {"a": [0, 1, 2, 3], "b": [2, 3, 4, 5], "c": [0, 1, 4, 5]}
    shares = divided(held)
    assert sorted(e for experts in shares.values() for e in experts) == [0, 1, 2, 3, 4, 5]
    assert {name: len(experts) for name, experts in shares.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(set(shares[name]) <= set(held[name]) for name in held)
    assert divided({"a": [0, 1], "b": [0, 1, 2, 3]}) == {"a": [0, 1], "b": [2, 3]}
    assert divided({"a": [0, 1], "b": []}) == {"a": [0, 1]}, "nobody is asked for nothing"


def test_a_peer_that_ends_in_a_step_ends_its_wait(dispatched: Dispatched) -> None:
    gone, other = dispatched.links["b"], dispatched.links["a"]
    gone.is_gone = True
    done = Done(gone)
    with pytest.raises(PeerLost, match="killed by the test"):
        ensemble(dispatched).finish(done)
    assert gone.closed
    assert not other.closed


def test_nobody_waits_for_ever(dispatched: Dispatched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers live, and the device does not get on."""
    monkeypatch.setattr(apart, "ABORT_TIMEOUT_S", 0.0)
    dispatched.links.timeout_s = 0.05
    with pytest.raises(LinkTimeout, match="has not played"):
        ensemble(dispatched).finish(Done(Quiet("never")))
    assert all(link.closed for link in dispatched.links.values())


def test_those_who_are_silent_have_one_deadline(dispatched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatched.links.timeout_s, dispatched.purpose = 0.5, SimpleNamespace(min_version=0)
    asked = ensemble(dispatched)
    asked._numbers = dict.fromkeys(dispatched.links, 1)
    left_s: list[float] = []

    def wait(link: Quiet, deadline: float) -> Message:
        left_s.append(deadline - time.monotonic())
        time.sleep(max(0.0, deadline - time.monotonic()))
        raise LinkTimeout("nothing", peer=link.peer)

    monkeypatch.setattr(Quiet, "_receive", wait)
    assert not asked.begin()
    assert len(left_s) == 2
    assert left_s[1] < 0.01, "of the second, when that of the first is over"
    assert all(link.closed for link in dispatched.links.values())


def test_what_the_device_gives_without_a_peer_that_was_cut_off_counts_nothing(dispatched: Any) -> None:
    """The end of its way ends the wait of the device, between two looks."""
    ways = {name: FakeWay.pair()[0] for name in dispatched.links}
    cut = Ensemble(dispatched, ways, {"a": [0], "b": [1]}, torch.device("cpu"))
    ways["b"].is_ended = True
    done = Quiet("c")
    done.close()
    with pytest.raises(PeerLost) as caught:
        cut.finish(Done(done))
    assert caught.value.peer == "b"


def test_what_is_done_is_not_looked_after(dispatched: Dispatched) -> None:
    ended = Quiet("c")
    ended.close()
    done = Done(ended)
    ensemble(dispatched).finish(done)
    assert done.asked == 1
