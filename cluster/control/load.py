"""The experts' load over the last steps, and how even it is. Pure, and numpy only: the control plane imports no torch.

L MoE layers   E experts a layer   W steps the window holds   G expert groups
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actors.errors import InvalidInput
from actors.moe.measures import max_vio, sparse_layers, utilisation_std
from actors.values import Placement
from cluster.backend import LoadReport, LoadStep

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
LoadLE = Sequence[Sequence[int]]
"""(token, expert) pairs of each expert [E] of each MoE layer [L]."""


class LoadWindow:
    """The newest `max_steps` committed steps, with their sum kept up to date; a step costs two passes over L x E."""

    def __init__(self, max_steps: int, num_layers: int, num_experts: int) -> None:
        self._load_WLE: Ints = np.zeros((max_steps, num_layers, num_experts), dtype=np.int64)
        """A ring: step number n is in place n % W."""
        self._total_LE: Ints = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._version_W: Ints = np.zeros(max_steps, dtype=np.int64)
        self._time_s_W: Floats = np.zeros(max_steps)
        self._tokens_W: Ints = np.zeros(max_steps, dtype=np.int64)
        self._microbatches_W: Ints = np.zeros(max_steps, dtype=np.int64)
        self._added = 0

    def add(self, load_LE: LoadLE, version: int, time_s: float, tokens: int, microbatches: int) -> None:
        """One committed step of `tokens` tokens in `microbatches` micro-batches; `version` is that of its weights.

        `InvalidInput`, and the window stays as it was, if the load is not that of this model.
        """
        load = _checked(load_LE, self._total_LE.shape)
        place = self._added % len(self._load_WLE)
        self._total_LE += load - self._load_WLE[place]
        self._load_WLE[place] = load
        self._version_W[place], self._time_s_W[place] = version, time_s
        self._tokens_W[place], self._microbatches_W[place] = tokens, microbatches
        self._added += 1

    @property
    def load_LE(self) -> tuple[tuple[int, ...], ...]:
        """Summed over the window; empty before the first step."""
        return _rows(self._total_LE) if self._added else ()

    def report(self, version: int, placement: Placement, node_of: Mapping[str, str]) -> LoadReport:
        """`version` is the model's; `placement` and `node_of` (actor -> node) tell whose load is summed with whose."""
        if not self._added:
            return LoadReport(version, 0, placement.group_size, (), {}, {}, (), 0.0, (), 0.0, 0.0, 0.0, "", ())
        steps, microbatches = min(self._added, len(self._load_WLE)), int(self._microbatches_W.sum())
        max_vio_L, std_L = max_vio(self._total_LE), utilisation_std(self._total_LE)
        actors = _of_actors(self._total_LE, placement)
        return LoadReport(
            version=version,
            window_steps=steps,
            group_size=placement.group_size,
            load_LE=self.load_LE,
            actors=actors,
            nodes=_of_nodes(actors, node_of),
            max_vio_L=tuple(max_vio_L.tolist()),
            max_vio=float(max_vio_L.max()),
            utilisation_std_L=tuple(std_L.tolist()),
            utilisation_std=float(std_L.max()),
            microbatch_tokens_per_expert=float(self._total_LE.mean()) / microbatches,
            step_tokens_per_expert=float(self._total_LE.mean()) / steps,
            warning=_warning(self._total_LE / microbatches, round(self._tokens_W.sum() / microbatches)),
            history=self._history(),
        )

    def _history(self) -> tuple[LoadStep, ...]:
        load_WE = self._load_WLE.sum(1)
        first = max(0, self._added - len(load_WE))
        places = [number % len(load_WE) for number in range(first, self._added)]
        return tuple(
            LoadStep(
                int(self._version_W[i]), float(self._time_s_W[i]), int(self._tokens_W[i]), tuple(load_WE[i].tolist())
            )
            for i in places
        )


def _warning(load_LE: Floats, tokens: int) -> str:
    """Of the layer with the least load on an expert."""
    sparse = sparse_layers(load_LE, tokens)
    if not sparse:
        return ""
    worst = min(sparse, key=lambda layer: (layer.smallest_load, -layer.num_sparse))
    layers = f"{len(sparse)} of {len(load_LE)} MoE layers give experts few tokens a micro-batch"
    return f"{layers}; the worst, layer {worst.layer}: {worst}"


def group_load(load_LE: ArrayLike, placement: Placement) -> list[int]:
    """Pairs of each expert group [G], summed over its experts and the layers."""
    load_LGE = np.asarray(load_LE, dtype=np.int64).reshape(-1, placement.num_groups, placement.group_size)
    return list(map(int, load_LGE.sum((0, 2))))


def _of_actors(load_LE: Ints, placement: Placement) -> dict[str, int]:
    """A group's load is split evenly over its holders; what does not divide counts for the first ones."""
    sums = dict.fromkeys(placement.actors, 0)
    for held, load in zip(placement.holders, group_load(load_LE, placement), strict=True):
        for place, actor in enumerate(held):
            sums[actor] += (load + len(held) - 1 - place) // len(held)
    return sums


def _of_nodes(actors: Mapping[str, int], node_of: Mapping[str, str]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for actor, load in actors.items():
        node = node_of.get(actor, "")
        sums[node] = sums.get(node, 0) + load
    return sums


def _rows(load_LE: Ints) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, load_LE.tolist()))


def _checked(load_LE: LoadLE, shape: tuple[int, ...]) -> Ints:
    try:
        load = np.asarray(load_LE, dtype=np.int64)
    except ValueError:  # rows of different lengths
        load = np.zeros(0, dtype=np.int64)
    if load.shape != shape or load.min(initial=0) < 0:
        raise InvalidInput(f"is not {shape[0]} rows of {shape[1]} counts", field="load_LE", value=load.shape)
    return load
