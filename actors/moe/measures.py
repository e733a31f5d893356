"""How even a load is. numpy only: the control plane imports no torch, and CPU tensors are taken as arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

MIN_TOKENS = 64
"""Tokens a micro-batch below which an expert's products are not worth reading its weights (S18)."""


def max_vio(load_E: ArrayLike) -> Floats:
    """max / mean - 1 over the last dimension (MaxVio of 2408.15664): 0 is even, E - 1 all on one; 0 without load."""
    load = np.asarray(load_E)
    return _over_mean(load.max(-1) - load.mean(-1), load)


def utilisation_std(load_E: ArrayLike) -> Floats:
    """Standard deviation (of the population) of load / mean over the last dimension; 0 without load."""
    load = np.asarray(load_E)
    return _over_mean(load.std(-1), load)


@dataclass(frozen=True)
class SparseLayer:
    """A layer in which experts get too few tokens of a mean micro-batch (S18)."""

    layer: int
    num_experts: int
    num_sparse: int
    smallest_load: float
    minimum: int
    batch_tokens: int
    tokens_if_even: int
    """Micro-batch, in tokens, that gives every expert the minimum if the load were even."""
    tokens_as_routed: int | None
    """The same at the load's present skew; None: an expert got nothing, and no size can be told."""

    def __str__(self) -> str:
        skewed = (
            "an expert got none at all" if self.tokens_as_routed is None else f"{self.tokens_as_routed} as routed now"
        )
        return (
            f"{self.num_sparse} of {self.num_experts} experts got fewer than {self.minimum} tokens of a batch of "
            f"{self.batch_tokens} (the least: {self.smallest_load:.4g}); every expert reaches it with a batch of "
            f"{self.tokens_if_even} tokens if evenly used ({skewed})"
        )


def sparse_layers(load_LE: ArrayLike, tokens: int, minimum: int = MIN_TOKENS) -> list[SparseLayer]:
    """Layers in which an expert got less than `minimum` of a batch of `tokens`; `load_LE` counts pairs, or their means.

    A layer without any load is left out.
    """
    load = np.asarray(load_LE, dtype=np.float64)
    found = []
    for layer in np.flatnonzero((load.min(-1) < minimum) & (load.sum(-1) > 0)):
        load_E = load[layer]
        smallest = float(load_E.min())
        found.append(
            SparseLayer(
                layer=int(layer),
                num_experts=len(load_E),
                num_sparse=int((load_E < minimum).sum()),
                smallest_load=smallest,
                minimum=minimum,
                batch_tokens=tokens,
                tokens_if_even=math.ceil(minimum * tokens * len(load_E) / load_E.sum()),
                tokens_as_routed=math.ceil(minimum * tokens / smallest) if smallest else None,
            )
        )
    return found


def _over_mean(value_L: ArrayLike, load_LE: NDArray[Any]) -> Floats:
    mean_L = load_LE.mean(-1)
    return np.asarray(np.divide(value_L, mean_L, out=np.zeros_like(mean_L), where=mean_L > 0))
