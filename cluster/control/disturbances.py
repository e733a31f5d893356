"""Deaths and changes on their way through the ledger: opened when they strike, priced by the steps that follow."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from cluster.control.ledger import Kind, Ledger

RECENT_STEPS = 50


class Disturbances:
    """Writes what deaths cost. All times Unix seconds."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._open: list[int] = []
        """Deaths after which not all is as before."""
        self._unpriced: list[int] = []
        """Those of them after which no step has been committed yet."""
        self._latest: int | None = None
        self._last_step_s: float | None = None
        self._step_s: deque[float] = deque(maxlen=RECENT_STEPS)

    def lost(self, kind: Kind, subject: str, now: float, since_s: float, message: str) -> None:
        """`since_s`: when it was last known to be well."""
        number = self._ledger.open(kind, subject, since_s, detected_s=now, message=message)
        self._open.append(number)
        self._latest = number
        if self._last_step_s is not None:
            self._unpriced.append(number)

    def recall(self, last_step_s: float | None, step_s: Sequence[float]) -> None:
        """Before the first report after a restart: those that were not over then end when all is as before. A job that
        runs committed its last step then, and its steps usually take so long."""
        self._open = [entry.number for entry in self._ledger.entries() if entry.recovered_s is None]
        self._last_step_s = last_step_s
        self._step_s.extend(step_s)

    def stepped(self, now: float, retries: int, tokens: int) -> None:
        """A step was committed, of so many tokens, after so many tries that came to nothing."""
        took_s = 0.0 if self._last_step_s is None else max(0.0, now - self._last_step_s)
        usual_s = median(self._step_s) if self._step_s else took_s
        for number in self._unpriced:
            # Two at once share a stall; each would have had it alone.
            self._ledger.add(
                number, stall_s=took_s - usual_s, steps_replayed=retries, tokens_recomputed=retries * tokens
            )
        if not self._unpriced and self._last_step_s is not None:
            self._step_s.append(took_s)
        self._unpriced.clear()
        self._last_step_s = now

    def restored(self, num_steps: int, message: str) -> None:
        """Everybody went back by so many steps, which are run again. `message`: what to."""
        if self._latest is not None:
            self._ledger.add(self._latest, steps_replayed=num_steps, message=message)

    def idle(self) -> None:
        """No job runs: the next step has no step before it."""
        self._last_step_s = None
        self._unpriced.clear()

    def whole(self, now: float) -> None:
        """All is as before, copies included."""
        for number in self._open:
            self._ledger.close(number, now)
        self._open.clear()
