"""Training jobs: what clients ask of them, what the running one reports, and which is the next to start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from actors.errors import InvalidInput
from cluster.backend import Job, JobEvent, JobState
from cluster.config import JobConfig
from cluster.configcheck import validate_job
from cluster.control.decisions import Decision, StartJob, StopJob
from cluster.control.jobtable import JobRecord, JobTable
from cluster.control.past import Recalled
from cluster.errors import FailedPrecondition


class JobDesk:
    """`decide` takes what is to be done. A report about a job that has ended meanwhile is late, not wrong: it is
    ignored."""

    def __init__(self, table: JobTable, max_positions: int, decide: Callable[[Decision], None]) -> None:
        """`max_positions`: the longest sequence that the model takes."""
        self._table, self._max_positions, self._decide = table, max_positions, decide
        self._stopping: str | None = None
        """A job that failed here while its steps may still be running."""

    # --- Asked by clients ----------------------------------------------------------------------------------------

    def submit(self, config: JobConfig, request_id: str, now: float) -> Job:
        """Idempotent by request id.

        `ConfigError` if the job cannot work with this model, `AlreadyExists` if the id came with another config,
        `ResourceExhausted` if the queue is full.
        """
        validate_job(config, "job", max_positions=self._max_positions)
        return self._table.submit(config, request_id, now)

    def cancel(self, job_id: str, now: float) -> Job:
        """A queued job ends at once; a running one is told to stop and ends with `stopped`.

        `FailedPrecondition` if the job is final; cancelling twice is the same as once.
        """
        record = self._table[job_id]
        if record.job.state is JobState.QUEUED:
            record.move(JobState.CANCELLED, now, "cancelled before it started")
        elif record.job.state is not JobState.CANCELLING:
            record.move(JobState.CANCELLING, now)
            self._decide(StopJob(job_id, "cancelled"))
        return record.job

    def get(self, job_id: str) -> Job:
        """`NotFound` if nobody knows of it."""
        return self._table[job_id].job

    def newest_first(self) -> Sequence[Job]:
        return self._table.newest_first()

    def events(self, job_id: str, after: int, max_events: int) -> tuple[tuple[JobEvent, ...], Job]:
        """Events with a number above `after`, oldest first, of those that are kept; and the job."""
        record = self._table[job_id]
        return record.events_after(after, max_events), record.job

    # --- Looked at -----------------------------------------------------------------------------------------------

    def oldest_first(self) -> tuple[Job, ...]:
        return self._table.oldest_first()

    def count_by_state(self) -> dict[str, int]:
        return self._table.count_by_state()

    def active(self) -> Job | None:
        """The one that is running or being cancelled."""
        record = self._table.active()
        return record.job if record else None

    def waiting(self) -> Job | None:
        """One that goes on after the steps it has done, as soon as the cluster is ready."""
        record = self._table.resuming()
        return record.job if record else None

    def require_idle(self, what: str) -> None:
        """`FailedPrecondition` while a job runs or comes to its stop."""
        if job := self.active():
            raise FailedPrecondition(f"{what} while {job.id} is {job.state.value}; cancel it or wait")
        if self._stopping:
            raise FailedPrecondition(f"{what} while {self._stopping} comes to its stop; try again")

    # --- Reported by the running job -----------------------------------------------------------------------------

    def next_step(self, job_id: str, step: int) -> Job | None:
        """The job, if this is news: steps come in order, from 1, and a repeated report is ignored."""
        record = self._active(job_id)
        if record is None or step <= record.job.step:
            return None
        if step != record.job.step + 1:
            raise InvalidInput(f"step {record.job.step + 1} of {job_id} was never committed", field="step", value=step)
        return record.job

    def committed(self, job_id: str, step: int, metrics: Mapping[str, float], now: float) -> None:
        """The `next_step`. A loss that is not finite fails the job."""
        loss = metrics.get("loss", 0.0)
        if math.isfinite(loss):
            self._table[job_id].commit(step, metrics, now)
        else:
            self.fail(job_id, f"loss of step {step} is {loss}", now)

    def evaluated(self, job_id: str, metrics: Mapping[str, float], now: float) -> None:
        if record := self._active(job_id):
            record.record("eval", now, metrics)

    def note(self, job_id: str, message: str, now: float) -> None:
        """Something a reader of the job's events should know, e.g. a step that was aborted and run again."""
        if record := self._active(job_id):
            record.record("note", now, message=message)

    def finished(self, job_id: str, now: float) -> None:
        """Every step is committed."""
        if record := self._ended(job_id):
            if record.job.step < record.job.config.steps:
                raise FailedPrecondition(f"{job_id} committed {record.job.step} of {record.job.config.steps} steps")
            record.move(JobState.SUCCEEDED, now)

    def stopped(self, job_id: str, now: float) -> None:
        """The answer to `StopJob`: the step at hand is done or aborted, and no other will begin."""
        record = self._ended(job_id)
        if record is None:
            return
        if record.job.state is JobState.CANCELLING:
            record.move(JobState.CANCELLED, now, f"cancelled after step {record.job.step}")
        else:
            record.move(JobState.FAILED, now, f"stopped after step {record.job.step} without being asked")

    def failed(self, job_id: str, error: str, now: float) -> None:
        """The job ended by itself; there is nothing left to stop."""
        if record := self._ended(job_id):
            record.move(JobState.FAILED, now, error)

    # --- Decided here --------------------------------------------------------------------------------------------

    def start_next(self, now: float) -> None:
        """The cluster is ready: the first in the queue, unless another is not over yet."""
        record = self._table.next_queued()
        if record is None or self._table.active() or self._stopping:
            return
        record.move(JobState.RUNNING, now)
        self._decide(StartJob(record.job.id, record.job.config, record.job.step))

    def fail(self, job_id: str, error: str, now: float) -> None:
        """It cannot go on, though its steps may still be running."""
        self._table[job_id].move(JobState.FAILED, now, error)
        self._decide(StopJob(job_id, error))
        self._stopping = job_id

    def recall(self, jobs: Sequence[Recalled], now: float) -> None:
        """Jobs of before a restart, oldest first."""
        for recalled in jobs:
            self._table.recall(recalled, now)

    def go_back(self, steps: Mapping[str, int], message: str, now: float) -> None:
        """`steps`: job -> step it goes on after. A job that waits to go on after other steps has failed; one of which
        no step is known begins anew."""
        waiting = self._table.resuming()
        for job_id, step in steps.items():
            if waiting and waiting.job.id == job_id:
                waiting.go_back(step, message, now)
            elif record := self._active(job_id):
                record.go_back(step, message, now)
        if waiting and waiting.job.step and waiting.job.id not in steps:
            error = f"{message}; the checkpoint is not of this job, whose steps are lost"
            waiting.move(JobState.FAILED, now, error)

    def give_up_waiting(self, error: str, now: float) -> None:
        """A job that was to go on cannot, if there is one."""
        if record := self._table.resuming():
            record.move(JobState.FAILED, now, error)

    def forget_old(self) -> None:
        """Ended jobs beyond those that are remembered."""
        self._table.forget_old(keep=self._stopping)

    def _ended(self, job_id: str) -> JobRecord | None:
        """As `_active`, for a report that the job's steps have come to an end."""
        record = self._active(job_id)
        if job_id == self._stopping:
            self._stopping = None
        return record

    def _active(self, job_id: str) -> JobRecord | None:
        record = self._table[job_id]
        if record.job.state is JobState.QUEUED:
            raise FailedPrecondition(f"{job_id} was never started")
        return None if record.job.state.is_final else record
