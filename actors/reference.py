"""The oracle: the same model in one process, as any transformers user would train it. No line of the split is used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.losses import token_losses
from actors.optim import OptimizerSettings, adamw, scale_gradients, set_lr, square_sum
from actors.trunk.model import DTYPES


class Reference:
    """`experts` is transformers' experts implementation; float64 needs `eager`."""

    def __init__(self, directory: str, *, dtype: str = "float32", experts: str = "eager") -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=DTYPES[dtype], experts_implementation=experts, trust_remote_code=False
        )
        self.begin_run(OptimizerSettings())

    @classmethod
    def of(cls, model: PreTrainedModel) -> Reference:
        """Of a model that is there already, on whatever device."""
        reference = cls.__new__(cls)
        reference.model = model
        reference.begin_run(OptimizerSettings())
        return reference

    def begin_run(self, settings: OptimizerSettings) -> None:
        self.model.train()
        self._optimizer = adamw(self.model.named_parameters(), settings)

    def train_step(self, microbatches: Sequence[Tensor], *, lr: float, clip_norm: float) -> tuple[float, float]:
        """-> mean loss (nats a token) before the update, gradient norm before clipping."""
        num_tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in microbatches)
        total = 0.0
        for ids_BS in microbatches:
            loss = token_losses(self.model(input_ids=ids_BS, use_cache=False).logits, ids_BS) / num_tokens
            loss.backward()
            total += loss.item()
        parameters = list(self.model.parameters())
        norm = math.sqrt(square_sum(parameters))
        if clip_norm > 0:
            scale_gradients(parameters, min(1.0, clip_norm / (norm + 1e-6)))
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total, norm

    @torch.no_grad()
    def logits(self, ids_BS: Tensor) -> Tensor:
        """[B, S, V]"""
        self.model.eval()
        result: Tensor = self.model(input_ids=ids_BS, use_cache=False).logits
        self.model.train()
        return result
