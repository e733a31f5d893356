"""Training jobs in threads of the coordinator's actor, which report to its state machine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from actors.errors import MoeClusterError
from actors.moe.settings import BalanceSettings
from actors.values import StepReport
from cluster.config import JobConfig, ModelConfig, OptimizerConfig
from cluster.control.coordinator import Coordinator
from cluster.fabric.calls import call
from cluster.fabric.guarded import Guarded
from cluster.fabric.options import ROUTER
from cluster.jobs.batches import MicroBatch
from cluster.jobs.runner import Documents, JobStopped, run_job
from cluster.jobs.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

NO_BALANCE = BalanceSettings()
STEP_TIMEOUT_S = 3600.0
"""Last resort: a router that died is noticed at once, and its links have deadlines of their own."""


class JobThreads:
    def __init__(self, state: Guarded, router: RayRouter, model: ModelConfig) -> None:
        self._state, self._router, self._model = state, router, model
        self._stop: dict[str, threading.Event] = {}

    def start(self, job_id: str, config: JobConfig) -> None:
        stop = self._stop[job_id] = threading.Event()
        threading.Thread(target=self._run, args=(job_id, config, stop), name=job_id, daemon=True).start()

    def stop(self, job_id: str) -> None:
        """After the step at hand."""
        if job_id in self._stop:
            self._stop[job_id].set()

    def stop_all(self) -> None:
        for event in list(self._stop.values()):
            event.set()

    def _run(self, job_id: str, config: JobConfig, stop: threading.Event) -> None:
        try:
            run_job(config, self._router, self._documents(config), _Reporter(self._state, job_id), stop.is_set)
        except JobStopped:
            self._end(lambda coordinator, now: coordinator.job_stopped(job_id, now))
        except MoeClusterError as error:
            logger.warning("%s failed: %s", job_id, error)
            text = str(error)
            self._end(lambda coordinator, now: coordinator.job_failed(job_id, text, now))
        except Exception as error:
            logger.exception("%s failed", job_id)
            text = f"{type(error).__name__}: {error}"
            self._end(lambda coordinator, now: coordinator.job_failed(job_id, text, now))
        else:
            self._end(lambda coordinator, now: coordinator.job_finished(job_id, now))
        finally:
            self._stop.pop(job_id, None)

    def _end(self, report: Callable[[Coordinator, float], None]) -> None:
        with self._state.changing() as coordinator:
            report(coordinator, time.time())

    def _documents(self, config: JobConfig) -> Documents:
        from cluster.fabric.data import open_tokens  # Ray Data: a second of importing that only jobs need

        tokenizer = load_tokenizer(self._model)
        return Documents(
            train=lambda: open_tokens(config.data, "train", tokenizer),
            heldout=lambda: open_tokens(config.data, "heldout", tokenizer, epochs=1),
            eos_id=tokenizer.eos_id,
        )


class _Reporter:
    def __init__(self, state: Guarded, job_id: str) -> None:
        self._state, self._job_id = state, job_id

    def step_committed(self, step: int, metrics: dict[str, float], load_LE: list[list[int]]) -> None:
        with self._state.changing() as coordinator:
            coordinator.step_committed(self._job_id, step, metrics, time.time(), load_LE)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        with self._state.changing() as coordinator:
            coordinator.evaluated(self._job_id, metrics, time.time())


class RayRouter:
    """`RouterPort` over a router actor's handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def begin_run(self, optimizer: OptimizerConfig, balance: BalanceSettings = NO_BALANCE) -> None:
        call(ROUTER, self._handle.begin_run.remote(optimizer, balance), STEP_TIMEOUT_S)

    def train_step(
        self, microbatches: Sequence[MicroBatch], *, lr: float, clip_norm: float, bias_speed: float = 0.0
    ) -> StepReport:
        ref = self._handle.train_step.remote(list(microbatches), lr, clip_norm, bias_speed)
        report: StepReport = call(ROUTER, ref, STEP_TIMEOUT_S)
        return report

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        result: tuple[float, int] = call(ROUTER, self._handle.evaluate.remote(list(batches)), STEP_TIMEOUT_S)
        return result

    def logits(self, ids: MicroBatch) -> Any:
        return call(ROUTER, self._handle.logits.remote(ids), STEP_TIMEOUT_S)

    def export(self, directory: str) -> object:
        return call(ROUTER, self._handle.export.remote(directory), STEP_TIMEOUT_S)
