"""Which actors do not answer: failure detection by pings of our own, for what no closed connection tells.

A process that died is known within half a second by other means. A frozen one, or one behind a cut network, is found
here: it leaves pings unanswered. Pure: the edge sends the pings, with a clock that may be wrong or stand still.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from actors.errors import InvalidInput

State = Literal["well", "suspect", "dead"]


@dataclass(frozen=True)
class Verdict:
    actor: str
    state: State
    silent_s: float
    """How long it has left a ping unanswered; for one that is well again, how long it had."""


@dataclass
class _Watch:
    state: State = "well"
    """As told last."""
    since_s: float | None = None
    """Time up to which silence is counted; None while no ping is unanswered."""
    silent_s: float = 0.0
    was_silent_s: float = 0.0
    """Before it answered, since the last check."""


class Heartbeats:
    """Silence begins with the first ping that is not answered, so that nobody is blamed for pings that were not sent.

    With a ping every `interval_s` and a check at least twice as often, an actor is told dead between `dead_after_s` and
    `dead_after_s` + 1.5 `interval_s` after it froze: 5.75 s with these values.

    Silence counts only while this process itself runs. After more than `own_stall_s` without a check, answers may wait
    unread, and the gap counts for nothing. Only a loop that is always so slow counts one interval a check from its
    second gap on: else it would never find anybody.
    """

    def __init__(
        self,
        interval_s: float = 0.5,
        suspect_after_s: float = 3.0,
        dead_after_s: float = 5.0,
        own_stall_s: float = 1.0,
    ) -> None:
        if not 0 < interval_s < suspect_after_s <= dead_after_s < math.inf or not interval_s < own_stall_s:
            raise InvalidInput(
                "an actor is suspect before it is dead, and both take longer than an interval",
                field="heartbeats",
                value=(interval_s, suspect_after_s, dead_after_s, own_stall_s),
                remedy="use interval_s < suspect_after_s <= dead_after_s, and interval_s < own_stall_s",
            )
        self.interval_s = interval_s
        self._suspect_after_s, self._dead_after_s, self._own_stall_s = suspect_after_s, dead_after_s, own_stall_s
        self._watched: dict[str, _Watch] = {}
        self._checked_s: float | None = None
        self._was_stalled = False

    def sent(self, actor: str, now: float) -> None:
        """A ping is on its way; the first one begins the watch. Send on while earlier ones are unanswered."""
        watch = self._watched.setdefault(actor, _Watch())
        if watch.since_s is None:
            watch.since_s = now

    def answered(self, actor: str, now: float) -> None:
        """An answer, or any other sign of life, has come. Of an actor that is not watched, it is late: ignored."""
        if watch := self._watched.get(actor):
            silent_s = watch.silent_s + self._counted_s(watch, now)
            watch.was_silent_s = max(watch.was_silent_s, silent_s)
            watch.since_s, watch.silent_s = None, 0.0

    def forget(self, actor: str) -> None:
        """It is gone for certain, or was taken out; nothing more is told of it."""
        self._watched.pop(actor, None)

    def check(self, now: float) -> list[Verdict]:
        """What changed since the last check, each change once, in the order in which the watches began.

        Read the answers that have come before it. Who is dead is watched on, and may be well again.
        """
        verdicts = []
        for actor, watch in self._watched.items():
            if watch.since_s is not None:
                watch.silent_s += self._counted_s(watch, now)
                watch.since_s = now
            state = self._state(watch.silent_s)
            if state != watch.state:
                watch.state = state
                silent_s = watch.was_silent_s if state == "well" else watch.silent_s
                verdicts.append(Verdict(actor, state, silent_s))
            watch.was_silent_s = 0.0
        self._was_stalled = self._checked_s is not None and now - self._checked_s > self._own_stall_s
        self._checked_s = now
        return verdicts

    def _counted_s(self, watch: _Watch, now: float) -> float:
        passed_s = 0.0 if watch.since_s is None else max(0.0, now - watch.since_s)
        if passed_s <= self._own_stall_s:
            return passed_s
        return self.interval_s if self._was_stalled else 0.0

    def _state(self, silent_s: float) -> State:
        if silent_s >= self._dead_after_s:
            return "dead"
        return "suspect" if silent_s >= self._suspect_after_s else "well"
