"""A pass through the layers of a model, as its questions to expert actors name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.moe.gating import GatePast


@dataclass
class Purpose:
    """Why a forward is run. Training names its micro-batch of an attempt at a step; serving leaves `step` at 0."""

    step: int = 0
    attempt: int = 0
    microbatch: int = 0
    min_version: int = 0
    sequence_length: int = 1
    """S of the tokens [B * S, D]; for gates that see a token in its sequence."""
    pasts: Sequence[GatePast] | None = None
    """What such gates keep of a decoding session, by layer."""
    max_behind: int = 0
    """Committed updates that the experts may still have to make; serving only."""
    pin: str = ""
    """Of a version that is kept; `min_version` is its number."""

    @property
    def keep(self) -> bool:
        return self.step > 0

    def fields(self, layer: int) -> dict[str, Any]:
        if self.pin:
            return {"layer": layer, "pin": self.pin}
        serving = {} if self.keep else {"max_behind": self.max_behind}
        return {
            **serving,
            "layer": layer,
            "keep": self.keep,
            "step": self.step,
            "attempt": self.attempt,
            "microbatch": self.microbatch,
            "min_version": self.min_version,
        }


@dataclass
class Pass:
    """One way through the layers and back, of one micro-batch or request."""

    purpose: Purpose = field(default_factory=Purpose)
    used_version: int = 0
    """The least version of the experts that were used."""
    backlog: Mapping[str, float] = field(default_factory=dict)
    """Pairs that each actor has to do for others, a layer: the same all the way, so that a layer that is computed twice
    is shared alike."""
    counted: set[int] = field(default_factory=set)
    """Layers whose load is noted: one that is computed twice (activation checkpointing) counts once."""
