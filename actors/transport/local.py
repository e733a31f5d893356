"""`local`: the peer lives in this process. No copy, no thread; the reference that the others are tested against."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from actors.errors import LinkTimeout, PeerLost
from actors.transport.contract import Handler, Link
from actors.transport.message import Message


class LocalLink(Link):
    kind = "local"

    def __init__(
        self, peer: str, handler: Handler, *, name: str = "router", idle: Callable[[], object] | None = None
    ) -> None:
        """`idle` is called before each question: the peer's time for what nobody waited for after the one before. On a
        GPU of its own it does that while the router computes."""
        super().__init__(peer)
        self.handler, self._idle = handler, idle
        self._name = name
        self._answers: deque[Message] = deque()

    def _send(self, question: Message) -> None:
        if self._idle is not None:
            self._idle()
        self._answers.append(replace(self.handler(self._name, question), id=question.id))

    def _receive(self, deadline: float) -> Message:
        if self.closed:
            raise PeerLost("the link is closed", peer=self.peer)
        if not self._answers:
            raise LinkTimeout("no question is open, so no answer can come", peer=self.peer)
        return self._answers.popleft()
