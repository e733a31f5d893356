"""One training job from its first step to its last, over contracts: a router, documents, and someone to tell."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.compress.settings import CompressionSettings
from actors.errors import NonFinite
from actors.moe.settings import BalanceSettings
from actors.values import StepReport
from cluster.config import JobConfig, OptimizerConfig
from cluster.jobs.batches import MicroBatch, StepBatches, evaluation_batches
from cluster.jobs.packing import TokenIds
from cluster.jobs.schedule import lr_at

logger = logging.getLogger(__name__)


class RouterPort(Protocol):
    """What a job needs of a router, wherever it runs."""

    def begin_run(
        self, optimizer: OptimizerConfig, balance: BalanceSettings, compression: CompressionSettings
    ) -> object: ...

    def train_step(
        self, microbatches: Sequence[MicroBatch], *, lr: float, clip_norm: float, bias_speed: float
    ) -> StepReport: ...

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """-> mean loss in nats a token, number of predicted tokens."""


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, opened anew at each call."""

    train: Callable[[], Iterable[TokenIds]]
    """Goes on for ever: epochs follow each other."""
    heldout: Callable[[], Iterable[TokenIds]]
    eos_id: int


class Reporter(Protocol):
    def step_committed(self, step: int, metrics: dict[str, float], load_LE: list[list[int]]) -> None: ...

    def evaluated(self, step: int, metrics: dict[str, float]) -> None: ...


class JobStopped(Exception):
    """The job ended between two steps because it was asked to."""


def run_job(
    config: JobConfig,
    router: RouterPort,
    documents: Documents,
    reporter: Reporter,
    should_stop: Callable[[], bool],
    *,
    start_step: int = 0,
    after_step: Callable[[int], object] = lambda step: None,
) -> None:
    """Runs every step after `start_step`. Raises what the router raises; what was committed stays committed.

    With a `start_step` the router has the state after that step, and the job goes on at the batch that is next.
    `after_step` is called between steps, also before the first, with the number of those that are done; it may wait.
    """
    heldout: list[MicroBatch] = []
    if config.eval.every_steps and config.data.heldout_every:
        heldout = evaluation_batches(documents.heldout(), config.batch, documents.eos_id, config.eval.batches)
    router.begin_run(config.optimizer, config.balance, config.compression)
    if start_step == 0:
        _evaluate(router, heldout, reporter, 0)
        after_step(0)
    shuffle_seed = config.data.seed if config.data.shuffle else None
    batches = StepBatches(
        documents.train(), config.batch, documents.eos_id, shuffle_seed=shuffle_seed, start_step=start_step
    )
    for step in range(start_step + 1, config.steps + 1):
        if should_stop():
            raise JobStopped
        started = time.monotonic()
        lr = lr_at(step, config.steps, config.optimizer, config.schedule)
        try:
            report = router.train_step(
                next(batches),
                lr=lr,
                clip_norm=config.optimizer.clip_norm,
                bias_speed=config.balance.bias_speed_at(step, config.steps),
            )
        except NonFinite as error:
            raise NonFinite(f"step {step}: {error}", step=step) from error
        reporter.step_committed(step, _metrics(report, lr, time.monotonic() - started), report.load_LE)
        if config.eval.every_steps and (step % config.eval.every_steps == 0 or step == config.steps):
            _evaluate(router, heldout, reporter, step)
        after_step(step)


def _evaluate(router: RouterPort, heldout: list[MicroBatch], reporter: Reporter, step: int) -> None:
    if heldout:
        loss, count = router.evaluate(heldout)
        reporter.evaluated(step, {"heldout_loss": loss, "heldout_tokens": float(count)})


def _metrics(report: StepReport, lr: float, seconds: float) -> dict[str, float]:
    metrics = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": lr,
        "tokens": float(report.num_tokens),
        "tokens_per_s": report.num_tokens / seconds,
        "load_max_over_mean": max_over_mean(report.load_LE),
        "retries": float(report.retries),
    }
    return metrics | {"balance_loss": report.balance_loss} if report.balance_loss else metrics


def max_over_mean(load_LE: Sequence[Sequence[int]]) -> float:
    """Largest load of an expert over the mean of its layer, the worst layer: 1 is perfect balance."""
    ratios = [max(layer) * len(layer) / sum(layer) for layer in load_LE if sum(layer)]
    return max(ratios, default=0.0)
