"""Weights of a model from scratch: the family's own initialisation, split the same way whatever the placement.

The trunk is drawn from the seed, every expert group of every layer from (seed, layer, group): whoever owns a group
draws the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actors.trunk.draws import blank_experts, drawn_from, let_family_draw, replay
from actors.trunk.layout import Layout, ModelLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def initial_experts(model: Layout, layer: int, groups: Sequence[int], group_size: int, seed: int) -> dict[str, Tensor]:
    """Stacked parameters [len(groups) * group_size, ...] of one layer, drawn as the family's `_init_weights` does it.

    `model`: one that `knows_draws`, or the family's own.
    """
    parts = [_initial_group(model, layer, group, group_size, seed) for group in groups]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _initial_group(model: Layout, layer: int, group: int, group_size: int, seed: int) -> dict[str, Tensor]:
    parameters = blank_experts(model.layers[layer].shapes(), group_size, model.dtype)
    with drawn_from(seed, layer, group), torch.no_grad():
        if isinstance(model, ModelLayout):
            draws = model.layers[layer].draws
            assert draws is not None
            replay(draws, parameters)
        else:
            let_family_draw(model, layer, parameters)
    return {name: p.detach() for name, p in parameters.items()}


def initialise_trunk(trunk: PreTrainedModel, seed: int) -> None:
    """Draws everything that is not marked as loaded; also fills buffers that no checkpoint holds (rotary tables)."""
    with drawn_from(seed):
        trunk.initialize_weights()
