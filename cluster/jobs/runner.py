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
    evaluation = _Evaluation(config, router, documents, reporter)
    if start_step == 0:
        evaluation.batches()  # its faults come before anything has begun; a job that goes on does not wait for them
    router.begin_run(config.optimizer, config.balance, config.compression)
    if start_step == 0:
        evaluation.after(0)
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
        reporter.step_committed(step, metrics_of(report, lr, time.monotonic() - started), report.load_LE)
        if config.eval.every_steps and (step % config.eval.every_steps == 0 or step == config.steps):
            evaluation.after(step)
        after_step(step)


class _Evaluation:
    """Reads the held-out batches when they are needed first."""

    def __init__(self, config: JobConfig, router: RouterPort, documents: Documents, reporter: Reporter) -> None:
        self._config, self._router, self._documents, self._reporter = config, router, documents, reporter
        self._batches: list[MicroBatch] | None = None

    def batches(self) -> list[MicroBatch]:
        """Empty if the job wants no evaluation. `InvalidInput` if too few documents are held out."""
        if self._batches is None:
            config, self._batches = self._config, []
            if config.eval.every_steps and config.data.heldout_every:
                documents, eos_id = self._documents.heldout(), self._documents.eos_id
                self._batches = evaluation_batches(documents, config.batch, eos_id, config.eval.batches)
        return self._batches

    def after(self, step: int) -> None:
        if batches := self.batches():
            loss, count = self._router.evaluate(batches)
            self._reporter.evaluated(step, {"heldout_loss": loss, "heldout_tokens": float(count)})


def metrics_of(report: StepReport, lr: float, seconds: float) -> dict[str, float]:
    """What is told of a step, which took so long in all."""
    metrics = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": lr,
        "tokens": float(report.num_tokens),
        "tokens_per_s": report.num_tokens / seconds,
        "load_max_over_mean": max_over_mean(report.load_LE),
        "retries": float(report.retries),
        "staleness_mean": report.staleness_mean,
        "staleness_max": float(report.staleness_max),
        "merged_updates": float(report.merged_updates),
    }
    if report.balance_loss:
        metrics["balance_loss"] = report.balance_loss
    return metrics


def max_over_mean(load_LE: Sequence[Sequence[int]]) -> float:
    """Largest load of an expert over the mean of its layer, the worst layer: 1 is perfect balance."""
    ratios = [max(layer) * len(layer) / sum(layer) for layer in load_LE if sum(layer)]
    return max(ratios, default=0.0)
