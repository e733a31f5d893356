"""A model's config, as transformers has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from actors.errors import CheckpointError, InvalidInput
from actors.trunk.source import ModelSource

EXPERT_COUNTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", "num_moe_experts")
"""Names of the number of experts in the configs of the families; some answer to several."""
GATE_PARTS = ("n_group", "num_expert_group")
"""Names of the number of contiguous parts that a gate chooses first."""


def config_of(source: ModelSource) -> PretrainedConfig:
    """Raises `CheckpointError` or `InvalidInput` that names what is wrong with it."""
    config = _config_of_directory(Path(source.path)) if source.path else _config_of_values(dict(source.values or {}))
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            "the checkpoint is quantised",
            field="quantization_config",
            remedy="convert it to bfloat16 first; quantised experts cannot be trained or moved",
        )
    if source.num_experts is not None:
        set_num_experts(config, source.num_experts)
    return config


def _config_of_directory(path: Path) -> PretrainedConfig:
    if not (path / "config.json").is_file():
        raise CheckpointError(
            "not a model directory: config.json is missing",
            field="model.path",
            value=str(path),
            remedy="give a directory written by save_pretrained",
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"transformers cannot read its config: {error}", field="model.path", value=str(path)
        ) from None


def _config_of_values(values: dict[str, Any]) -> PretrainedConfig:
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise InvalidInput("is missing", field="model.values.model_type", remedy="for example deepseek_v3")
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidInput(
            str(error), field="model.values", remedy="see the transformers config of this model_type"
        ) from None


def set_num_experts(config: PretrainedConfig, num_experts: int) -> None:
    """In place. A gate's parts keep their size, so that there are more of them. `InvalidInput` if that cannot be."""
    text = config.get_text_config()
    counts = {name: value for name in EXPERT_COUNTS if isinstance(value := getattr(text, name, None), int)}
    if not counts:
        raise InvalidInput(
            f"the number of experts of a {config.model_type} config is not known by name",
            field="num_experts",
            value=num_experts,
        )
    before = next(iter(counts.values()))
    for name in GATE_PARTS:
        parts = getattr(text, name, None)
        if isinstance(parts, int) and parts > 1:
            if num_experts * parts % before:
                raise InvalidInput(
                    f"the gate chooses among parts of {before // parts} experts",
                    field="num_experts",
                    value=num_experts,
                    remedy=f"use a multiple of {before // parts}",
                )
            setattr(text, name, num_experts * parts // before)
    for name in counts:
        setattr(text, name, num_experts)
