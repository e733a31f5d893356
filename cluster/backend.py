"""What the gRPC front asks of the cluster: one contract and the plain values that cross it.

`cluster.fabric` implements it over Ray actors, tests implement it in memory. Every call takes the caller's remaining
time in seconds (`timeout_s`) and raises errors of the tree in `actors.errors` and `cluster.errors` only.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from actors.values import NEWEST, Growth, VersionChoice
from cluster.config import JobConfig
from cluster.control.ledger import Entry, Kind, Summary


class JobState(enum.Enum):
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True)
class Job:
    id: str
    request_id: str
    config: JobConfig
    state: JobState
    step: int
    """Steps committed so far."""
    created_s: float
    """Unix time, as are the other two."""
    started_s: float | None = None
    ended_s: float | None = None
    error: str = ""
    last_event: int = 0
    """Number of the newest event; numbers rise from 1, without gaps but where the coordinator died."""


@dataclass(frozen=True)
class JobEvent:
    number: int
    time_s: float
    kind: str
    """`state`, `step`, `eval` or `note`."""
    state: JobState
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """step: loss (nats a token), grad_norm, lr, tokens, tokens_per_s, load_max_over_mean, retries,
    staleness_mean and staleness_max (updates that were not in the experts it was computed on), merged_updates;
    eval: heldout_loss (nats a token), heldout_tokens."""
    message: str = ""


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these texts; it is not returned."""


@dataclass(frozen=True)
class Prompt:
    """Exactly one of the two is set."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class GenerateChunk:
    text: str
    """May be empty while a multi-byte character or a possible stop text is incomplete."""
    token_ids: tuple[int, ...]
    version: int
    """Expert version (committed steps) these tokens were computed with."""
    finish_reason: str = ""
    """Empty until the last chunk: `length`, `stop` or `end_of_text`."""
    prompt_tokens: int = 0


@dataclass(frozen=True)
class ScoreResult:
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural log-probability of token i given those before it; one fewer than token_ids."""
    version: int


@dataclass(frozen=True)
class EmbedResult:
    embedding: tuple[float, ...]
    """Mean of the last hidden states over the tokens; length D."""
    num_tokens: int
    version: int


@dataclass(frozen=True)
class ExpertCache:
    """What the expert cache of one actor has done since the actor started."""

    hits: int = 0
    """Visits of one matrix of one group by a forward or backward that found it on the device, or on its way there."""
    misses: int = 0
    loaded_ahead: int = 0
    """Loads that were started before they were asked for."""
    loaded_bytes: int = 0
    """To the device, for whatever reason."""
    wait_s: float = 0.0
    """That computing stood still for loads."""
    device_bytes: int = 0
    """That weights take on the device."""


@dataclass(frozen=True)
class LinkUse:
    """What crossed the links of one kind that an actor opened, since it started."""

    kind: str
    """E.g. `socket/ipc+shm`."""
    sent_bytes: int
    received_bytes: int
    wait_s: float
    """That its threads waited for answers."""


@dataclass(frozen=True)
class GpuUse:
    used_bytes: int
    """Of the GPU's memory, by whomever."""
    total_bytes: int
    allocated_bytes: int
    """By tensors of this actor."""
    busy_ratio: float | None = None
    """Share of the last second or less in which it computed; None where that cannot be told."""


@dataclass(frozen=True)
class ActorStatus:
    id: str
    role: str
    """`router` or `expert`."""
    node: str
    pid: int
    state: str
    """`starting`, `ready` or `lost`."""
    device: str
    version: int
    groups: tuple[int, ...] = ()
    """Expert groups it owns or has a copy of (expert actors)."""
    memory_bytes: int = 0
    """Bytes of parameters, gradients and optimizer state it holds."""
    tokens: int = 0
    """Tokens received since it started (expert actors)."""
    link: str = ""
    """Kind of its link to the router, e.g. `socket/ipc+shm`: the way of messages, and that of large tensors."""
    cache: ExpertCache | None = None
    """Of an expert actor whose device does not hold all its groups."""
    zone: str = ""
    """Of the node; empty if it is not known."""
    link_use: tuple[LinkUse, ...] = ()
    """Of the links that it opened, one for each kind; those of now and those that ended."""
    gpu: GpuUse | None = None
    """None for an actor without one."""
    num_waiting: int = 0
    """Requests that wait at a router for their turn."""
    queue_s: float = 0.0
    """How long the first of them has."""
    merged_updates: int = 0
    """Committed updates that were made as part of others, since it was behind (expert actors)."""
    pinned_bytes: int = 0
    """Bytes beside `memory_bytes`, for pinned versions alone."""


@dataclass(frozen=True)
class Pin:
    """A version that is kept while training goes on."""

    name: str
    version: int
    created_s: float
    """Unix time, as is the end."""
    expires_s: float | None = None
    """When it is given up by itself; None: never."""


@dataclass(frozen=True)
class ClusterStatus:
    model: str
    num_parameters: int
    num_experts: int
    num_moe_layers: int
    top_k: int
    version: int
    placement_epoch: int
    owners: Mapping[int, str]
    """Expert group -> id of the actor that owns it; a group that nobody holds any more is left out."""
    group_size: int
    nodes: tuple[str, ...]
    actors: tuple[ActorStatus, ...]
    load_LE: tuple[tuple[int, ...], ...]
    """Tokens each expert of each MoE layer got over the last window of training steps."""
    jobs: Mapping[str, int]
    """Job state -> number of jobs."""
    ready: bool
    message: str = ""
    max_positions: int = 0
    """Longest sequence the model takes, tokens."""
    vocab_size: int = 0
    shared_share: float = 0.0
    """Parameters of shared experts over all parameters."""
    copies: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Expert group -> ids of the actors that hold it beside its owner; groups without a copy are left out."""
    staleness_mean: float = 0.0
    """Committed updates that were not in the experts which the last step was computed on; the mean over them."""
    staleness_max: int = 0
    pins: tuple[Pin, ...] = ()
    """Versions that are kept beside the newest, oldest pin first."""


@dataclass(frozen=True)
class LoadStep:
    """What the experts got in one committed step."""

    version: int
    """That of the weights after the step."""
    time_s: float
    """Unix time of the commit."""
    tokens: int
    """Tokens of the step's micro-batches together."""
    load_E: tuple[int, ...]
    """(token, expert) pairs each expert number got, summed over the MoE layers."""


@dataclass(frozen=True)
class LoadReport:
    """How evenly the experts were used over the last committed steps; without a step, all of it is empty or 0."""

    version: int
    window_steps: int
    """Steps summed here: those committed so far, at most the size of the window."""
    group_size: int
    """Experts an expert group."""
    load_LE: tuple[tuple[int, ...], ...]
    """(token, expert) pairs each expert of each MoE layer got."""
    actors: Mapping[str, int]
    """Expert actor -> pairs of the experts that it holds now, whoever held them in the window; those of a group with
    copies are split evenly over its holders."""
    nodes: Mapping[str, int]
    """Node -> the same, summed over its actors; the empty name for actors that have not reported yet."""
    max_vio_L: tuple[float, ...]
    """Largest load over the layer's mean, less 1: 0 is even (MaxVio of 2408.15664)."""
    max_vio: float
    """Of the worst layer, as are the standard deviation and the warning below."""
    utilisation_std_L: tuple[float, ...]
    """Standard deviation of load over the layer's mean."""
    utilisation_std: float
    microbatch_tokens_per_expert: float
    """Mean pairs an expert of a layer got a micro-batch, which its products are computed on."""
    step_tokens_per_expert: float
    """The same a step."""
    warning: str
    """Not empty if experts get fewer than 64 tokens a micro-batch: names the batch size that would reach it."""
    history: tuple[LoadStep, ...]
    """Every step of the window, oldest first."""


@dataclass(frozen=True)
class GroupMove:
    """An actor gets an expert group from another, weights and optimizer state."""

    group: int
    source: str
    target: str
    """Actor ids."""
    num_bytes: int
    kind: str = "move"
    """`move`: the source gives the group up; `copy`: it keeps it, and the target holds it too."""


@dataclass(frozen=True)
class Rebalance:
    """What moving expert groups would bring, or has brought. Balance is average over maximum load of the actors, over
    the window of `LoadReport`: 1 is even. A group's load is split evenly over its holders."""

    moves: tuple[GroupMove, ...]
    balance_before: float
    balance_after: float
    """Of the same load under the new placement."""
    placement_epoch: int
    """After the moves that were carried out."""
    done: bool
    """False for a dry run, and where moving would not pay."""
    message: str = ""
    """Why nothing is moved; empty otherwise."""
    unmet: tuple[str, ...] = ()
    """What was asked of the placement and cannot be had, as sentences."""
    stall_s: float = 0.0
    """Longest time that a step waited for a change of placement; 0 for a dry run."""


class OperationState(enum.Enum):
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELLED)


@dataclass(frozen=True)
class Operation:
    """A change of the cluster that goes on after the call that asked for it has returned."""

    id: str
    request_id: str
    kind: str
    """`scale_experts`, `scale_routers`, `drain_node` or `grow_model`."""
    state: OperationState
    target: int
    """Expert actors, routers, or experts of every MoE layer, there should be at the end; 0 for `drain_node`."""
    progress: float
    """In [0, 1]; never falls."""
    message: str
    """What is being done, or was done last."""
    created_s: float
    """Unix time, as is the end."""
    ended_s: float | None = None
    error: str = ""
    prepare_s: float = 0.0
    """From the request until all was prepared in the background, while steps and requests went on; 0 before the end."""
    stall_s: float = 0.0
    """Longest time that a step waited for a switch; 0 before the end."""
    node: str = ""
    """Node that is emptied by `drain_node`; empty otherwise."""


@dataclass(frozen=True)
class LedgerReport:
    """What disturbances cost."""

    entries: tuple[Entry, ...]
    """Oldest first."""
    summary: Mapping[Kind, Summary]
    """The same entries summed up, by kind; kinds without an entry are left out."""


@dataclass(frozen=True)
class Checkpoint:
    """A training state that the cluster can go back to, or start from."""

    version: int
    created_s: float
    """Unix time."""
    url: str
    size_bytes: int
    job_id: str = ""
    """Of the job that it was written in, or after; empty without one."""
    job_step: int = 0


@dataclass(frozen=True)
class ModelDirectory:
    path: str
    files: tuple[str, ...]
    size_bytes: int
    version: int


class Backend(Protocol):
    async def submit_job(self, config: JobConfig, *, request_id: str, timeout_s: float) -> Job:
        """Idempotent: the same request id and config give the job that exists. `AlreadyExists` if configs differ."""

    async def get_job(self, job_id: str, *, timeout_s: float) -> Job: ...

    async def list_jobs(self, *, timeout_s: float) -> Sequence[Job]:
        """Newest first."""

    async def cancel_job(self, job_id: str, *, timeout_s: float) -> Job:
        """`FailedPrecondition` when the job is final already."""

    async def job_events(
        self, job_id: str, *, after: int, max_events: int, wait_s: float
    ) -> tuple[Sequence[JobEvent], Job]:
        """Events with a number above `after`, oldest first; waits up to `wait_s` for the first. Empty if none came."""

    def generate(
        self, prompt: Prompt, params: SamplingParams, choice: VersionChoice = NEWEST, *, timeout_s: float
    ) -> AsyncIterator[GenerateChunk]:
        """Closing the iterator ends the generation on the router. `VersionGone` if no pin keeps what is chosen."""

    async def score(self, prompt: Prompt, choice: VersionChoice = NEWEST, *, timeout_s: float) -> ScoreResult: ...

    async def embed(self, prompt: Prompt, choice: VersionChoice = NEWEST, *, timeout_s: float) -> EmbedResult: ...

    async def status(self, *, timeout_s: float) -> ClusterStatus: ...

    async def load_report(self, *, timeout_s: float) -> LoadReport: ...

    async def rebalance(self, *, dry_run: bool, timeout_s: float) -> Rebalance:
        """Moves and copies expert groups by load, and restores missing copies, while steps and requests go on.

        `FailedPrecondition` while another rebalance runs, or where there is no load to go by and nothing is missing.
        """

    async def scale(self, actors: int, *, request_id: str, timeout_s: float) -> Operation:
        """Starts to bring the expert actors to this number, and returns: the operation goes on by itself.

        Idempotent: the same request id and number give the operation that exists. `AlreadyExists` if numbers differ,
        `FailedPrecondition` while another operation runs.
        """

    async def scale_routers(self, routers: int, *, request_id: str, timeout_s: float) -> Operation:
        """The same for the routers."""

    async def drain(self, node: str, deadline_s: float, *, request_id: str, timeout_s: float) -> Operation:
        """Starts to empty the node within `deadline_s`, and returns: the operation goes on by itself, and succeeds only
        if the node holds nothing of the cluster any more.

        Idempotent by request id as `scale`. `InvalidInput` if there is no such node, `FailedPrecondition` while another
        operation runs, and for the node of the router or the coordinator.
        """

    async def grow(self, growth: Growth, *, request_id: str, timeout_s: float) -> Operation:
        """Starts to add experts to the model, and returns, as `scale` does.

        `InvalidInput` if the model or its gate cannot have so many.
        """

    async def operation(self, operation_id: str, *, timeout_s: float) -> Operation: ...

    async def operations(self, *, timeout_s: float) -> Sequence[Operation]:
        """Newest first."""

    async def cancel_operation(self, operation_id: str, *, timeout_s: float) -> Operation:
        """`FailedPrecondition` when the operation is final already."""

    async def ledger(self, after: int, *, timeout_s: float) -> Sequence[Entry]:
        """What disturbances cost: entries with a number above `after`, of those that are kept, oldest first."""

    async def save_checkpoint(self, *, timeout_s: float) -> Checkpoint:
        """Returns when it is there in full. `StorageFull` if it finds no room."""

    async def checkpoints(self, *, timeout_s: float) -> Sequence[Checkpoint]:
        """Those that are kept, newest first."""

    async def pin_version(self, name: str, ttl_s: float, *, timeout_s: float) -> Pin:
        """Keeps the newest version for requests that choose it, for `ttl_s` seconds or, with 0, until it is unpinned.

        `name` may be empty. Idempotent while no step is committed; `AlreadyExists` if the name is that of an earlier
        version, `FailedPrecondition` if there are as many pins as may be, `InvalidInput` where none can be kept.
        """

    async def unpin_version(self, name: str, *, timeout_s: float) -> None:
        """`NotFound` if there is no such pin."""

    async def export_model(self, path: str, *, timeout_s: float) -> ModelDirectory:
        """Writes a Hugging Face model directory to `path` below the storage root."""

    async def import_model(self, path: str, *, timeout_s: float) -> ClusterStatus:
        """Replaces weights and optimizer state by those of a model directory of the same architecture."""
