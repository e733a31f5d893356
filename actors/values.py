"""Plain values that cross process borders. No torch here: who only passes them on need not import it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Address:
    """Where an expert actor listens. `host_id` tells whether ipc reaches it."""

    host_id: str
    ipc: str
    tcp: str


@dataclass(frozen=True)
class Sampling:
    max_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this (Holtzman et al. 2020)."""
    seed: int = 0


@dataclass(frozen=True)
class TokenEvent:
    token: int
    version: int
    """Expert version it was computed with."""
    finish_reason: str = ""
    """`length` or `end_of_text` with the last token."""


@dataclass(frozen=True)
class StepReport:
    """What a committed step did. `loss` in nats a token, before the update."""

    step: int
    loss: float
    grad_norm: float
    """Global norm over trunk and experts, before clipping."""
    num_tokens: int
    """Predicted tokens, over all micro-batches."""
    seconds: float
    retries: int
    load_LE: list[list[int]] = field(repr=False)
    """Pairs that each expert of each MoE layer got."""
    balance_loss: float = 0.0
    """Mean over the micro-batches, coefficients included."""
