"""Training jobs in threads of the coordinator's actor, which report to its state machine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from actors.compress.settings import CompressionSettings
from actors.errors import MoeClusterError
from actors.moe.settings import BalanceSettings
from actors.values import Course, Promotion, StepReport
from cluster.backend import Job
from cluster.config import JobConfig, ModelConfig, OptimizerConfig
from cluster.control.coordinator import Coordinator
from cluster.errors import Unavailable
from cluster.fabric.calls import call, is_death
from cluster.fabric.checkpoints import Checkpoints
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.options import ROUTER
from cluster.fabric.recovery import Recovery
from cluster.fabric.routers import Routers
from cluster.fabric.snapshots import Snapshots
from cluster.fabric.standing import Following
from cluster.jobs.batches import MicroBatch
from cluster.jobs.runner import Documents, JobStopped, run_job
from cluster.jobs.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

NO_BALANCE = BalanceSettings()
NO_COMPRESSION = CompressionSettings()
STEP_TIMEOUT_S = 3600.0
"""Last resort: a router that died is noticed at once, and its links have deadlines of their own."""


class JobThreads:
    def __init__(
        self,
        state: Guarded,
        crew: Crew,
        model: ModelConfig,
        checkpoints: Checkpoints,
        recovery: Recovery,
        routers: Routers,
        snapshots: Snapshots,
    ) -> None:
        self._state, self._crew, self._model, self._routers = state, crew, model, routers
        self._checkpoints, self._recovery, self._snapshots = checkpoints, recovery, snapshots
        self._stop: dict[str, threading.Event] = {}
        self._closing = False

    def start(self, job_id: str, config: JobConfig, start_step: int) -> None:
        """`start_step`: steps that are done, and that the router has the state after."""
        stop = self._stop[job_id] = threading.Event()
        threading.Thread(target=self._run, args=(job_id, config, start_step, stop), name=job_id, daemon=True).start()

    def stop(self, job_id: str) -> None:
        """After the step at hand."""
        if job_id in self._stop:
            self._stop[job_id].set()

    def stop_all(self) -> None:
        """The cluster ends: jobs stay as the last checkpoint has them, so that the next start resumes them."""
        self._closing = True
        for event in list(self._stop.values()):
            event.set()

    def _run(self, job_id: str, config: JobConfig, start_step: int, stop: threading.Event) -> None:
        step: int | None = start_step
        try:
            while step is not None:
                try:
                    step = self._run_from(job_id, config, step, stop)
                except Exception as error:  # in telling how it ended, or in coming back: it must end all the same
                    self._stumbled(job_id, error)
                    step = None
            if not self._closing:
                self._snapshots.after_job()
                self._checkpoints.after_job()
        finally:
            self._stop.pop(job_id, None)

    def _run_from(self, job_id: str, config: JobConfig, step: int, stop: threading.Event) -> int | None:
        """Where to go on from after what was lost came back; None: the job has ended, and that is reported."""
        try:
            self._run_steps(job_id, config, step, stop)
        except JobStopped:
            if not self._closing:
                self._end(lambda coordinator, now: coordinator.jobs.stopped(job_id, now))
        except MoeClusterError as error:
            return self._failed(job_id, error, stop)
        except Exception as error:
            self._stumbled(job_id, error)
        else:
            self._end(lambda coordinator, now: coordinator.jobs.finished(job_id, now))
        return None

    def _stumbled(self, job_id: str, error: Exception) -> None:
        """Nobody expected it. A job whose thread ended without a word would keep all others waiting."""
        logger.error("%s failed", job_id, exc_info=error)
        text = f"{type(error).__name__}: {error}"
        if not self._closing:
            self._end(lambda coordinator, now: coordinator.jobs.failed(job_id, text, now))

    def _run_steps(self, job_id: str, config: JobConfig, step: int, stop: threading.Event) -> None:
        run_job(
            config,
            _JobRouter(self._crew, self._routers, self._checkpoints, self._job(job_id, step)),
            self._documents(config),
            _Reporter(self._state, job_id),
            stop.is_set,
            start_step=step,
            after_step=lambda done: self._after_step(job_id, done, stop),
        )

    def _after_step(self, job_id: str, step: int, stop: threading.Event) -> None:
        self._snapshots.after_step(job_id, step)
        self._checkpoints.after_step(job_id, step, stop.is_set)

    def _failed(self, job_id: str, error: MoeClusterError, stop: threading.Event) -> int | None:
        """As `_run_from`."""
        text = str(error)
        try:
            if not self._closing and self._recovery.is_needed_after(error):
                step = self._recovery.go_back(job_id, stop.is_set)
                if step is not None:
                    return step
                text += "; the last checkpoint is not of this job"
        except MoeClusterError as hopeless:
            text += f"; {hopeless}"
        if stop.is_set():
            self._end(lambda coordinator, now: coordinator.jobs.stopped(job_id, now))
        elif not self._closing:
            logger.warning("%s failed: %s", job_id, text)
            self._end(lambda coordinator, now: coordinator.jobs.failed(job_id, text, now))
        return None

    def _end(self, report: Callable[[Coordinator, float], None]) -> None:
        self._checkpoints.owe()  # whoever is told of the end must find it after the next start
        with self._state.changing() as coordinator:
            report(coordinator, time.time())

    def _job(self, job_id: str, step: int) -> Job:
        with self._state.reading() as coordinator:
            return replace(coordinator.jobs.get(job_id), step=step)

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
            coordinator.jobs.evaluated(self._job_id, metrics, time.time())


class RayRouter:
    """`RouterPort` over a router actor's handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def begin_run(
        self,
        optimizer: OptimizerConfig,
        balance: BalanceSettings = NO_BALANCE,
        compression: CompressionSettings = NO_COMPRESSION,
    ) -> Course:
        course: Course = call(ROUTER, self._handle.begin_run.remote(optimizer, balance, compression), STEP_TIMEOUT_S)
        return course

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


class _JobRouter:
    """`RouterPort` over whichever router leads, of a job that has done so many steps; checkpoints and all routers learn
    whose their steps are. When the leader dies another one goes on with the very step."""

    def __init__(self, crew: Crew, routers: Routers, checkpoints: Checkpoints, job: Job) -> None:
        self._crew, self._routers = crew, routers
        self._checkpoints, self._job = checkpoints, job
        self._version = 0
        self._num_again = 0
        """Tries at the step at hand that ended with a leader's death."""

    def begin_run(
        self,
        optimizer: OptimizerConfig,
        balance: BalanceSettings = NO_BALANCE,
        compression: CompressionSettings = NO_COMPRESSION,
    ) -> Course:
        def begin() -> Course:
            if self._job.step == 0:
                course: Course = self._ask(
                    lambda handle: handle.begin_run.remote(optimizer, balance, compression, self._job)
                )
            else:
                course = self._ask(lambda handle: handle.continue_run.remote(balance, compression, self._job))
            return course

        course = self._checkpoints.job_begins(self._job.id, begin, self._job.step)
        begun = replace(course, version=course.version - self._job.step)
        self._routers.follow(Following(self._job, begun))
        self._version, self._num_again = course.version, 0
        return course

    def train_step(
        self, microbatches: Sequence[MicroBatch], *, lr: float, clip_norm: float, bias_speed: float = 0.0
    ) -> StepReport:
        report: StepReport = self._ask(
            lambda handle: handle.train_step.remote(list(microbatches), lr, clip_norm, bias_speed), self._done_before
        )
        self._version = report.step
        num_again, self._num_again = self._num_again, 0
        return replace(report, retries=report.retries + num_again)

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        result: tuple[float, int] = self._ask(lambda handle: handle.evaluate.remote(list(batches)))
        self._num_again = 0
        return result

    def _ask(
        self, ask: Callable[[Any], Any], answered: Callable[[Promotion], StepReport | None] = lambda promotion: None
    ) -> Any:
        """`answered`: the answer, where the leader before had all but given it when it died."""
        while True:
            leader, handle = self._crew.leader, self._crew.router
            try:
                return call(leader, ask(handle), STEP_TIMEOUT_S)
            except Unavailable as error:
                if not is_death(error):
                    raise
                promotion = self._routers.after(leader, error)
                if (report := answered(promotion)) is not None:
                    return report
                self._num_again += 1

    def _done_before(self, promotion: Promotion) -> StepReport | None:
        """The step at hand, if it counts already."""
        if promotion.version <= self._version:
            return None
        if promotion.report is None:
            raise MoeClusterError(f"nobody can tell what came of the step to version {promotion.version}")
        return promotion.report
