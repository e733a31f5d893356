"""What the coordinator wants done. Values only: the edge carries them out and reports what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from actors.values import Placement
from cluster.config import JobConfig


@dataclass(frozen=True)
class StartJob:
    job_id: str
    config: JobConfig
    start_step: int = 0
    """Steps that it has committed already, before a restart of everything."""


@dataclass(frozen=True)
class StopJob:
    """Stop after the step at hand, then report `JobDesk.stopped`: no other job starts before that.

    Also given for a job that has failed already, while its steps may still be running.
    """

    job_id: str
    reason: str


@dataclass(frozen=True)
class ActorLost:
    """An actor died or fell silent. Told once a loss; a silent one that turns out to be dead is told again."""

    actor_id: str
    role: str
    groups: tuple[int, ...]
    """Expert groups that it held."""
    job_id: str | None
    """The running job, if any."""
    reason: str
    placement: Placement | None = None
    """What to switch to, without the dead actor. None for one that held no group, and for one that is only silent: it
    may come back with its groups."""


Decision = StartJob | StopJob | ActorLost
