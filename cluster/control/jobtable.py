"""Training jobs and their events: the part of the cluster's state that clients watch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from actors.errors import InvalidInput
from cluster.backend import Job, JobEvent, JobState
from cluster.config import JobConfig
from cluster.configfile import job_from_dict, to_dict
from cluster.control.events import EventRing
from cluster.control.past import Recalled, number_of
from cluster.errors import AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted

_NEXT: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.FAILED}),
    JobState.RUNNING: frozenset({JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED}),
}


class JobRecord:
    """One job: its current value, and its newest events. Their numbers rise from 1, without gaps but where the
    coordinator died: there some may have been told that nobody remembers."""

    def __init__(self, job: Job, max_events: int) -> None:
        self.job = job
        self._events = EventRing(max_events)

    def move(self, state: JobState, now: float, message: str = "") -> None:
        if state not in _NEXT.get(self.job.state, frozenset()):
            raise FailedPrecondition(f"job {self.job.id} is {self.job.state.value}, it cannot become {state.value}")
        changes: dict[str, object] = {"state": state}
        if state is JobState.RUNNING:
            changes["started_s"] = now
        if state.is_final:
            changes["ended_s"] = now
        if state is JobState.FAILED:
            changes["error"] = message
        self.job = dataclasses.replace(self.job, **changes)  # type: ignore[arg-type]
        self.record("state", now, message=message)

    def commit(self, step: int, metrics: Mapping[str, float], now: float) -> None:
        self.job = dataclasses.replace(self.job, step=step)
        self.record("step", now, metrics)

    def go_back(self, step: int, message: str, now: float) -> None:
        """The steps after this one will be committed again. Events keep their numbers: those that were told stay."""
        self.job = dataclasses.replace(self.job, step=step)
        self.record("note", now, message=message)

    def recall_end(self) -> None:
        """Of all that was told of a job that is over, its last event is there again: those who watch it wait for it."""
        job, ended_s = self.job, self.job.ended_s or 0.0
        self._events.append(job.last_event, ended_s, "state", job.state, job.step, {}, job.error)

    def record(self, kind: str, now: float, metrics: Mapping[str, float] | None = None, message: str = "") -> None:
        number = self.job.last_event + 1
        self.job = dataclasses.replace(self.job, last_event=number)
        self._events.append(number, now, kind, self.job.state, self.job.step, metrics or {}, message)

    def events_after(self, number: int, max_events: int) -> tuple[JobEvent, ...]:
        """Oldest first. Starts later than `number` + 1 where the history no longer reaches back that far."""
        return self._events.after(number, max_events)


class JobTable:
    """All jobs, oldest first; at most one is running. Final jobs beyond `max_final` are forgotten, oldest first."""

    def __init__(self, max_queued: int, max_final: int, max_events: int) -> None:
        self._max_queued, self._max_final, self._max_events = max_queued, max_final, max_events
        self._records: dict[str, JobRecord] = {}
        self._id_of_request: dict[str, str] = {}
        self._num_submitted = 0

    def submit(self, config: JobConfig, request_id: str, now: float) -> Job:
        if not request_id:
            raise InvalidInput("is empty", field="request_id", remedy="send a fresh UUID, and the same one on a retry")
        if request_id in self._id_of_request:
            return self._submitted_before(config, request_id)
        num_queued = sum(record.job.state is JobState.QUEUED for record in self._records.values())
        if num_queued >= self._max_queued:
            raise ResourceExhausted(f"{num_queued} jobs are queued, the limit; cancel one or wait for one to end")
        self._num_submitted += 1
        job = Job(f"job-{self._num_submitted}", request_id, config, JobState.QUEUED, step=0, created_s=now)
        record = JobRecord(job, self._max_events)
        record.record("state", now)
        self._records[job.id] = record
        self._id_of_request[request_id] = job.id
        return record.job

    def recall(self, recalled: Recalled, now: float) -> None:
        """A job of before a restart, oldest first. It keeps its id and its request id, and its events go on with the
        next number; one that was running is the next to start, after its step."""
        job = recalled.job
        if recalled.message and job.state is JobState.CANCELLING:
            job = dataclasses.replace(job, state=JobState.CANCELLED, ended_s=now)
        elif recalled.message and not job.state.is_final:
            job = dataclasses.replace(job, state=JobState.QUEUED)
        record = self._keep(job)
        if recalled.job.state.is_final:
            record.recall_end()
        if recalled.message:
            record.record("note", now, message=recalled.message)
        for step, report in enumerate(recalled.reports, job.step + 1):
            record.commit(step, report.metrics, report.time_s)
        if recalled.error and not job.state.is_final:
            record.move(JobState.FAILED, now, recalled.error)

    def _keep(self, job: Job) -> JobRecord:
        record = JobRecord(job, self._max_events)
        self._records[job.id] = record
        self._id_of_request[job.request_id] = job.id
        self._num_submitted = max(self._num_submitted, number_of(job))
        return record

    def resuming(self) -> JobRecord | None:
        """A job that had begun, goes on after the steps it has done, and waits for the cluster to be ready. How many
        they are it may have to learn first: a journal has those of some moment before, or none yet."""
        records = self._records.values()
        return next((r for r in records if r.job.state is JobState.QUEUED and r.job.started_s is not None), None)

    def oldest_first(self) -> tuple[Job, ...]:
        return tuple(record.job for record in self._records.values())

    def __getitem__(self, job_id: str) -> JobRecord:
        try:
            return self._records[job_id]
        except KeyError:
            raise NotFound(f"no job {job_id!r}") from None

    def active(self) -> JobRecord | None:
        """The job that is running or being cancelled."""
        active = (JobState.RUNNING, JobState.CANCELLING)
        return next((record for record in self._records.values() if record.job.state in active), None)

    def next_queued(self) -> JobRecord | None:
        return next((record for record in self._records.values() if record.job.state is JobState.QUEUED), None)

    def newest_first(self) -> Sequence[Job]:
        return [record.job for record in reversed(self._records.values())]

    def count_by_state(self) -> dict[str, int]:
        counts = {state.value: 0 for state in JobState}
        for record in self._records.values():
            counts[record.job.state.value] += 1
        return counts

    def forget_old(self, keep: str | None) -> None:
        jobs = (record.job for record in self._records.values())
        final = [job for job in jobs if job.state.is_final and job.id != keep]
        for job in final[: max(0, len(final) - self._max_final)]:
            del self._records[job.id]
            del self._id_of_request[job.request_id]

    def _submitted_before(self, config: JobConfig, request_id: str) -> Job:
        job = self._records[self._id_of_request[request_id]].job
        if job.config != config:
            raise AlreadyExists(f"request id {request_id!r} was used for {job.id}, whose config is another")
        return job


def job_to_dict(job: Job) -> dict[str, Any]:
    """As values of JSON, for a checkpoint."""
    return {**dataclasses.asdict(job), "config": to_dict(job.config), "state": job.state.value}


def job_of_dict(values: Mapping[str, Any], source: str) -> Job:
    """Counterpart of `job_to_dict`. `InvalidInput` that names the `source` for anything else."""
    try:
        config = job_from_dict(values["config"], source)
        return Job(**{**values, "config": config, "state": JobState(values["state"])})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"holds a job that cannot be read: {error}", field=source) from None
