"""Questions about a model that need transformers: asked of the router actor, which has it loaded anyway."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from actors.errors import InvalidInput
from actors.moe.gating import shared_share
from actors.trunk.model import ModelSource, skeleton
from cluster.config import ClusterConfig
from cluster.control.model import ModelFacts


def model_source(config: ClusterConfig, num_experts: int = 0) -> ModelSource:
    """`num_experts` of every MoE layer, for a model that has grown; 0: as the config says."""
    model = config.model
    return ModelSource(
        path=model.path,
        values=None if model.path else dict(model.values),
        seed=model.seed,
        dtype=config.router.dtype,
        num_experts=num_experts or None,
    )


def model_facts(config: ClusterConfig, num_experts: int = 0) -> ModelFacts:
    model = skeleton(model_source(config, num_experts))
    text = model.config.get_text_config()
    return ModelFacts(
        name=Path(config.model.path).name if config.model.path else str(model.config.model_type),
        num_parameters=model.num_parameters,
        num_experts=model.num_experts,
        num_moe_layers=len(model.layers),
        top_k=model.top_k,
        max_positions=int(getattr(text, "max_position_embeddings", 1 << 20)),
        vocab_size=int(text.vocab_size),
        shared_share=shared_share(model.model),
        expert_bytes=sum(
            math.prod(shape) * model.dtype.itemsize for layer in model.layers for shape in layer.shapes().values()
        ),
        architecture=type(model.model).__name__,
    )


def check_same_architecture(config: ClusterConfig, directory: str, num_experts: int = 0) -> None:
    """`InvalidInput` naming the first difference between the running model, which may have grown to `num_experts`, and
    the one in `directory`."""
    mine = skeleton(model_source(config, num_experts))
    theirs = skeleton(replace(model_source(config), path=directory, values=None))
    if type(mine.model) is not type(theirs.model):
        raise InvalidInput(
            f"is a {type(theirs.model).__name__}, the cluster runs a {type(mine.model).__name__}",
            field="path",
            value=directory,
        )
    shapes = {name: tuple(p.shape) for name, p in mine.model.named_parameters()}
    for name, parameter in theirs.model.named_parameters():
        if shapes.pop(name, None) != tuple(parameter.shape):
            raise InvalidInput(f"{name} has another shape than in the running model", field="path", value=directory)
    if shapes:
        raise InvalidInput(f"{next(iter(shapes))} of the running model is not in it", field="path", value=directory)
