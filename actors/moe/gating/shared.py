"""Shared experts (S7): what every token visits beside its routed ones."""

from __future__ import annotations

from torch import nn


def shared_share(model: nn.Module) -> float:
    """Parameters of shared experts over all parameters (articles: below 0.15), of a model on any device, meta too.

    transformers names them `shared_experts`, `shared_expert` or `shared_mlp`, whatever the family; a scalar gate on
    them (`shared_expert_gate`) is none of them. A `Skeleton`'s model is what to give for a checkpoint.
    """
    names = {"shared_experts", "shared_expert", "shared_mlp"}
    total = shared = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        shared += parameter.numel() if names & set(name.split(".")) else 0
    return shared / total if total else 0.0
