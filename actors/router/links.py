"""A router's links to expert actors: opened, found lost, opened again; and questions that go to all of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, ItemsView, Iterator, Mapping, Sequence, ValuesView
from typing import Any

from actors.errors import LinkError, MoeClusterError, PeerLost
from actors.router.parcels import Parcel
from actors.router.relays import RelayedPending, Relays
from actors.router.roster import Peer
from actors.transport.contract import Link, Pending
from actors.transport.message import Message

logger = logging.getLogger(__name__)


class Links(Mapping[str, Link]):
    """By actor, in the order of the roster. One that `reroutes` knows of actors that it has lost and goes on without
    them; for any other a lost actor is an error. One thread at a time, but for looking a link up."""

    def __init__(self, *, timeout_s: float, reroutes: bool) -> None:
        self.on_lost: Callable[[], None] = lambda: None
        """Called when others than before are lost."""
        self.relays = Relays()
        self.timeout_s, self._reroutes = timeout_s, reroutes
        self._links: dict[str, Link] = {}
        self._peers: dict[str, Peer] = {}
        self._lost: set[str] = set()
        """Without a living link; only of those that reroute."""
        self._just_lost: set[str] = set()
        """Those of them that were not tried again."""

    def __getitem__(self, name: str) -> Link:
        return self._links[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._links)

    def __len__(self) -> int:
        return len(self._links)

    def items(self) -> ItemsView[str, Link]:
        return self._links.items()  # which another thread may list at once

    def values(self) -> ValuesView[Link]:
        return self._links.values()

    # -- actors come and go: between forwards -------------------------------------------------------------------------

    def connect(self, peers: Mapping[str, Peer]) -> None:
        """To exactly these actors. Those that are there already stay."""
        for name in [n for n in self._links if n not in peers]:
            self._links.pop(name).close()
        self._peers = dict(peers)
        self.relays.connect(peers)
        for name, peer in peers.items():
            if name not in self._links:
                self._links[name] = peer.open()

    def open_missing(self, peers: Mapping[str, Peer]) -> list[str]:
        """To those of them that have no link. -> who cannot be reached."""
        gone = []
        for name in [name for name in peers if name not in self._links]:
            try:
                self._links[name] = peers[name].open()
                self._peers[name] = peers[name]
            except LinkError:
                gone.append(name)
        return gone

    def drop_closed(self, but: Mapping[str, Peer]) -> None:
        """Forgets the actors that are gone and not among these."""
        for name in [n for n, link in self._links.items() if link.closed and n not in but]:
            del self._links[name], self._peers[name]

    @property
    def lost(self) -> frozenset[str]:
        """Actors that are rerouted around."""
        return frozenset(self._lost)

    @property
    def unreachable(self) -> frozenset[str]:
        """Those, and actors that whoever asks finds lost."""
        return frozenset(self._lost.union(name for name, link in self._links.items() if link.is_cut or link.closed))

    def kinds(self) -> dict[str, str]:
        """By actor, and over whose relay tokens reach it, if over one. From any thread."""
        ways = self.relays.ways()
        links = list(self._links.items())
        return {name: f"{link.kind} via {ways[name]}" if name in ways else link.kind for name, link in links}

    def is_near(self, name: str) -> bool:
        """As of its `Peer`."""
        return self._peers[name].near

    def find_all(self) -> None:
        """Nobody is lost any more: another placement begins."""
        self._lost.clear()
        self._just_lost.clear()
        self.relays.try_all()

    def reopen(self, *, everybody: bool = False) -> list[str]:
        """Opens closed links again, of lost actors once, or if `everybody` is needed, each time.

        -> actors that are gone for good; none if this one reroutes around them.
        """
        # A link may end though its actor lives.
        if again := self._lost if everybody else self._just_lost:
            self._lost = self._lost - again
            self.on_lost()
        gone = []
        for name, link in self._links.items():
            if link.closed and name not in self._lost:
                try:
                    if link.is_cut:
                        # A frozen process still takes connections: who asks it anew waits in vain.
                        raise PeerLost("it was cut off", peer=name)
                    self._links[name] = self._peers[name].open()
                    if link.is_cut:  # while it was being opened
                        self._links[name].cut()
                except LinkError:
                    gone.append(name)
        for name in gone if self._reroutes else ():
            self._lose(name)
        self._just_lost.clear()
        return [] if self._reroutes else gone

    def _lose(self, name: str) -> None:
        logger.warning("%s is lost; its work goes to other holders of its experts", name)
        self._links[name].close()
        self._lost.add(name)
        self._just_lost.add(name)
        self.on_lost()

    def close_some(self, names: Sequence[str]) -> None:
        """Others cannot reach these: whether they are gone is found out by opening the links again."""
        for name in names:
            if (link := self._links.get(name)) is not None:
                link.close()
        self.relays.close(names)

    def cut(self, names: Collection[str]) -> None:
        """Every wait for these ends. From any thread."""
        self.relays.cut(names)
        for name in names:
            while (link := self._links.get(name)) is not None and not link.is_cut:
                link.cut()  # and the one that is in its place meanwhile

    def forget(self) -> None:
        """Nobody waits for the open questions any more."""
        for link in self._links.values():
            link.forget()
        self.relays.forget()

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self.relays.close()

    # -- questions to all ---------------------------------------------------------------------------------------------

    def ask_all(
        self, op: str, fields: Mapping[str, Any], timeout_s: float | None = None, *, among: Sequence[str] | None = None
    ) -> dict[str, Message]:
        """The same question to every actor (that is not lost). Raises the first error, after all were asked."""
        names = [n for n in (self._links if among is None else among) if n not in self._lost]
        answers = self.answers([self.start(name, Message(op, fields)) for name in names], timeout_s)
        return {name: answer for name, answer in zip(names, answers, strict=True) if answer is not None}

    def start_each(self, op: str, fields: Mapping[str, Any]) -> list[Pending | None]:
        """The same question to every actor, without waiting. None where it could not be sent."""
        return [_try_start(link, Message(op, fields)) for link in self._links.values()]

    def tell_living(self, op: str, fields: Mapping[str, Any]) -> None:
        """Best effort to every open link, errors logged: used to clean up after a failure."""
        self.relays.forget()
        for link in self._links.values():
            if not link.closed:
                link.forget()
                try:
                    link.call(Message(op, fields), self.timeout_s)
                except MoeClusterError as error:
                    logger.info("%s was not told to %s: %s", link.peer, op, error)
                    if isinstance(error, PeerLost):
                        link.close()  # so that it is opened again before the next try, not found broken in it

    # -- questions to some --------------------------------------------------------------------------------------------

    def start(self, name: str, question: Message) -> Pending | None:
        """None if the actor is found lost, where that is rerouted."""
        if name not in self._links:
            raise PeerLost("there is no link to it any more", peer=name)
        try:
            return self._links[name].start(question)
        except PeerLost:
            self._links[name].close()
            if not self._reroutes:
                raise
            self._lose(name)
            return None

    def start_parcel(self, parcel: Parcel, question: Message) -> Pending | None:
        """As `start`, to all actors of the parcel."""
        if not parcel.is_shared:
            return self.start(parcel.names[0], question)
        try:
            return self.relays.start(parcel, question, [self._links[name] for name in parcel.names])
        except PeerLost as error:
            self.close_some([error.peer])
            if not self._reroutes:
                raise
            self._lose(error.peer)
            return None

    def answers(self, pending: Sequence[Pending | None], timeout_s: float | None = None) -> list[Message | None]:
        """All answers, in order. One error spoils the lot, but the other answers are still awaited (and dropped).

        None for an actor that is lost, where that is rerouted.
        """
        deadline = time.monotonic() + (timeout_s or self.timeout_s)
        answers: list[Message | None] = []
        failure: MoeClusterError | None = None
        for question in pending:
            if question is None:
                answers.append(None)
                continue
            answer = None
            try:
                answer = question.result(max(0.001, deadline - time.monotonic()))
            except PeerLost as error:
                if isinstance(question, RelayedPending):
                    self.close_some([error.peer])
                else:
                    question.link.close()
                if self._reroutes:
                    self._lose(error.peer)
                else:
                    failure = failure or error
            except MoeClusterError as error:
                failure = failure or error
            answers.append(answer)
        if failure is not None:
            raise failure
        return answers


def _try_start(link: Link, question: Message) -> Pending | None:
    try:
        return link.start(question)
    except LinkError as error:
        logger.warning("%s was not sent: %s", question.op, error)
        link.close()
        return None
