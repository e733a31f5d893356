"""Which model it is, for those that do not have transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class ModelSource:
    """Which model: a directory with config.json and safetensors, or transformers config values to start with."""

    path: str | None = None
    values: Mapping[str, Any] | None = None
    seed: int = 0
    dtype: str = "float32"
    num_experts: int | None = None
    """Of every MoE layer, for a model that has grown; None: as its config says."""
