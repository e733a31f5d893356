"""The training step that is under way on an expert actor: what may enter, and what is kept until it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from actors.errors import StepAborted
from actors.expert.exchange import Attempt
from actors.moe.experts import ExpertStack, Saved, WeightGradients, Weights
from actors.staleness import Spread


class Transaction:
    """One attempt at a step at a time. The gradients themselves are with the experts."""

    def __init__(self, version: int) -> None:
        self.attempt = Attempt(version, 0)
        self.prepared: Attempt | None = None
        """Its gradients are complete: only `reduce`, `commit` or `abort` is right from here on."""
        self.touched: set[tuple[int, int]] = set()
        """(group, layer) that got tokens, where groups have copies."""
        self.spread = Spread()
        """Of the forwards of this attempt."""
        self.weights: dict[int, Weights] = {}
        """By layer, that its last forward of this attempt was computed with."""
        self._saved: dict[tuple[int, int], Saved] = {}
        self._deferred: deque[tuple[int, WeightGradients]] = deque()
        self._spoilt = ""
        """Why gradients of this attempt are missing; empty if none are."""

    def begins(self, fields: Mapping[str, Any], version: int) -> bool:
        """Admits a message; a new step may start only after the commit of the last. True if it is the first one of an
        attempt: what is left of those before it is void."""
        attempt = Attempt.of(fields)
        if attempt < self.attempt or attempt.step <= version:
            raise StepAborted(f"message of {attempt} came after it ended; now at {self.attempt}, version {version}")
        if attempt.step != version + 1:
            raise StepAborted(f"message of step {attempt.step}, version here is {version}")
        if attempt == self.attempt:
            return False
        self.attempt = attempt
        return True

    def aborts(self, attempt: Attempt, version: int) -> bool:
        """Whether an abort is of what is under way. The next try has a higher number, so that anything of this one that
        is still on its way is refused."""
        # An abort of a later step must not touch gradients that are prepared: their commit may still be on its way.
        if attempt < self.attempt or attempt.step != version + 1:
            return False
        self.attempt = Attempt(attempt.step, attempt.number + 1)
        return True

    def prepare(self) -> None:
        self.prepared = self.attempt

    def check_prepared(self, what: str, fields: Mapping[str, Any]) -> Attempt:
        if self.prepared is None or self.prepared != Attempt.of(fields):
            raise StepAborted(f"{what} of {Attempt.of(fields)}, prepared is {self.prepared}")
        return self.prepared

    @property
    def under_way(self) -> bool:
        return bool(self._saved or self._deferred or self.prepared)

    def clear(self) -> None:
        """The attempt has ended, one way or the other."""
        self._saved.clear()
        self._deferred.clear()
        self._spoilt = ""
        self.touched.clear()
        self.weights.clear()
        self.spread = Spread()
        self.prepared = None

    # -- forward and backward -----------------------------------------------------------------------------------------

    def keep(self, microbatch: int, layer: int, saved: Saved) -> None:
        """A second forward of the same micro-batch (activation checkpointing) takes the place of the first."""
        self._saved[microbatch, layer] = saved

    def take(self, microbatch: int, layer: int) -> Saved:
        saved = self._saved.pop((microbatch, layer), None)
        if saved is None:
            raise StepAborted(f"micro-batch {microbatch} of layer {layer} has no forward here")
        return saved

    def check_complete(self) -> None:
        if self._saved:
            raise StepAborted(f"{len(self._saved)} forwards have no backward yet")
        if self._spoilt:
            raise StepAborted(f"gradients of this attempt are lost: {self._spoilt}")

    def defer(self, layer: int, part: WeightGradients) -> None:
        """Gradients of weights: nobody waits for them before `prepare`."""
        self._deferred.append((layer, part))

    def do_deferred(self, stacks: Sequence[ExpertStack]) -> bool:
        """One piece. False if there was none. What it raises may reach nobody who asks: `check_complete` tells it."""
        if not self._deferred:
            return False
        layer, part = self._deferred.popleft()
        try:
            stacks[layer].accumulate(part)
        except Exception as error:
            self._spoilt = f"{type(error).__name__} in layer {layer}: {error}"
            raise
        return True

    @property
    def has_deferred(self) -> bool:
        return bool(self._deferred)
