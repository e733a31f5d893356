"""A node's relay: beside an expert host, in its process, on a thread and at an address of its own.

It takes questions for several actors of its node, asks each of them over links that stay inside the node, and answers
when all have. It waits for nobody: whatever is open stays open while other questions come and go, so an actor that does
not answer keeps only those waiting who asked it, and two relays that ask each other's actors cannot lock each other.
Relays ask expert hosts alone, never relays. To a host its questions are as any other link's.

Every link of a router has links of its own behind it, so that requests do not queue up behind training there either.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from actors.errors import InvalidInput, LinkTimeout, MoeClusterError, PeerLost, ProtocolError, RemoteError
from actors.relay.bundle import OP, Bundle, Member, failed
from actors.transport.contract import Link, Pending, answered
from actors.transport.curve import LinkKeys
from actors.transport.message import Message, error_answer
from actors.transport.payload.contract import AUTO, PayloadSettings
from actors.transport.socket.inbox import Inbox
from actors.transport.socket.rounds import Rounds
from actors.values import Address

logger = logging.getLogger(__name__)

NeighbourOpener = Callable[[str, Address], Link]
"""Opens a link to an expert actor of this node. Called on a thread of its own."""

MAX_OPEN = 64
"""Questions of one router that are open; more wait."""
IDLE_S = 60.0
"""Links behind a router's that has asked nothing for so long are closed."""
LOOK_AGAIN_MS = 1
"""How long it sleeps at most while a link is being opened."""


class Relay(Rounds):
    """`timeout_s`: for the neighbours' answers, and for a link to be opened."""

    def __init__(
        self,
        name: str,
        open_neighbour: NeighbourOpener,
        *,
        max_bytes: int,
        timeout_s: float,
        host: str = "127.0.0.1",
        keys: LinkKeys | None = None,
        payload: PayloadSettings = AUTO,
    ) -> None:
        super().__init__(name, "relay", Inbox(name, host, max_bytes, keys, payload))
        self._open_neighbour, self._timeout_s = open_neighbour, timeout_s
        self._askers: dict[bytes, _Asker] = {}

    def _release(self) -> None:
        for asker in self._askers.values():
            asker.close()

    def _round(self) -> None:
        askers = self._askers.values()
        # An answer that was taken may have left others behind it, which no poller sees any more.
        is_busy = any(asker.has_news for asker in askers)
        is_opening = any(asker.is_opening for asker in askers)
        ready = self._inbox.wait(0 if is_busy else LOOK_AGAIN_MS if is_opening else 100)
        if ready:
            self._take_in()
        for sender, asker in list(self._askers.items()):
            for answer in asker.answers():
                self._inbox.answer(sender, answer)
            asker.look_at_idle(ready)
            if asker.is_idle:
                self._askers.pop(sender).close()

    def _take_in(self) -> None:
        for sender, question in self._inbox.from_lines():
            self._take(sender, question)
        while self._inbox.has_message():
            for sender, question in self._inbox.from_zmq():
                self._take(sender, question)

    def _take(self, sender: bytes, question: Message) -> None:
        answer = self._inbox.introduce(sender, question)
        if answer is None:
            try:
                self._asker(sender).ask(question.id, self._bundle(question))
                return
            except MoeClusterError as error:
                logger.info("the relay of %s refused %s: %s", self.name, question.op, error)
                answer = error_answer(error, question.id)
            except Exception as error:
                logger.exception("the relay of %s failed in %s", self.name, question.op)
                answer = error_answer(error, question.id)
        self._inbox.answer(sender, answer)

    def _bundle(self, question: Message) -> Bundle:
        if question.op != OP:
            raise InvalidInput("unknown operation", field="op", value=question.op, remedy=f"a relay knows {OP} alone")
        bundle = Bundle.of(question)
        for member in bundle.members:
            if member.address.host_id != self.address.host_id:
                raise InvalidInput("is not on the node of this relay", field="members", value=member.name)
        return bundle

    def _asker(self, sender: bytes) -> _Asker:
        if sender not in self._askers:
            self._askers[sender] = _Asker(self.name, self._open_neighbour, self._inbox, self._timeout_s)
        return self._askers[sender]


class _Asker:
    """One link of a router, and the links inside the node behind it. Of the relay's thread."""

    def __init__(self, name: str, open_neighbour: NeighbourOpener, inbox: Inbox, timeout_s: float) -> None:
        self._name, self._open_neighbour = name, open_neighbour
        self._inbox, self._timeout_s = inbox, timeout_s
        self._neighbours: dict[Member, _Neighbour] = {}
        self._waiting: list[_Errand] = []
        """For links to be opened, or for others to end. They may overtake each other: no question of a router's link
        depends on another that is open, and one that waits for a frozen actor must not hold up the rest."""
        self._open: list[_Errand] = []
        self.has_news = False
        """Whether a neighbour said something in the last round, be it to a question that had been looked at before."""
        self._used = time.monotonic()

    def ask(self, question_id: int, bundle: Bundle) -> None:
        self._used = time.monotonic()
        self._waiting.append(_Errand(question_id, bundle, self._used + self._timeout_s))

    @property
    def is_opening(self) -> bool:
        return bool(self._waiting)

    @property
    def is_idle(self) -> bool:
        """For so long that its links had better be closed."""
        return not self._waiting and not self._open and time.monotonic() >= self._used + IDLE_S

    def answers(self) -> list[Message]:
        """Goes on with what is open, without waiting. -> answers, with the ids of their questions."""
        before = self._num_received
        done = [*self._begin_waiting(), *self._look_at_open()]
        self.has_news = self._num_received != before
        if done:
            self._used = time.monotonic()
        return done

    def look_at_idle(self, ready: Collection[object]) -> None:
        """Reads links that no open question reads, where there is news: late answers, which nobody wants, and the ends
        of their actors. Unread it would wake the relay again and again."""
        in_use = {id(link) for errand in self._open for link in errand.awaited()}
        wanted = {member for errand in self._waiting for member in errand.bundle.members}
        for member, neighbour in list(self._neighbours.items()):
            if member not in wanted and neighbour.is_gone(ready, in_use):
                self._neighbours.pop(member).close()

    def close(self) -> None:
        for neighbour in self._neighbours.values():
            neighbour.close()
        self._neighbours.clear()

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _num_received(self) -> int:
        return sum(neighbour.num_received for neighbour in self._neighbours.values())

    def _begin_waiting(self) -> list[Message]:
        done: list[Message] = []
        for errand in list(self._waiting):
            try:
                if len(self._open) >= MAX_OPEN or not self._can_begin(errand):
                    continue
                for member, question in zip(errand.bundle.members, errand.bundle.questions, strict=True):
                    errand.start(member.name, self._neighbours[member].link, question)
                self._open.append(errand)
            except _Failed as failure:
                done.append(self._fail(errand, failure))
            self._waiting.remove(errand)
        return done

    def _can_begin(self, errand: _Errand) -> bool:
        """Whether all links it needs are open. Those that are not are being opened from now on."""
        for member in errand.bundle.members:
            if member not in self._neighbours:
                self._neighbours[member] = _Neighbour(member, self._open_neighbour, self._inbox)
        for member in errand.bundle.members:
            neighbour = self._neighbours[member]
            if neighbour.error is not None:
                raise _Failed(member.name, neighbour.error)
            if not neighbour.is_open:
                if time.monotonic() >= errand.until:
                    raise _Failed(member.name, LinkTimeout("its node's relay cannot reach it", peer=member.name))
                return False
        return True

    def _look_at_open(self) -> list[Message]:
        done: list[Message] = []
        for errand in list(self._open):
            try:
                errand.look()
                if not errand.is_complete:
                    continue
                done.append(errand.answer(self._name))
            except _Failed as failure:
                done.append(self._fail(errand, failure))
            self._open.remove(errand)
        return done

    def _fail(self, errand: _Errand, failure: _Failed) -> Message:
        """A link that has ended is forgotten: another question opens it anew."""
        errand.drop()
        if isinstance(failure.error, PeerLost | ProtocolError):
            for member in [m for m, n in self._neighbours.items() if n.error is not None or n.is_over(failure.link)]:
                self._neighbours.pop(member).close()
        logger.info("the relay of %s has no answer of %s: %s", self._name, failure.peer, failure.error)
        return replace(failed(failure.peer, failure.error), id=errand.id)


class _Failed(Exception):
    """Never leaves this module."""

    def __init__(self, peer: str, error: MoeClusterError, link: Link | None = None) -> None:
        super().__init__(peer)
        self.peer, self.error, self.link = peer, error, link


class _Neighbour:
    """A link to an actor of this node, opened by a thread of its own: one that is frozen keeps nobody else waiting."""

    def __init__(self, member: Member, open_neighbour: NeighbourOpener, inbox: Inbox) -> None:
        self._member, self._open_neighbour, self._inbox = member, open_neighbour, inbox
        self._link: Link | None = None
        self.error: MoeClusterError | None = None
        """Why it could not be opened."""
        self._watched: tuple[Any, ...] = ()
        self._is_wanted = True
        self._changing = threading.Lock()
        self._opening = threading.Thread(target=self._open, name=f"reach-{member.name}", daemon=True)
        self._opening.start()

    @property
    def is_open(self) -> bool:
        """From then on the link is the caller's."""
        if self._link is None or self._opening.is_alive():
            return False
        if not self._watched:
            self._watched = self._link.pollables
            self._inbox.watch(self._watched)
        return True

    @property
    def num_received(self) -> int:
        """Messages that it has sent."""
        return 0 if self._link is None else self._link.traffic.messages_received

    @property
    def link(self) -> Link:
        assert self._link is not None, "it is open"
        return self._link

    def is_over(self, ended: Link | None) -> bool:
        """Whether it is this link that has ended."""
        return ended is not None and self._link is ended

    def is_gone(self, ready: Collection[object], in_use: Collection[int]) -> bool:
        """Whether it could not be opened, or there is news of it and that is its end. `in_use`: `id` of links that are
        left alone."""
        if self.error is not None:
            return True
        if not self.is_open or id(self.link) in in_use or not any(pollable in ready for pollable in self._watched):
            return False
        try:
            self.link.check()
        except Exception as error:  # what it said may be unreadable
            logger.info("the relay's link to %s is over: %s", self._member.name, error)
            return True
        return False

    def close(self) -> None:
        with self._changing:
            self._is_wanted = False
            link = self._link
        if link is not None:
            self._inbox.unwatch(self._watched)
            link.close()

    def _open(self) -> None:
        name = self._member.name
        try:
            link = self._open_neighbour(name, self._member.address)
        except MoeClusterError as error:
            self.error = PeerLost(f"its node's relay cannot reach it: {error}", peer=name)
            return
        except Exception:
            logger.exception("a link to %s could not be opened", name)
            self.error = PeerLost("its node's relay cannot reach it", peer=name)
            return
        with self._changing:
            if self._is_wanted:
                self._link = link
                return
        link.close()


def _known(peer: str, error: Exception) -> MoeClusterError:
    """Whatever one question does, it ends, and others go on."""
    if isinstance(error, MoeClusterError):
        return error
    logger.error("a question to %s failed", peer, exc_info=error)
    return RemoteError(f"internal: {type(error).__name__} in its node's relay", peer=peer)


@dataclass(eq=False)
class _Errand:
    """A question on its way through the node."""

    id: int
    bundle: Bundle
    until: float
    """A `time.monotonic` value."""
    pending: list[Pending] = field(default_factory=list)
    answers: dict[int, Message] = field(default_factory=dict)
    """By number of the member."""

    def start(self, name: str, link: Link, question: Message) -> None:
        try:
            self.pending.append(link.start(question))
        except Exception as error:
            raise _Failed(name, _known(name, error), link) from error

    @property
    def is_complete(self) -> bool:
        return len(self.answers) == len(self.pending)

    def awaited(self) -> list[Link]:
        """That answers are still to come over."""
        return [pending.link for number, pending in enumerate(self.pending) if number not in self.answers]

    def look(self) -> None:
        """Takes answers that have come. `_Failed` where one will not."""
        for number, (member, pending) in enumerate(zip(self.bundle.members, self.pending, strict=True)):
            if number in self.answers:
                continue
            try:
                if pending.link.look(pending.id):
                    self.answers[number] = pending.result(0.0)
                elif time.monotonic() >= self.until:
                    raise LinkTimeout("no answer to its node's relay before the deadline", peer=member.name)
            except Exception as error:
                raise _Failed(member.name, _known(member.name, error), pending.link) from error

    def answer(self, name: str) -> Message:
        """To the router."""
        answers = [self.answers[number] for number in range(len(self.pending))]

        def gathered() -> Message:
            try:
                return self.bundle.gathered(answers)
            except ProtocolError as error:
                return failed(error.peer, error)

        return replace(answered(name, "a router", Message(OP), gathered), id=self.id)

    def drop(self) -> None:
        for number, pending in enumerate(self.pending):
            if number not in self.answers:
                pending.drop()
