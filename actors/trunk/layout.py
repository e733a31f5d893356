"""What an expert actor has to know of the model, as plain data: no module, no config, nothing of transformers.

Whoever has the model on the meta device tells it (`layout_of`). Only weights that come from a family's directory take
the family's own code, and those from a seed where it has no name in `actors.trunk.draws` how they are drawn; those of
peers and of our checkpoints do not.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from actors.moe.form import ExpertForm, form_of
from actors.trunk.draws import Draw, draws_of
from actors.trunk.source import DTYPES

if TYPE_CHECKING:
    from actors.trunk.model import ExpertLayer, Skeleton

Layer: TypeAlias = "ExpertLayer | LayerLayout"
Layout: TypeAlias = "Skeleton | ModelLayout"
"""Either will do for whoever keeps experts."""


@dataclass(frozen=True)
class LayerLayout:
    """One MoE layer."""

    name: str
    """Module path in the model, e.g. `model.layers.1.mlp.experts`."""
    num_experts: int
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    """Parameter name and shape of one expert's part."""
    template: ExpertForm
    draws: tuple[Draw, ...] | None = None
    """What fresh experts are filled by; None: only the family's own code does it."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.parts)


@dataclass(frozen=True)
class ModelLayout:
    dtype_name: str
    """A name in `DTYPES`."""
    num_experts: int
    """Of every layer."""
    layers: tuple[LayerLayout, ...]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def knows_draws(self) -> bool:
        """Whether fresh experts of every layer can be drawn by it."""
        return all(layer.draws is not None for layer in self.layers)

    def to_json(self) -> str:
        """For whoever passes it on and has no torch, without which this class cannot be imported."""
        return json.dumps(asdict(self))


def layout_from_json(text: str) -> ModelLayout:
    """Of `ModelLayout.to_json`."""
    values = json.loads(text)
    return ModelLayout(**{**values, "layers": tuple(_layer_of(layer) for layer in values["layers"])})


def _layer_of(values: dict[str, Any]) -> LayerLayout:
    draws = values["draws"]
    changed = {
        "parts": tuple((name, tuple(shape)) for name, shape in values["parts"]),
        "template": ExpertForm(**values["template"]),
        "draws": None if draws is None else tuple(Draw(d["parameter"], d["fill"], tuple(d["numbers"])) for d in draws),
    }
    return LayerLayout(**{**values, **changed})


def layout_of(skeleton: Skeleton) -> ModelLayout | None:
    """None for a family whose experts compute something that has no name in `actors.moe.form`."""
    layers = []
    for layer, draws in zip(skeleton.layers, draws_of(skeleton), strict=True):
        form = form_of(layer.template, skeleton.dtype)
        if form is None:
            return None
        parts = tuple(layer.shapes().items())
        layers.append(LayerLayout(layer.name, layer.num_experts, parts, form, draws))
    dtype_name = next(name for name, dtype in DTYPES.items() if dtype == skeleton.dtype)
    return ModelLayout(dtype_name, skeleton.num_experts, tuple(layers))
