"""`local`: the peer lives in this process. No copy, no thread; the reference that the others are tested against."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from actors.errors import LinkTimeout, PeerLost
from actors.transport.contract import Handler, Link
from actors.transport.message import Message


class LocalLink(Link):
    kind = "local"

    def __init__(self, peer: str, handler: Handler, *, name: str = "router") -> None:
        super().__init__(peer)
        self.handler = handler
        self._name = name
        self._answers: deque[Message] = deque()

    def _send(self, question: Message) -> None:
        self._answers.append(replace(self.handler(self._name, question), id=question.id))

    def _receive(self, deadline: float) -> Message:
        if self.closed:
            raise PeerLost("the link is closed", peer=self.peer)
        if not self._answers:
            raise LinkTimeout("no question is open, so no answer can come", peer=self.peer)
        return self._answers.popleft()
