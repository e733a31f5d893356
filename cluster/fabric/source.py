"""The model that a cluster's config names. For expert actors too, which do not have transformers."""

from __future__ import annotations

from actors.trunk.source import ModelSource
from cluster.config import ClusterConfig


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
