"""Jobs, their events, and pages of them."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from actors.errors import InvalidInput
from cluster.backend import Job, JobEvent, JobState
from cluster.service.codec import checks, enums, times
from cluster.service.codec.checks import MAX_INT64, Range
from cluster.service.codec.config import job_config_from_message, job_config_to_message
from protos.moecluster.v1 import training_pb2 as pb

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
_STATES = pb.JobState.DESCRIPTOR
_KINDS = pb.JobEventKind.DESCRIPTOR


def job_to_message(job: Job) -> pb.Job:
    message = pb.Job(
        id=job.id,
        request_id=job.request_id,
        config=job_config_to_message(job.config),
        state=enums.to_number(_STATES, job.state.value),
        step=job.step,
        create_time=times.to_message(job.created_s),
        error=job.error,
        last_event=job.last_event,
    )
    if job.started_s is not None:
        message.start_time.CopyFrom(times.to_message(job.started_s))
    if job.ended_s is not None:
        message.end_time.CopyFrom(times.to_message(job.ended_s))
    return message


def job_from_message(message: pb.Job) -> Job:
    return Job(
        id=message.id,
        request_id=message.request_id,
        config=job_config_from_message(message.config),
        state=JobState(enums.to_name(_STATES, message.state)),
        step=message.step,
        created_s=times.from_message(message.create_time),
        started_s=times.from_message(message.start_time) if message.HasField("start_time") else None,
        ended_s=times.from_message(message.end_time) if message.HasField("end_time") else None,
        error=message.error,
        last_event=message.last_event,
    )


def event_to_message(event: JobEvent) -> pb.JobEvent:
    return pb.JobEvent(
        number=event.number,
        time=times.to_message(event.time_s),
        kind=enums.to_number(_KINDS, event.kind),
        state=enums.to_number(_STATES, event.state.value),
        step=event.step,
        metrics=dict(event.metrics),
        message=event.message,
    )


def event_from_message(message: pb.JobEvent) -> JobEvent:
    return JobEvent(
        number=message.number,
        time_s=times.from_message(message.time),
        kind=enums.to_name(_KINDS, message.kind),
        state=JobState(enums.to_name(_STATES, message.state)),
        step=message.step,
        metrics=dict(message.metrics),
        message=message.message,
    )


def page(jobs: Sequence[Job], page_size: int, page_token: str) -> tuple[Sequence[Job], str]:
    """One page of `jobs` (newest first) and the token of the next.

    The token names the last job of the page, not a position: jobs submitted meanwhile neither repeat nor hide one.
    """
    checks.number("page_size", page_size, Range(0, MAX_PAGE_SIZE))
    size = page_size or DEFAULT_PAGE_SIZE
    start = _start(jobs, page_token) if page_token else 0
    chosen = jobs[start : start + size]
    return chosen, _token(chosen[-1].id) if start + size < len(jobs) else ""


def check_after_event(after_event: int, last_event: int = MAX_INT64) -> None:
    checks.number("after_event", after_event, Range(0, last_event))


def _start(jobs: Sequence[Job], page_token: str) -> int:
    for index, job in enumerate(jobs):
        if _token(job.id) == page_token:
            return index + 1
    raise InvalidInput(
        "was not given out by ListJobs",
        field="page_token",
        value=page_token,
        remedy="leave it empty for the first page",
    )


def _token(job_id: str) -> str:
    return base64.urlsafe_b64encode(job_id.encode()).decode()
