"""The transport contract: a `Link` is one router's way to one expert actor.

Questions are handled in the order sent; each gets one answer. A link serves one thread at a time. Every wait has a
deadline. When the peer dies the pending and all later waits raise `PeerLost` naming it; other links are untouched.
"""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

from actors.errors import LinkTimeout, MoeClusterError, PeerLost
from actors.transport.message import Message, error_answer, raise_if_error
from actors.transport.payload.contract import Way

logger = logging.getLogger(__name__)

Handler = Callable[[str, Message], Message]
"""(name of the asking peer, question) -> answer. Raises nothing: errors are answers too."""


CUT_NOTICED_S = 0.05
_NOBODYS = 0
"""An id that no question has."""


def answered(name: str, peer: str, question: Message, handle: Callable[[], Message]) -> Message:
    """What `handle` gives, or raises, as the answer to the peer's question: whoever serves as `name` must live on,
    whatever one message does."""
    try:
        return handle()
    except MoeClusterError as error:
        logger.info("%s refused %s of %s: %s", name, question.op, peer, error)
        return error_answer(error)
    except Exception as error:
        logger.exception("%s failed in %s of %s", name, question.op, peer)
        return error_answer(error)


@dataclass
class Traffic:
    """What crossed a link since it was opened: messages and payload bytes, each way; how long answers were awaited."""

    messages_sent: int = 0
    bytes_sent: int = 0
    messages_received: int = 0
    bytes_received: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True)
class Pending:
    """A question on its way. `result` waits for the answer."""

    link: Link
    id: int

    def result(self, timeout_s: float) -> Message:
        return self.link.wait(self.id, timeout_s)

    def drop(self) -> None:
        """Nobody waits for the answer."""
        self.link.drop(self.id)


class Link(abc.ABC):
    """Shared half of every implementation: ids, answers out of order, traffic counters."""

    kind: str = ""
    max_bytes: int | None = None
    """Of a message with its header. None: any number."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.traffic = Traffic()
        self.closed = False
        self.is_cut = False
        self._next_id = 1
        self._waiting: set[int] = set()
        self._early: dict[int, Message] = {}

    def start(self, question: Message) -> Pending:
        """Sends without waiting for the answer."""
        if self.closed or self.is_cut:
            raise PeerLost("the link is closed", peer=self.peer)
        question = replace(question, id=self._next_id)
        self._next_id += 1
        self._waiting.add(question.id)
        self._send(question)
        self.traffic.messages_sent += 1
        self.traffic.bytes_sent += question.num_bytes
        return Pending(self, question.id)

    def call(self, question: Message, timeout_s: float) -> Message:
        return self.start(question).result(timeout_s)

    def wait(self, question_id: int, timeout_s: float) -> Message:
        """The answer to one question. `LinkTimeout` after `timeout_s`: its late answer is then dropped."""
        started = time.monotonic()
        deadline = started + timeout_s
        try:
            while question_id not in self._early:
                self._take_in(deadline)
            return raise_if_error(self._early[question_id], self.peer)
        finally:
            self._waiting.discard(question_id)
            self._early.pop(question_id, None)
            self.traffic.wait_s += time.monotonic() - started

    def look(self, question_id: int, timeout_s: float = 0.0) -> bool:
        """Whether the answer to this question is here, after `timeout_s` at most; `wait` gives it then, and may still
        be called where it is not. `PeerLost` as there."""
        started = time.monotonic()
        try:
            while question_id not in self._early:
                self._take_in(started + timeout_s)
        except LinkTimeout:
            return False
        finally:
            self.traffic.wait_s += time.monotonic() - started
        return True

    def check(self) -> None:
        """`PeerLost` once the peer is known to be gone. Does not wait."""
        self.look(_NOBODYS)

    @property
    def way(self) -> Way | None:
        """To the peer's device, for tensors without headers; None if there is none."""
        return None

    @property
    def over(self) -> Event | None:
        """Of its carrier, which see: of tensors that come on the device. None where there are none."""
        return None

    @property
    def pollables(self) -> tuple[Any, ...]:
        """What zmq can poll for news of this link; none where answers are there at once. The same as long as it is
        open."""
        return ()

    def _take_in(self, deadline: float) -> None:
        """The next answer, whichever it is."""
        answer = self._receive(deadline)
        self.traffic.messages_received += 1
        self.traffic.bytes_received += answer.num_bytes
        # An answer nobody waits for is a duplicate, or came after its deadline.
        if answer.id in self._waiting:
            self._early[answer.id] = answer

    def drop(self, question_id: int) -> None:
        """Nobody waits for the answer to this question: it is dropped, now or when it comes."""
        self._waiting.discard(question_id)
        self._early.pop(question_id, None)

    def forget(self) -> None:
        """Nobody waits for the open questions any more: their answers will be dropped."""
        self._waiting.clear()
        self._early.clear()

    def cut(self) -> None:
        """From any thread: a wait on this link ends with `PeerLost` within `CUT_NOTICED_S`, and so do all later ones.

        For a peer that is known to be dead or out of reach while its connection stays open.
        """
        self.is_cut = True

    def close(self) -> None:
        self.closed = True

    @abc.abstractmethod
    def _send(self, question: Message) -> None: ...

    @abc.abstractmethod
    def _receive(self, deadline: float) -> Message:
        """Next answer of the peer, whichever it is. `deadline` is a `time.monotonic` value."""
