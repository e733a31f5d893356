"""Training in a steady state, of experts with many weights for few tokens: their updates are a large part of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.optim import OptimizerSettings
from actors.router.router import Router
from actors.trunk.model import ModelSource
from actors.values import StepReport


@dataclass(frozen=True)
class TrainingShape:
    """Of the model and of what is timed."""

    hidden_size: int = 256
    width: int = 512
    """Of an expert, inside."""
    num_layers: int = 4
    num_experts: int = 16
    vocabulary: int = 512
    sequences: int = 2
    sequence_length: int = 64
    warmups: int = 4
    """Steps before those that are timed."""
    steps: int = 10
    """Timed in a round."""

    @property
    def tokens(self) -> int:
        """Of a step, that are predicted."""
        return self.sequences * (self.sequence_length - 1)

    def source(self) -> ModelSource:
        return ModelSource(values=self._model(), dtype="float32")

    def batches(self) -> list[list[Tensor]]:
        """A few steps' token ids [B, S]."""
        draw = torch.Generator().manual_seed(0)
        size = (self.sequences, self.sequence_length)
        return [[torch.randint(0, self.vocabulary, size, generator=draw)] for _ in range(4)]

    def _model(self) -> dict[str, Any]:
        return {
            "model_type": "mixtral",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": 2,
            "max_position_embeddings": self.sequence_length,
        }


class Training:
    """A router's steps on batches that come again and again."""

    def __init__(self, router: Router, shape: TrainingShape) -> None:
        self._router, self._batches = router, shape.batches()
        self._number = 0

    def begin(self, staleness: int) -> None:
        """Another run, with moments of its own."""
        self._router.begin_run(OptimizerSettings(staleness=staleness))

    def step(self) -> StepReport:
        batch = self._batches[self._number % len(self._batches)]
        self._number += 1
        return self._router.train_step(batch, lr=1e-4, clip_norm=1.0)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Of torch's in each operation, in this process: one for an actor among others, where small operations would wait
    for their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
