"""When an actor that nobody asks after any more should end. Pure: the edge gives it a clock."""

from __future__ import annotations


class Silence:
    """For how long nobody has asked. Only time in which this process itself ran counts: one that was stopped, or had no
    processor, must not take its own absence for that of the others."""

    def __init__(self, now: float, most_a_look_s: float) -> None:
        """`most_a_look_s`: a look later than this after the one before counts for so much; look more often."""
        self._most_s = most_a_look_s
        self._looked_s = now
        self._heard = False
        self.seconds = 0.0

    def heard(self) -> None:
        self._heard = True

    def look(self, now: float) -> float:
        """-> seconds of silence."""
        passed_s = min(max(0.0, now - self._looked_s), self._most_s)
        self._looked_s = now
        self.seconds = 0.0 if self._heard else self.seconds + passed_s
        self._heard = False
        return self.seconds
