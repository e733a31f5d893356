"""A backend in memory: jobs take steps, events are kept, generation echoes the prompt. Nothing is computed.

It lives in one event loop and is driven from there. `delays` and `failures` make single calls slow or fail, and the
fields at the top let a test in another thread see what happened.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from actors.errors import CheckpointError, InvalidInput, VersionGone
from actors.values import NEWEST, Growth, Placement, VersionChoice
from cluster.backend import (
    ActorStatus,
    Checkpoint,
    ClusterStatus,
    EmbedResult,
    ExpertCache,
    GenerateChunk,
    GpuUse,
    GroupMove,
    Job,
    JobEvent,
    JobState,
    LinkUse,
    LoadReport,
    ModelDirectory,
    Operation,
    Pin,
    Prompt,
    Rebalance,
    SamplingParams,
    ScoreResult,
)
from cluster.config import JobConfig
from cluster.control.ledger import Entry, Kind, Ledger
from cluster.control.load import LoadWindow
from cluster.control.operations import OperationTable
from cluster.errors import AlreadyExists, FailedPrecondition, NotFound

NUM_EXPERTS = 4
NUM_LAYERS = 2
VOCAB_SIZE = 256
NODES = "node-0", "node-1"
STEP_LOAD_LE = ((10, 20, 30, 40), (0, 50, 50, 0))
"""What the experts get in every step."""
STEP_TOKENS = 50
STEP_TIME_S = 1e9
GROUP_BYTES = 1_500_000
STALL_S = 0.0125
MAX_PINS = 2
PREPARE_S = 1.5
PROGRESS = 0.25
"""What an operation gets done from one look at it to the next."""


class MemoryBackend:
    def __init__(self, *, step_s: float = 0.0, token_s: float = 0.0, ready: bool = True) -> None:
        self.step_s = step_s
        self.token_s = token_s
        self.ready = ready
        self.delays_s: dict[str, float] = {}
        """Method name -> seconds it takes."""
        self.failures: dict[str, list[Exception]] = {}
        """Method name -> what its next calls raise, one each."""
        self.timeouts_s: dict[str, float] = {}
        """Method name -> the time it was given, last call."""
        self.cancelled = threading.Event()
        """A call was cancelled while it waited."""
        self.delayed = threading.Event()
        """A call has come that a delay makes slow."""
        self.generation_started = threading.Event()
        self.generation_closed = threading.Event()
        self.version = 0
        self.placement = Placement(1, (("expert-0",),), NUM_EXPERTS)
        """Rebalancing replaces it, and moves groups without copies only."""
        self.cache: ExpertCache | None = None
        """Of every expert actor."""
        self.gpu: GpuUse | None = None
        """Of the router."""
        self.unmet: tuple[str, ...] = ()
        """What every rebalance says it could not have."""
        self.saved: list[Checkpoint] = []
        """Newest first."""
        self.is_stuck = False
        """Operations get nothing done."""
        self.growths: list[Growth] = []
        """That were asked for."""
        self.pins: dict[str, Pin] = {}
        self.costs = Ledger()
        self._operations = OperationTable()
        self._loads = LoadWindow(2, NUM_LAYERS, NUM_EXPERTS)
        self._jobs: dict[str, Job] = {}
        self._events: dict[str, list[JobEvent]] = {}
        self._changed = asyncio.Condition()
        self._worker: asyncio.Task[None] | None = None

    async def submit_job(self, config: JobConfig, *, request_id: str, timeout_s: float) -> Job:
        await self._enter("submit_job", timeout_s)
        for job in self._jobs.values():
            if job.request_id == request_id:
                if job.config != config:
                    raise AlreadyExists(f"request id {request_id} was used before with another config")
                return job
        job_id = f"job-{len(self._jobs) + 1}"
        self._jobs[job_id] = Job(job_id, request_id, config, JobState.QUEUED, step=0, created_s=time.time())
        self._events[job_id] = []
        await self._record(job_id, "state", state=JobState.QUEUED)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return self._jobs[job_id]

    async def get_job(self, job_id: str, *, timeout_s: float) -> Job:
        await self._enter("get_job", timeout_s)
        if job_id not in self._jobs:
            raise NotFound(f"no job {job_id}")
        return self._jobs[job_id]

    async def list_jobs(self, *, timeout_s: float) -> Sequence[Job]:
        await self._enter("list_jobs", timeout_s)
        return list(reversed(self._jobs.values()))

    async def cancel_job(self, job_id: str, *, timeout_s: float) -> Job:
        job = await self.get_job(job_id, timeout_s=timeout_s)
        if job.state.is_final:
            raise FailedPrecondition(f"job {job_id} is {job.state.value} already")
        queued = job.state is JobState.QUEUED
        await self._record(job_id, "state", state=JobState.CANCELLED if queued else JobState.CANCELLING)
        return self._jobs[job_id]

    async def job_events(
        self, job_id: str, *, after: int, max_events: int, wait_s: float
    ) -> tuple[Sequence[JobEvent], Job]:
        await self._enter("job_events", wait_s)
        if job_id not in self._jobs:
            raise NotFound(f"no job {job_id}")
        events = self._events[job_id]
        try:
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(lambda: len(events) > after)
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return events[after : after + max_events], self._jobs[job_id]

    async def generate(
        self, prompt: Prompt, params: SamplingParams, choice: VersionChoice = NEWEST, *, timeout_s: float
    ) -> AsyncIterator[GenerateChunk]:
        token_ids = self._tokens(prompt)
        try:
            await self._enter("generate", timeout_s)
            self.generation_started.set()
            echoed = [token_ids[i % len(token_ids)] for i in range(params.max_tokens)]
            for index, token_id in enumerate(echoed, start=1):
                await asyncio.sleep(self.token_s)
                reason = "length" if index == len(echoed) else ""
                version = self._version(choice)
                yield GenerateChunk(chr(token_id), (token_id,), version, reason, len(token_ids))
        finally:
            self.generation_closed.set()

    async def score(self, prompt: Prompt, choice: VersionChoice = NEWEST, *, timeout_s: float) -> ScoreResult:
        await self._enter("score", timeout_s)
        token_ids = self._tokens(prompt)
        return ScoreResult(token_ids, tuple(-i / 10 for i in range(1, len(token_ids))), self._version(choice))

    async def embed(self, prompt: Prompt, choice: VersionChoice = NEWEST, *, timeout_s: float) -> EmbedResult:
        await self._enter("embed", timeout_s)
        return EmbedResult((0.5, -0.25), len(self._tokens(prompt)), self._version(choice))

    async def status(self, *, timeout_s: float) -> ClusterStatus:
        await self._enter("status", timeout_s)
        states = [job.state for job in self._jobs.values()]
        router = ActorStatus(
            "router-0",
            "router",
            "node-0",
            100,
            "ready",
            "cpu",
            self.version,
            memory_bytes=1 << 20,
            link_use=(LinkUse("socket/ipc", 5000, 4000, 0.25),),
            gpu=self.gpu,
            num_waiting=2,
            queue_s=0.75,
            pinned_bytes=1000 * len(self.pins),
        )
        experts = (self._expert(actor, pid) for pid, actor in enumerate(self.placement.actors, start=101))
        return ClusterStatus(
            model="memory",
            num_parameters=1000,
            num_experts=NUM_EXPERTS,
            num_moe_layers=NUM_LAYERS,
            top_k=2,
            version=self.version,
            placement_epoch=self.placement.epoch,
            owners=dict(enumerate(_owners(self.placement))),
            group_size=self.placement.group_size,
            nodes=NODES,
            actors=(router, *experts),
            load_LE=((1, 2, 3, 4), (0, 0, 0, 0)),
            jobs={state.value: states.count(state) for state in JobState},
            ready=self.ready,
            max_positions=512,
            vocab_size=VOCAB_SIZE,
            copies={group: held[1:] for group, held in enumerate(self.placement.holders) if held[1:]},
            pins=tuple(self.pins.values()),
        )

    async def load_report(self, *, timeout_s: float) -> LoadReport:
        await self._enter("load_report", timeout_s)
        nodes = dict.fromkeys(self.placement.actors, "node-1")
        return self._loads.report(self.version, self.placement, nodes)

    async def rebalance(self, *, dry_run: bool, timeout_s: float) -> Rebalance:
        await self._enter("rebalance", timeout_s)
        if not self.version:
            raise FailedPrecondition("no load yet: no training step is committed")
        old, load_G = self.placement, self._load_of_groups()
        owners, moves = _evened(old, load_G)
        done = bool(moves) and not dry_run
        if done:
            self.placement = Placement(old.epoch + 1, tuple((owner,) for owner in owners), old.group_size)
        return Rebalance(
            moves=moves,
            balance_before=_balance(_load_of_actors(old.actors, _owners(old), load_G)),
            balance_after=_balance(_load_of_actors(old.actors, owners, load_G)),
            placement_epoch=self.placement.epoch,
            done=done,
            message="" if moves else "no move makes the load more even",
            unmet=self.unmet,
            stall_s=STALL_S if done else 0.0,
        )

    async def scale(self, actors: int, *, request_id: str, timeout_s: float) -> Operation:
        await self._enter("scale", timeout_s)
        return self._operations.start("scale_experts", actors, request_id, time.time())

    async def drain(self, node: str, deadline_s: float, *, request_id: str, timeout_s: float) -> Operation:
        await self._enter("drain", timeout_s)
        self.timeouts_s["drain.deadline"] = deadline_s
        if node not in NODES:
            raise InvalidInput("is no node of the cluster", field="node", value=node, remedy=f"use one of {NODES}")
        return self._operations.start("drain_node", 0, request_id, time.time(), node)

    async def grow(self, growth: Growth, *, request_id: str, timeout_s: float) -> Operation:
        await self._enter("grow", timeout_s)
        self.growths.append(growth)
        return self._operations.start("grow_model", growth.num_experts, request_id, time.time())

    async def scale_routers(self, routers: int, *, request_id: str, timeout_s: float) -> Operation:
        await self._enter("scale_routers", timeout_s)
        return self._operations.start("scale_routers", routers, request_id, time.time())

    async def operation(self, operation_id: str, *, timeout_s: float) -> Operation:
        """Each look at it finds it further on."""
        await self._enter("operation", timeout_s)
        operation = self._operations.get(operation_id)
        if not operation.state.is_final and not self.is_stuck:
            self._go_on(operation)
        return self._operations.get(operation_id)

    async def operations(self, *, timeout_s: float) -> Sequence[Operation]:
        await self._enter("operations", timeout_s)
        return self._operations.all()

    async def cancel_operation(self, operation_id: str, *, timeout_s: float) -> Operation:
        await self._enter("cancel_operation", timeout_s)
        return self._operations.cancel(operation_id, time.time())

    async def ledger(self, after: int, *, timeout_s: float) -> Sequence[Entry]:
        await self._enter("ledger", timeout_s)
        return self.costs.entries(after)

    async def save_checkpoint(self, *, timeout_s: float) -> Checkpoint:
        await self._enter("save_checkpoint", timeout_s)
        url = f"/storage/checkpoints/step-{self.version}"
        self.saved.insert(0, Checkpoint(self.version, STEP_TIME_S, url, 4096, "job-1", self.version))
        return self.saved[0]

    async def checkpoints(self, *, timeout_s: float) -> Sequence[Checkpoint]:
        await self._enter("checkpoints", timeout_s)
        return list(self.saved)

    async def pin_version(self, name: str, ttl_s: float, *, timeout_s: float) -> Pin:
        await self._enter("pin_version", timeout_s)
        name = name or f"v{self.version}"
        made = Pin(name, self.version, STEP_TIME_S, STEP_TIME_S + ttl_s if ttl_s else None)
        if self.pins.setdefault(name, made).version != self.version:
            raise AlreadyExists(f"pin {name} keeps version {self.pins[name].version}")
        if len(self.pins) > MAX_PINS:
            del self.pins[name]
            raise FailedPrecondition(f"there are {MAX_PINS} pins, and router.max_pins is {MAX_PINS}")
        return self.pins[name]

    async def unpin_version(self, name: str, *, timeout_s: float) -> None:
        await self._enter("unpin_version", timeout_s)
        if name not in self.pins:
            raise NotFound(f"no pin {name}")
        del self.pins[name]

    async def export_model(self, path: str, *, timeout_s: float) -> ModelDirectory:
        await self._enter("export_model", timeout_s)
        return ModelDirectory(f"/storage/{path}", ("config.json", "model.safetensors"), 4096, self.version)

    async def import_model(self, path: str, *, timeout_s: float) -> ClusterStatus:
        await self._enter("import_model", timeout_s)
        if path.startswith("missing"):
            raise CheckpointError("no such model directory", field="path", value=path, remedy="export one first")
        return await self.status(timeout_s=timeout_s)

    def _go_on(self, operation: Operation) -> None:
        now = time.time()
        if self._operations.is_cancelling(operation.id):
            self._operations.cancelled(operation.id, now)
        elif operation.target > NUM_EXPERTS and operation.kind == "scale_experts":
            error = f"{NUM_EXPERTS} expert groups are too few for {operation.target} actors"
            self._operations.failed(operation.id, error, now)
        elif operation.progress < 1.0:
            done = operation.progress + PROGRESS
            self._operations.progress(operation.id, done, f"prepared {done:.0%} of the groups")
        elif operation.kind == "drain_node":
            self._ended(operation, "drain", operation.node, now)
        elif operation.kind in ("grow_model", "scale_routers"):
            self._operations.succeeded(operation.id, now, PREPARE_S, STALL_S)
        else:
            self._scaled(operation, now)

    def _scaled(self, operation: Operation, now: float) -> None:
        kind: Kind = "scale_up" if operation.target > len(self.placement.actors) else "scale_down"
        holders = tuple((f"expert-{expert % operation.target}",) for expert in range(NUM_EXPERTS))
        self.placement = Placement(self.placement.epoch + 1, holders, group_size=1)
        self._ended(operation, kind, f"{operation.target} experts", now)

    def _ended(self, operation: Operation, kind: Kind, subject: str, now: float) -> None:
        self._operations.succeeded(operation.id, now, PREPARE_S, STALL_S)
        entry = self.costs.open(kind, subject, operation.created_s)
        self.costs.add(entry, stall_s=STALL_S)
        self.costs.close(entry, now)

    def _expert(self, actor: str, pid: int) -> ActorStatus:
        groups = self.placement.held_by(actor)
        where = "node-1", pid, "ready", "cpu"
        found = ActorStatus(actor, "expert", *where, self.version, groups, 3 << 20, 640, "socket/ipc", self.cache)
        return replace(found, pinned_bytes=3000 * len(self.pins))

    def _load_of_groups(self) -> list[int]:
        load_E = [sum(column) for column in zip(*self._loads.load_LE, strict=True)]
        groups = map(self.placement.experts_of_group, range(self.placement.num_groups))
        return [sum(load_E[expert] for expert in experts) for experts in groups]

    async def _enter(self, method: str, timeout_s: float) -> None:
        self.timeouts_s[method] = timeout_s
        if pending := self.failures.get(method):
            raise pending.pop(0)
        try:
            if delay_s := self.delays_s.get(method, 0.0):
                self.delayed.set()
            await asyncio.sleep(delay_s)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _work(self) -> None:
        """Runs the queued jobs one after another."""
        while queued := [job.id for job in self._jobs.values() if job.state is JobState.QUEUED]:
            await self._run(queued[0])

    async def _run(self, job_id: str) -> None:
        await self._record(job_id, "state", state=JobState.RUNNING)
        for step in range(1, self._jobs[job_id].config.steps + 1):
            await asyncio.sleep(self.step_s)
            if self._jobs[job_id].state is JobState.CANCELLING:
                await self._record(job_id, "state", state=JobState.CANCELLED)
                return
            self.version += 1
            self._loads.add(STEP_LOAD_LE, self.version, STEP_TIME_S + self.version, STEP_TOKENS, microbatches=1)
            await self._record(job_id, "step", step=step, metrics={"loss": 5.0 / step, "tokens_per_s": 1000.0})
        await self._record(job_id, "eval", metrics={"heldout_loss": 2.5, "heldout_tokens": 64.0})
        await self._record(job_id, "state", state=JobState.SUCCEEDED)

    async def _record(
        self,
        job_id: str,
        kind: str,
        *,
        state: JobState | None = None,
        step: int | None = None,
        metrics: dict[str, float] | None = None,
    ) -> None:
        job, now = self._jobs[job_id], time.time()
        state = state or job.state
        event = JobEvent(job.last_event + 1, now, kind, state, job.step if step is None else step, metrics or {})
        self._jobs[job_id] = replace(
            job,
            state=state,
            step=event.step,
            started_s=job.started_s or (now if state is JobState.RUNNING else None),
            ended_s=now if state.is_final else None,
            last_event=event.number,
        )
        self._events[job_id].append(event)
        async with self._changed:
            self._changed.notify_all()

    def _version(self, choice: VersionChoice) -> int:
        if choice.is_newest:
            return self.version
        for pin in self.pins.values():
            if choice.pin == pin.name or choice.pinned == pin.version:
                return pin.version
        raise VersionGone(f"{choice.pin or choice.pinned} is not kept; there are {', '.join(self.pins)}")

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        token_ids = prompt.token_ids if prompt.token_ids is not None else tuple((prompt.text or "").encode())
        for token_id in token_ids:
            if token_id >= VOCAB_SIZE:
                remedy = f"give ids below {VOCAB_SIZE}"
                raise InvalidInput("outside of the vocabulary", field="prompt.token_ids", value=token_id, remedy=remedy)
        return token_ids


def _evened(placement: Placement, load_G: Sequence[int]) -> tuple[tuple[str, ...], tuple[GroupMove, ...]]:
    """Owners of the groups after moves from the busiest actor to the idlest, and the moves."""
    owners, moves = _owners(placement), []
    while True:
        load = _load_of_actors(placement.actors, owners, load_G)
        source, target = max(load, key=load.__getitem__), min(load, key=load.__getitem__)
        gap = load[source] - load[target]
        helpful = [group for group, owner in enumerate(owners) if owner == source and 0 < load_G[group] < gap]
        if not helpful:
            return tuple(owners), tuple(moves)
        group = min(helpful, key=lambda group: abs(gap - 2 * load_G[group]))
        owners[group] = target
        moves.append(GroupMove(group, source, target, GROUP_BYTES, "move"))


def _owners(placement: Placement) -> list[str]:
    return [placement.owner(group) for group in range(placement.num_groups)]


def _load_of_actors(actors: Sequence[str], owners: Sequence[str], load_G: Sequence[int]) -> dict[str, int]:
    return {actor: sum(load for owner, load in zip(owners, load_G, strict=True) if owner == actor) for actor in actors}


def _balance(load: Mapping[str, int]) -> float:
    return sum(load.values()) / len(load) / max(load.values())
