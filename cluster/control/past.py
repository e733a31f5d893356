"""What a coordinator makes of the time before it: of what was written down, and of what living actors or a checkpoint
say. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.backend import Job, JobState, Operation
from cluster.control.ledger import Entry

EVENTS_UNKNOWN = 1000
"""Numbers of a job's events that may have been given out since the journal was written, beside those of its steps."""
EVENTS_A_STEP = 4
BACK = "the coordinator died and is back"
ANEW = "everything was started anew, and no checkpoint has its steps; begins anew"


@dataclass(frozen=True)
class Past:
    """What is known of the time before this coordinator began; jobs and operations oldest first."""

    jobs: tuple[Job, ...] = ()
    operations: tuple[Operation, ...] = ()
    entries: tuple[Entry, ...] = ()
    """Of the ledger."""


@dataclass(frozen=True)
class StepTold:
    time_s: float
    """Unix time of the commit."""
    seconds: float
    """That it took."""
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Standing:
    """Where the living actors are, as they say: what counts where a `Past` says otherwise."""

    version: int
    is_pristine: bool
    """As of `Coordinator`."""
    can_restore: bool
    has_router: bool
    job: Job | None = None
    """The last one that the router began, or went on with."""
    step: int = 0
    """Steps that it has done."""
    reports: tuple[StepTold, ...] = ()
    """Of the last ones, oldest first: who watches the job may not have heard of them."""


@dataclass(frozen=True)
class Recalled:
    """A job as it is to be taken over."""

    job: Job
    message: str = ""
    """To those who watch it: it goes on. Empty: it ended before, or never began."""
    error: str = ""
    """Why it cannot go on; empty if it can."""
    reports: tuple[StepTold, ...] = ()
    """Of steps after that of the job."""


def after_death(jobs: Sequence[Job], standing: Standing) -> list[Recalled]:
    """Of the coordinator alone: the job that ran goes on after the steps that the router has done."""
    began = standing.job
    if began and not began.state.is_final and began.id not in {job.id for job in jobs}:
        jobs = [*jobs, began]  # after the last word of the journal
    recalled = []
    for job in jobs:
        never_began = job.state is JobState.QUEUED and not job.step and (began is None or job.id != began.id)
        recalled.append(Recalled(job) if job.state.is_final or never_began else _going_on(job, standing))
    return recalled


def _going_on(job: Job, standing: Standing) -> Recalled:
    error, step, reports = "", job.step, tuple[StepTold, ...]()
    if standing.has_router:
        is_there = standing.job is not None and standing.job.id == job.id
        step, reports = (standing.step, standing.reports) if is_there else (0, ())
        if not is_there and job.step:
            error = f"{BACK}, and no actor has its steps"
    elif not standing.can_restore and (job.step or not standing.is_pristine):
        error = f"{BACK}, and the router died with it; there is no checkpoint"
    told = replace(job, step=step - len(reports), last_event=_beyond(job, step))
    return Recalled(told, BACK if error else f"{BACK}; goes on after step {step}", error, reports)


def after_restart(jobs: Sequence[Job], saved: Job | None, message: str) -> list[Recalled]:
    """Of everything. `saved`: the job that the weights are of, as it was then; the `message` is for it.

    Others that had begun begin anew, since their steps are in no weights. Whoever was told that a job was cancelled or
    failed will not see it go on.
    """
    known = {job.id: job for job in jobs}
    if saved:
        known[saved.id] = _merged(known.get(saved.id), saved)
    recalled = []
    for job in sorted(known.values(), key=number_of):
        if saved and job.id == saved.id:
            recalled.append(Recalled(job, message))
        elif job.state.is_final or (job.state is JobState.QUEUED and not job.step):
            recalled.append(Recalled(job))
        else:
            recalled.append(Recalled(replace(job, step=0, last_event=_beyond(job, 0)), ANEW))
    return recalled


def number_of(job: Job) -> int:
    return int(job.id.rpartition("-")[2])


def _beyond(job: Job, step: int) -> int:
    """A number above those of all events that were told since the job was written down, which nobody remembers."""
    return job.last_event + EVENTS_UNKNOWN + EVENTS_A_STEP * max(0, step - job.step)


def _merged(known: Job | None, saved: Job) -> Job:
    """The same job as the journal and as a checkpoint have it: its end from the one, its steps from the other."""
    if known is None:
        return saved
    last_event = max(saved.last_event, _beyond(known, saved.step))
    if known.state in (JobState.CANCELLED, JobState.FAILED):
        return replace(known, last_event=last_event)
    state = JobState.CANCELLING if known.state is JobState.CANCELLING and not saved.state.is_final else saved.state
    return replace(saved, state=state, last_event=last_event)
