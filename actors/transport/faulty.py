"""`faulty`: any link, disturbed by a script. For tests and drills: the same code paths as a real failure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from actors.errors import LinkTimeout, PeerLost
from actors.transport.contract import Link
from actors.transport.message import Message

LOST_AFTER_S = 0.2
"""How long an answer is waited for that the script keeps back: it will not come, and a short deadline for all others
would strike where the script does not."""


@dataclass(frozen=True)
class Fault:
    """Strikes the `nth` (from 1) question whose op is `op`."""

    op: str
    nth: int
    kind: Literal["drop_question", "drop_answer", "delay", "duplicate", "close"]
    delay_s: float = 0.0


class FaultyLink(Link):
    kind = "faulty"

    def __init__(self, inner: Link, script: Sequence[Fault]) -> None:
        super().__init__(inner.peer)
        self._inner = inner
        self._next_id = (
            inner._next_id
        )  # the peer has seen the ids before; from here on only this link uses the inner one
        self._script = tuple(script)
        self._seen: dict[str, int] = {}
        self._lost: set[int] = set()
        """Questions that will have no answer: those that are dropped, and those whose answer is."""
        self.struck: list[Fault] = []

    def _send(self, question: Message) -> None:
        count = self._seen[question.op] = self._seen.get(question.op, 0) + 1
        fault = next((f for f in self._script if f.op == question.op and f.nth == count), None)
        if fault is None:
            return self._inner._send(question)
        self.struck.append(fault)
        if fault.kind == "close":
            self.close()
            raise PeerLost(f"closed by script at {fault.op} {fault.nth}", peer=self.peer)
        if fault.kind in ("drop_question", "drop_answer"):
            self._lost.add(question.id)
        if fault.kind == "drop_question":
            return None
        if fault.kind == "delay":
            time.sleep(fault.delay_s)
        self._inner._send(question)
        if fault.kind == "duplicate":
            self._inner._send(replace(question))
        return None

    @property
    def pollables(self) -> tuple[Any, ...]:
        return self._inner.pollables

    def wait(self, question_id: int, timeout_s: float) -> Message:
        return super().wait(question_id, min(timeout_s, LOST_AFTER_S) if question_id in self._lost else timeout_s)

    def _receive(self, deadline: float) -> Message:
        if self.closed:
            raise PeerLost("the link is closed", peer=self.peer)
        while True:
            answer = self._inner._receive(deadline)
            if answer.id not in self._lost:
                return answer
            if time.monotonic() > deadline:
                raise LinkTimeout("no answer before the deadline", peer=self.peer)

    def cut(self) -> None:
        super().cut()
        self._inner.cut()

    def close(self) -> None:
        super().close()
        self._inner.close()
