"""A router's links without actors: who is lost, who is tried again, and questions to all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from actors.errors import LinkTimeout, PeerLost, StepAborted
from actors.router.links import Links
from actors.router.roster import Peer
from actors.transport.contract import Link
from actors.transport.message import Message


class Actors:
    """Those named in `dead` cannot be reached; `refuse` answers a question with an error."""

    def __init__(self) -> None:
        self.dead: set[str] = set()
        self.refuse: dict[str, Exception] = {}
        self.opened: list[str] = []
        self.asked: list[str] = []

    def peers(self, *names: str) -> dict[str, Peer]:
        return {name: Peer(self._opener(name), near=name == "a") for name in names}

    def _opener(self, name: str) -> Callable[[], Link]:
        def open_link() -> Link:
            self.opened.append(name)
            if name in self.dead:
                raise PeerLost("dead", peer=name)
            return FakeLink(name, self)

        return open_link


class FakeLink(Link):
    def __init__(self, peer: str, actors: Actors) -> None:
        super().__init__(peer)
        self._actors, self._sent = actors, list[Message]()

    def _send(self, question: Message) -> None:
        if self.peer in self._actors.dead:
            raise PeerLost("dead", peer=self.peer)
        self._actors.asked.append(self.peer)
        self._sent.append(question)

    def _receive(self, deadline: float) -> Message:
        if (error := self._actors.refuse.get(self.peer)) is not None:
            raise error
        return Message("ok", {"name": self.peer}, (), self._sent.pop(0).id)


@pytest.fixture
def actors() -> Actors:
    return Actors()


def test_links_are_to_exactly_these_actors(actors: Actors) -> None:
    links = Links(timeout_s=1.0, reroutes=False)
    links.connect(actors.peers("a", "b"))
    first, second = links["a"], links["b"]
    links.connect(actors.peers("b", "c"))
    assert (list(links), actors.opened) == (["b", "c"], ["a", "b", "c"])
    assert (first.closed, second.closed, links["b"] is second) == (True, False, True)
    second.close()
    links.drop_closed(but=actors.peers("c"))
    assert list(links) == ["c"]


def test_a_lost_actor_is_tried_again_once(actors: Actors) -> None:
    links, news = Links(timeout_s=1.0, reroutes=True), list[frozenset[str]]()
    links.connect(actors.peers("a", "b"))
    links.on_lost = lambda: news.append(links.lost)
    actors.dead.add("b")
    assert list(links.ask_all("status", {})) == ["a"]
    assert links.reopen() == []
    assert news == [{"b"}, frozenset(), {"b"}], "lost, tried again, lost"
    actors.dead.clear()
    assert links.reopen() == []
    assert links.lost == {"b"}, "others hold what it holds"
    links.reopen(everybody=True)
    assert links.lost == frozenset()
    assert list(links.ask_all("status", {})) == ["a", "b"]


def test_who_does_not_reroute_names_those_that_are_gone(actors: Actors) -> None:
    links = Links(timeout_s=1.0, reroutes=False)
    links.connect(actors.peers("a", "b"))
    actors.dead.add("b")
    with pytest.raises(PeerLost):
        links.ask_all("status", {})
    assert links["b"].closed
    assert (links.reopen(), links.lost) == (["b"], frozenset())
    actors.dead.clear()
    assert links.reopen() == []
    assert not links["b"].closed


def test_who_was_cut_off_is_not_opened_again(actors: Actors) -> None:
    links = Links(timeout_s=1.0, reroutes=False)
    links.connect(actors.peers("a"))
    links.cut(["a", "unknown"])
    links.close_some(["a", "unknown"])
    assert links.reopen() == ["a"]
    assert actors.opened == ["a"]


def test_who_is_cut_off_while_its_link_is_opened_is_not_waited_for(actors: Actors) -> None:
    links, peers = Links(timeout_s=1.0, reroutes=False), actors.peers("a")
    open_link = peers["a"].open

    def opened_late() -> Link:
        link = open_link()
        links.cut(["a"])
        return link

    links.connect(peers)
    links.connect({"a": replace(peers["a"], open=opened_late)})
    links.close_some(["a"])
    links.reopen()
    with pytest.raises(PeerLost, match="closed"):
        links.start("a", Message("x"))
    links.close_some(["a"])
    assert links.reopen() == ["a"]


def test_the_first_error_is_raised_after_all_were_asked(actors: Actors) -> None:
    links = Links(timeout_s=1.0, reroutes=True)
    links.connect(actors.peers("a", "b", "c"))
    actors.refuse = {"a": StepAborted("first"), "b": LinkTimeout("second", peer="b")}
    with pytest.raises(StepAborted, match="first"):
        links.ask_all("prepare", {})
    assert actors.asked == ["a", "b", "c"]
    assert list(links.ask_all("prepare", {}, among=["c"])) == ["c"]
