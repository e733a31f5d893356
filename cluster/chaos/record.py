"""What a run of the benchmark sees go by. All times Unix seconds; several threads append."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cluster.chaos.schedule import Kind
from cluster.control.ledger import Entry

Phase = Literal["training", "serving"]
PHASES: tuple[Phase, ...] = ("training", "serving")


@dataclass(frozen=True)
class Commit:
    """A training step became part of the weights."""

    time_s: float
    step: int
    loss: float
    tokens: int
    retries: int
    staleness: int = 0
    """Most updates that were not in an expert it was computed on."""
    merged: int = 0
    """Updates of expert actors that were made as part of others."""


@dataclass(frozen=True)
class Gap:
    """A stream waited for a token: since its request was sent, or since the token before."""

    phase: Phase
    start_s: float
    end_s: float
    stream: int = 0
    """Which of those that go on at a time."""

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Request:
    """A stream from its request to its end."""

    phase: Phase
    key: int
    """Which of the fixed requests."""
    started_s: float
    ended_s: float
    tokens: tuple[int, ...]
    error: str
    """Why it has failed; empty if it got all its tokens."""


@dataclass(frozen=True)
class Strike:
    """A fault that was carried out."""

    number: int
    phase: Phase
    kind: Kind
    subject: str
    started_s: float
    held_back_s: float
    """How long it was overdue, since the cluster was not whole."""
    recovered_s: float | None = None
    """When all was as before, copies included; None if the run ended first."""
    problem: str = ""


@dataclass(frozen=True)
class Look:
    """At the cluster's status."""

    time_s: float
    num_experts: int
    """Expert actors that answer; a frozen one does not."""
    missing: str
    """Empty while the cluster is whole."""


@dataclass(frozen=True)
class Vitals:
    """Of the processes that are there for good: front, coordinator, router."""

    time_s: float
    rss_bytes: dict[str, int]
    own_bytes: dict[str, int]
    """Without what is shared with others: the pages of Ray's object store, whose size is fixed, are in the other figure
    of every process that has touched them once."""
    handles: dict[str, int]
    """Those that a calm cluster is judged by are without the connections that Ray keeps (`cluster.chaos.channels`)."""
    num_processes: int
    """Of the whole cluster, without the workers that Ray uses for data and keeps in store."""


@dataclass(frozen=True)
class Span:
    start_s: float
    end_s: float


@dataclass
class Record:
    base: int
    """Expert actors at the start."""
    dtype: str = "float32"
    staleness: int = 0
    """The job's bound."""
    is_exact: bool = False
    """All of the model computes in float64."""
    commits: list[Commit] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    vitals: list[Vitals] = field(default_factory=list)
    reference: Span | None = None
    """The undisturbed stretch of training before the first fault."""
    spans: dict[Phase, Span] = field(default_factory=dict)
    """In which faults could strike."""
    calm: dict[Phase, tuple[Vitals, Vitals]] = field(default_factory=dict)
    """Before the first fault and after the last one was healed, under the same work."""
    ledger: tuple[Entry, ...] = ()
    updates_made: int | None = None
    """Of the job, that all experts' weights are made of, as a checkpoint after its end has it."""
    undisturbed_losses: tuple[float, ...] = ()
    """Of steps from 1 on; empty where that run was not made."""
    expected: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Request key -> tokens on the undisturbed cluster; empty where that run was not made."""
    left_over: list[str] = field(default_factory=list)
    """Processes that outlived their cluster."""
    problems: list[str] = field(default_factory=list)
    interrupted: bool = False
