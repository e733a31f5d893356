"""Weights of a model from scratch: the family's own initialisation, split the same way whatever the placement.

The trunk is drawn from the seed, every expert group of every layer from (seed, layer, group): whoever owns a group
draws the same weights.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from actors.trunk.model import Skeleton

_drawing = threading.RLock()


@contextmanager
def drawn_from(*seed: int) -> Iterator[None]:
    """torch's global generator seeded by a tuple inside, as it was before outside. One thread at a time: it is the
    process's only one."""
    mixed = 0
    for part in seed:
        mixed = (mixed * 1_000_003 + part + 1) % (1 << 62)
    with _drawing, torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed)
        yield


def initial_experts(
    skeleton: Skeleton, layer: int, groups: Sequence[int], group_size: int, seed: int
) -> dict[str, Tensor]:
    """Stacked parameters [len(groups) * group_size, ...] of one layer, drawn by the family's `_init_weights`."""
    parts = [_initial_group(skeleton, layer, group, group_size, seed) for group in groups]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _initial_group(skeleton: Skeleton, layer: int, group: int, group_size: int, seed: int) -> dict[str, Tensor]:
    module: Any = copy.copy(skeleton.layers[layer].template)
    parameters = {
        name: nn.Parameter(torch.zeros(group_size, *shape, dtype=skeleton.dtype))
        for name, shape in skeleton.layers[layer].shapes().items()
    }
    module._parameters = parameters
    module.num_experts = group_size
    with drawn_from(seed, layer, group), torch.no_grad():
        skeleton.model._init_weights(module)
    return {name: p.detach() for name, p in parameters.items()}


def initialise_trunk(trunk: PreTrainedModel, seed: int) -> None:
    """Draws everything that is not marked as loaded; also fills buffers that no checkpoint holds (rotary tables)."""
    with drawn_from(seed):
        trunk.initialize_weights()
