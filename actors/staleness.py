"""How old experts may be that a step is computed on, and how old they were. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.errors import InvalidInput

MAX_STALENESS = 64
"""Each pending update holds gradients of all experts of the actor."""


def check_staleness(value: object) -> int:
    """`InvalidInput` if no job can have it."""
    if type(value) is not int or not 0 <= value <= MAX_STALENESS:
        raise InvalidInput(
            "is no number of steps that experts may be behind",
            field="optimizer.staleness",
            value=value,
            remedy=f"use 0 to {MAX_STALENESS}; 0: every forward sees every update",
        )
    return value


@dataclass
class Spread:
    """Over the forwards of a step, each with the experts that it used.

    Staleness: committed updates that were not in the weights.
    """

    num_experts: int = 0
    total: int = 0
    """Of the experts' staleness."""
    max: int = 0
    merged: int = 0
    """Updates that were made as part of others, since the step before."""

    def note(self, staleness: int, num_experts: int) -> None:
        self.num_experts += num_experts
        self.total += staleness * num_experts
        self.max = max(self.max, staleness if num_experts else 0)

    @property
    def mean(self) -> float:
        return self.total / self.num_experts if self.num_experts else 0.0

    def fields(self) -> dict[str, int]:
        """Of the message that tells it."""
        return {"experts_used": self.num_experts, "lag_total": self.total, "lag_max": self.max, "merged": self.merged}

    @staticmethod
    def of(answers: Iterable[Mapping[str, Any]]) -> Spread:
        """Of all actors together; what says nothing counts as nothing."""
        spread = Spread()
        for fields in answers:
            spread.num_experts += int(fields.get("experts_used", 0))
            spread.total += int(fields.get("lag_total", 0))
            spread.max = max(spread.max, int(fields.get("lag_max", 0)))
            spread.merged += int(fields.get("merged", 0))
        return spread
