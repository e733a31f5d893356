"""The proof that the split changes nothing: the same steps once in one process and once on a cluster, compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors.optim import OptimizerSettings
from actors.reference import Reference
from actors.trunk.config import config_of
from actors.trunk.source import DTYPES, ModelSource
from actors.values import StepReport
from cluster.config import ModelConfig, OptimizerConfig
from cluster.jobs.batches import MicroBatch


class ClusterPort(Protocol):
    """What the comparison needs of a cluster, wherever it runs."""

    def begin_run(self, optimizer: OptimizerConfig) -> object: ...

    def train_step(self, microbatches: Sequence[MicroBatch], *, lr: float, clip_norm: float) -> StepReport: ...

    def logits(self, ids: MicroBatch) -> torch.Tensor: ...

    def export(self, directory: str) -> object: ...


OpenCluster = Callable[[ModelConfig, str], AbstractContextManager[ClusterPort]]
"""(model directory, dtype) -> a running cluster."""


@dataclass(frozen=True)
class Settings:
    steps: int = 20
    dtype: str = "float64"
    sequences: int = 4
    sequence_length: int = 32
    gradient_accumulation: int = 2
    lr: float = 1e-3
    clip_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Differences:
    """Largest differences between the two runs. Losses and norms relative, weights and logits absolute."""

    steps: int
    loss_rel_diff_max: float
    weight_abs_diff_max: float
    logit_abs_diff_max: float
    """Over the logits before the first step."""
    grad_norm_rel_diff_max: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def verify(model: ModelConfig, open_cluster: OpenCluster, settings: Settings) -> Differences:
    with _directory(model, settings.dtype) as directory:
        reference = Reference(directory, dtype=settings.dtype, experts="eager")
        batches = list(_batches(settings, int(reference.model.config.get_text_config().vocab_size)))
        optimizer = OptimizerConfig(lr=settings.lr, clip_norm=settings.clip_norm)
        reference.begin_run(
            OptimizerSettings(optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay)
        )
        first = batches[0][0]
        with open_cluster(replace(model, path=directory, values={}), settings.dtype) as cluster:
            logit_diff = _largest(reference.logits(torch.tensor(first)), cluster.logits(first))
            cluster.begin_run(optimizer)
            losses, norms = [], []
            for microbatches in batches:
                report = cluster.train_step(microbatches, lr=settings.lr, clip_norm=settings.clip_norm)
                loss, norm = reference.train_step(
                    [torch.tensor(m) for m in microbatches], lr=settings.lr, clip_norm=settings.clip_norm
                )
                losses.append(abs(report.loss - loss) / abs(loss))
                norms.append(abs(report.grad_norm - norm) / max(norm, 1e-30))
            with tempfile.TemporaryDirectory() as out:
                cluster.export(f"{out}/model")
                weight_diff = _weight_difference(reference, f"{out}/model", settings.dtype)
    return Differences(settings.steps, max(losses), weight_diff, logit_diff, max(norms))


def _weight_difference(reference: Reference, exported: str, dtype: str) -> float:
    """Compared through plain transformers, so that the export is part of what is proved."""
    other = AutoModelForCausalLM.from_pretrained(exported, dtype=DTYPES[dtype], trust_remote_code=False)
    theirs = dict(other.named_parameters())
    return max(_largest(p, theirs[name]) for name, p in reference.model.named_parameters())


def _largest(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.detach().double() - right.detach().double()).abs().max())


@contextmanager
def _directory(model: ModelConfig, dtype: str) -> Iterator[str]:
    """The model's directory; a model from scratch is drawn and saved by plain transformers first."""
    if model.path is not None:
        yield model.path
        return
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(ModelSource(values=model.values))
        torch.manual_seed(model.seed)
        AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).save_pretrained(Path(directory) / "model")
        yield f"{directory}/model"


def _batches(settings: Settings, vocab_size: int) -> Iterator[list[MicroBatch]]:
    """Random tokens: they reach every expert, and no run can be right by accident of the text."""
    generator = np.random.default_rng(settings.seed)
    shape = (settings.gradient_accumulation, settings.sequences, settings.sequence_length)
    for _ in range(settings.steps):
        yield list(generator.integers(0, vocab_size, shape, dtype=np.int64))
