"""Routers that are to make one model: what of their configs must be the same.

Tensors tell of another width when they are taken over; a gate's temperature, a rope's base or a dtype would not, and
such a router would compute another model with the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from actors.differences import first_difference, leaves
from actors.errors import InvalidInput
from actors.moe.settings import GateSettings
from actors.trunk.config import EXPERT_COUNTS, GATE_PARTS, config_of
from actors.trunk.source import ModelSource

Facts = Mapping[str, Any]
"""Path in a cluster's config -> value."""
_ABOUT_FILES = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"})
_PLAIN = (bool, int, float, str, type(None))


def facts_of(source: ModelSource, gate: GateSettings) -> dict[str, Any]:
    """Without the number of experts and what goes with it: a model may have grown since."""
    left_out = {*EXPERT_COUNTS, *GATE_PARTS, *_ABOUT_FILES}
    facts: dict[str, Any] = {"router.dtype": source.dtype}
    facts |= {f"model.gate.{name}": value for name, value in asdict(gate).items()}
    for name, value in leaves(config_of(source).to_dict()):
        if isinstance(value, _PLAIN) and name.rpartition(".")[2] not in left_out:
            facts[f"model.values.{name}"] = value
    return facts


def check_alike(mine: Facts, leaders: Facts) -> None:
    """`InvalidInput` that names the first value in which this router is not as the one that leads."""
    if (field := first_difference(leaders, mine)) is not None:
        raise InvalidInput(
            f"the router that leads has {leaders.get(field)!r}",
            field=field,
            value=mine.get(field),
            remedy="start both with one config",
        )
