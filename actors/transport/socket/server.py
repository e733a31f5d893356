"""The answering end of socket links: one thread that takes questions in turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from actors.errors import StepAborted
from actors.transport.contract import Handler
from actors.transport.curve import LinkKeys
from actors.transport.message import Message, error_answer
from actors.transport.payload.contract import AUTO, PayloadSettings
from actors.transport.socket.inbox import Inbox, Question
from actors.transport.socket.rounds import Rounds
from actors.transport.socket.zeromq import SPIN_ON_GPU_S
from actors.transport.turns import SERVING_WEIGHT, Lane, Turns

logger = logging.getLogger(__name__)

MAX_TAKEN_IN = 64
"""Questions that a server looks at to choose the next; more wait in zmq."""
LOOK_AGAIN_MS = 1
"""How long a server with questions that are not ready sleeps before it looks again."""
SPIN_S = 1e-4
"""How long a server looks for the next question before its thread goes to sleep; waking it costs as much. Questions
that follow each other come back in 0.23 instead of 0.35 ms, others as before."""
SPIN_BELOW_BYTES = 1 << 19
"""After a longer question or answer it sleeps at once: copying the next one alone takes the peer that time, and it may
need this very core for it."""


class SocketServer(Rounds):
    """Serves a handler to any number of links from one thread: questions are handled one by one, those of a link in
    the order of their arrival, and of several links as `turns` says for the lane of each question.

    `idle` is called between questions and does one piece of deferred work; it returns False when none is left.
    A question for which `ready` is false is kept back until it is true, while others are handled, and refused after
    `keep_s`.
    """

    def __init__(
        self,
        name: str,
        handler: Handler,
        *,
        host: str = "127.0.0.1",
        max_bytes: int,
        idle: Callable[[], bool] = lambda: False,
        ready: Callable[[Message], bool] = lambda question: True,
        keep_s: float = 30.0,
        keys: LinkKeys | None = None,
        lane: Callable[[Message], Lane] = lambda question: "training",
        serving_weight: int = SERVING_WEIGHT,
        payload: PayloadSettings = AUTO,
    ) -> None:
        super().__init__(name, "serve", Inbox(name, host, max_bytes, keys, payload))
        self.busy_s = 0.0
        """Time spent on questions since the start."""
        self._handler = handler
        self._idle, self._ready, self._keep_s = idle, ready, keep_s
        self._kept: list[_Kept] = []
        self._lane = lane
        self._turns: Turns[Question] = Turns(serving_weight)
        self._is_busy = False
        """Whether there was work in the last round."""
        self._spin_s = SPIN_S
        """How long the next question is looked for."""

    def _round(self) -> None:
        """Takes in what has come, handles one question."""
        busy = self._answer_kept() or self._is_busy
        self._take_in(0 if busy or self._turns else LOOK_AGAIN_MS if self._kept else 100)
        if not self._turns:
            self._is_busy = self._spin(self._inbox.look_out_until) or (busy and self._idle())
            return
        started = time.monotonic()
        self._serve_one()
        self.busy_s += time.monotonic() - started
        if not self._turns:
            self._spin(time.monotonic() + self._spin_s)
        self._is_busy = True

    def _take_in(self, timeout_ms: int) -> None:
        """What has arrived, once there is something or the time is over."""
        if timeout_ms and not self._inbox.wait(timeout_ms):
            return
        if len(self._turns) < MAX_TAKEN_IN:
            for sender, question in self._inbox.from_lines():
                self._turns.put(sender, self._lane(question), (sender, question))
        while len(self._turns) < MAX_TAKEN_IN and self._inbox.has_message():
            for sender, question in self._inbox.from_zmq():
                self._turns.put(sender, self._lane(question), (sender, question))

    def _serve_one(self) -> None:
        sender, question = self._turns.take()
        answer = self._inbox.introduce(sender, question)
        if answer is None and not self._is_ready(question):
            self._kept.append(_Kept(sender, question, time.monotonic() + self._keep_s))
            return
        if answer is None:
            answer = self._handle(sender, question)
        if question.is_of_gpu:
            self._spin_s = SPIN_ON_GPU_S
        else:
            self._spin_s = SPIN_S if max(question.num_bytes, answer.num_bytes) < SPIN_BELOW_BYTES else 0.0
        del question  # so that this very answer tells what of it nobody reads any more
        self._inbox.answer(sender, answer)

    def _handle(self, sender: bytes, question: Message) -> Message:
        return replace(self._handler(sender.decode(errors="replace"), question), id=question.id)

    def _answer_kept(self) -> bool:
        """Those that are ready, or have waited for too long. False if there was none."""
        now = time.monotonic()
        due = [kept for kept in self._kept if now >= kept.until or self._is_ready(kept.question)]
        for kept in due:
            self._kept.remove(kept)
            if self._is_ready(kept.question):
                started = time.monotonic()
                self._inbox.answer(kept.sender, self._handle(kept.sender, kept.question))
                self.busy_s += time.monotonic() - started
            else:
                error = StepAborted(f"{self.name} could not begin with {kept.question.op} for {self._keep_s:.0f} s")
                self._inbox.answer(kept.sender, replace(error_answer(error), id=kept.question.id))
        return bool(due)

    def _is_ready(self, question: Message) -> bool:
        """Also of one that nobody can tell it of: its handling says what is wrong with it, while looking at it again in
        every round would keep all others waiting."""
        try:
            return self._ready(question)
        except Exception:
            logger.exception("%s cannot tell whether it can begin with %s", self.name, question.op)
            return True

    def _spin(self, until: float) -> bool:
        """Whether something has come by then."""
        while time.monotonic() < until:
            if self._inbox.has_something():
                return True
        return False


@dataclass(frozen=True, eq=False)
class _Kept:
    """A question that is not ready to be handled."""

    sender: bytes
    question: Message
    until: float
    """A `time.monotonic` value."""
