"""The coordinator's Ray edge: gives the pure state machine a clock, a lock and hands.

One loop watches actors and steps the machine; each job runs in a thread of its own and reports back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from actors.errors import InvalidInput, MoeClusterError
from actors.moe.settings import BalanceSettings
from actors.values import Placement, StepReport
from cluster.backend import ActorStatus, ClusterStatus, Job, JobEvent, LoadReport, ModelDirectory, Rebalance
from cluster.config import ClusterConfig, JobConfig, OptimizerConfig
from cluster.control.coordinator import Coordinator, ModelFacts
from cluster.control.decisions import ActorLost, Decision, StartJob, StopJob
from cluster.control.rebalancing import Stage, named
from cluster.errors import FailedPrecondition, StartupError, Unavailable
from cluster.fabric.calls import call
from cluster.fabric.nodes import node_names
from cluster.fabric.options import ROUTER, expert_options, router_options
from cluster.fabric.workers import ExpertContact, ExpertWorker, RouterWorker
from cluster.jobs.batches import MicroBatch
from cluster.jobs.runner import Documents, JobStopped, run_job
from cluster.jobs.tokenizer import check_vocabulary, load_tokenizer
from cluster.placement.placement import ActorSlot, spread

logger = logging.getLogger(__name__)

BEAT_S = 0.2
NO_BALANCE = BalanceSettings()
VITALS_EVERY_S = 2.0
STEP_TIMEOUT_S = 3600.0
"""Last resort: a router that died is noticed at once, and its links have deadlines of their own."""


class ControlWorker:
    """Created once a cluster; `start` brings up the actors, `stop` ends them."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._moving = threading.Lock()
        self._stopping = threading.Event()
        self._stop_job: dict[str, threading.Event] = {}
        self._actors: dict[str, Any] = {}
        self._links: dict[str, str] = {}
        """Link kind of each expert actor, as the router last told."""

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> Any:
        """Starts every actor and returns the router's handle. `StartupError` or `InvalidInput` if that cannot be."""
        names = [f"expert-{i}" for i in range(self._config.experts.actors)]
        self._spawn(names)
        model: ModelFacts = self._loaded(ROUTER, self._actors[ROUTER].facts.remote())
        check_vocabulary(self._tokenizer(), model.vocab_size)
        experts = self._config.experts
        where = {name: self._actors[name].node_id.remote() for name in names}
        slots = [ActorSlot(name, self._loaded(name, ref)) for name, ref in where.items()]
        placement = spread(model.num_experts, experts.group_size, slots, experts.redundancy)
        self._coordinator = Coordinator(model, placement, redundancy=experts.redundancy, max_groups=experts.max_groups)
        loading = {name: self._actors[name].load.remote(placement.held_by(name)) for name in names}
        self._experts: dict[str, ExpertContact] = {n: self._loaded(n, ref) for n, ref in loading.items()}
        me = ray.get_runtime_context().current_actor
        loading_router = self._actors[ROUTER].load.remote(placement, self._contacts(placement), me)
        self._router_at: tuple[str, int] = self._loaded(ROUTER, loading_router)
        threading.Thread(target=self._loop, name="coordinator", daemon=True).start()
        with self._changed:
            if not self._changed.wait_for(lambda: self._coordinator.status().ready, self._config.ray.start_timeout_s):
                raise StartupError(f"not ready in time: {self._coordinator.status().message}")
        return self._actors[ROUTER]

    def _spawn(self, experts: Sequence[str]) -> None:
        expert = ray.remote(**expert_options(self._config))(ExpertWorker)
        router = ray.remote(**router_options(self._config))(RouterWorker)
        self._actors[ROUTER] = router.remote(self._config)
        for name in experts:
            self._actors[name] = expert.remote(name, self._config)

    def _loaded(self, name: str, ref: Any) -> Any:
        try:
            return call(name, ref, self._config.ray.start_timeout_s)
        except InvalidInput:
            raise
        except MoeClusterError as error:
            resources = {k: v for k, v in ray.cluster_resources().items() if k.startswith(("moe_", "GPU"))}
            raise StartupError(
                f"{name} did not start within ray.start_timeout_s: {error}; the nodes offer {resources}"
            ) from error

    def stop(self) -> None:
        self._stopping.set()
        for event in self._stop_job.values():
            event.set()
        for actor in self._actors.values():
            ray.kill(actor)

    def experts(self) -> list[tuple[ExpertContact, Any]]:
        """Data-plane contact and Ray handle of each expert actor."""
        return [(contact, self._actors[name]) for name, contact in self._experts.items()]

    # -- asked by the front -------------------------------------------------------------------------------------------

    def submit(self, config: JobConfig, request_id: str) -> Job:
        with self._changed:
            job = self._coordinator.submit(config, request_id, time.time())
            self._changed.notify_all()
            return job

    def job(self, job_id: str) -> Job:
        with self._lock:
            return self._coordinator.job(job_id)

    def jobs(self) -> Sequence[Job]:
        with self._lock:
            return self._coordinator.jobs()

    def cancel(self, job_id: str) -> Job:
        with self._changed:
            job = self._coordinator.cancel(job_id, time.time())
            self._changed.notify_all()
            return job

    def job_events(self, job_id: str, after: int, max_events: int, wait_s: float) -> tuple[Sequence[JobEvent], Job]:
        deadline = time.monotonic() + wait_s
        with self._changed:
            while True:
                events, job = self._coordinator.job_events(job_id, after, max_events)
                remaining = deadline - time.monotonic()
                if events or job.state.is_final or remaining <= 0:
                    return events, job
                self._changed.wait(remaining)

    def status(self) -> ClusterStatus:
        with self._lock:
            return self._coordinator.status()

    def load_report(self) -> LoadReport:
        with self._lock:
            return self._coordinator.load_report()

    def rebalance(self, dry_run: bool, timeout_s: float) -> Rebalance:
        """`FailedPrecondition` while another change of placement is under way."""
        deadline = time.monotonic() + timeout_s
        if not self._moving.acquire(blocking=False):
            raise FailedPrecondition("another rebalance is running; wait until it has ended")
        try:
            with self._lock:
                proposal = self._coordinator.rebalance(self._coordinator.actors())
                epoch = self._coordinator.status().placement_epoch
            if dry_run or not proposal.stages:
                return proposal.report(epoch, done=False)
            waited = [self._carry_out_stage(stage, deadline) for stage in proposal.stages]
            return proposal.report(proposal.target.epoch, done=True, stall_s=max(waited))
        finally:
            self._moving.release()

    def _carry_out_stage(self, stage: Stage, deadline: float) -> float:
        """Copies in the background, then one switch. -> seconds that steps waited for it."""
        with self._lock:
            before = self._coordinator.placement
        arriving = {
            (move.group, move.target): self._actors[move.target].arrive.remote(
                move.group, self._experts[before.owner(move.group)], _remaining(deadline)
            )
            for move in stage.copies
        }
        try:
            for (_, target), ref in arriving.items():
                call(target, ref, _remaining(deadline))
            with self._changed:
                self._coordinator.placed(stage.placement)
                self._changed.notify_all()
            return self._adopt(stage.placement, _remaining(deadline))
        except MoeClusterError:
            self._take_back(stage, before)
            for group, target in arriving:
                self._actors[target].leave_off.remote([group])
            raise

    def _adopt(self, placement: Placement, timeout_s: float) -> float:
        ref = self._actors[ROUTER].adopt.remote(placement, self._contacts(placement))
        waited: float = call(ROUTER, ref, timeout_s)
        return waited

    def _take_back(self, stage: Stage, before: Placement) -> None:
        """The placement before a switch that failed, as a newer one. Whatever died meanwhile has been taken out."""
        with self._changed:
            placement = self._coordinator.placement
            if placement == stage.placement:
                placement = replace(before, epoch=placement.epoch + 1)
                self._coordinator.placed(placement)
        self._actors[ROUTER].adopt.remote(placement, self._contacts(placement))

    def _contacts(self, placement: Placement) -> list[ExpertContact]:
        return [self._experts[name] for name in placement.actors]

    def without(self, gone: Sequence[str]) -> tuple[Placement, list[ExpertContact]]:
        """Asked by a router whose links to these actors broke: the placement to go on with.

        `Unavailable` if nobody else holds some of their groups.
        """
        for name in gone:
            self._bury(name, "its links broke")
        with self._lock:
            placement = self._coordinator.placement
        if placement.missing:
            raise Unavailable(f"no actor holds {named(placement.missing)} any more")
        return placement, self._contacts(placement)

    def _bury(self, name: str, reason: str) -> None:
        """Dead for certain: a process that only lost its links must not come back with old weights."""
        ray.kill(self._actors[name])
        with self._changed:
            self._coordinator.actor_lost(name, time.time(), reason)
            self._changed.notify_all()

    def export(self, path: str, timeout_s: float) -> ModelDirectory:
        root = Path(self._config.storage.root).resolve()
        directory = _below([root], path, "path")
        directory.parent.mkdir(parents=True, exist_ok=True)
        files = call(ROUTER, self._actors[ROUTER].export.remote(str(directory)), timeout_s)
        size = sum((directory / file).stat().st_size for file in files)
        return ModelDirectory(str(directory), tuple(files), size, self.status().version)

    def import_model(self, path: str, timeout_s: float) -> ClusterStatus:
        """Checked here in full before the first weight is touched."""
        roots = [Path(root).resolve() for root in (self._config.storage.root, *self._config.storage.import_roots)]
        directory = _below(roots, path, "path")
        with self._lock:
            self._coordinator.require_idle("a model cannot be imported")
        call(ROUTER, self._actors[ROUTER].check_same_architecture.remote(str(directory)), timeout_s)
        call(ROUTER, self._actors[ROUTER].replace_weights.remote(str(directory)), timeout_s)
        return self.status()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        deaths = {name: actor.wait_until_death.remote() for name, actor in self._actors.items()}
        vitals: dict[str, Any] = {}
        next_vitals = 0.0
        while not self._stopping.wait(BEAT_S):
            try:
                if time.monotonic() >= next_vitals:
                    next_vitals = time.monotonic() + VITALS_EVERY_S
                    vitals |= {n: a.vitals.remote() for n, a in self._actors.items() if n in deaths and n not in vitals}
                self._read_vitals(vitals)
                self._read_deaths(deaths)
                self._advance()
            except Exception:  # the loop must survive: without it no job starts and no death is noticed
                logger.exception("the coordinator's loop stumbled")

    def _advance(self) -> None:
        with self._changed:
            decisions = self._coordinator.step(time.time())
            self._changed.notify_all()
        for decision in decisions:
            self._carry_out(decision)

    def _read_vitals(self, pending: dict[str, Any]) -> None:
        """`pending` maps actor -> reference of its answer; what has come is taken out."""
        ready, _ = ray.wait(list(pending.values()), num_returns=len(pending), timeout=0) if pending else ([], [])
        nodes = node_names() if ready else {}
        links: dict[str, str] = {}
        for name in [n for n, ref in pending.items() if ref in ready]:
            try:
                answer = call(name, pending.pop(name), 1.0)
            except MoeClusterError as error:
                logger.info("no vitals of %s: %s", name, error)
                continue
            links |= answer.get("links", {})
            with self._changed:
                self._coordinator.actor_seen(self._actor_status(name, answer, nodes), time.time())
        self._links = links or self._links

    def _actor_status(self, name: str, vitals: dict[str, Any], nodes: dict[str, str]) -> ActorStatus:
        expert = self._experts.get(name)
        node_id, pid = (expert.node_id, expert.pid) if expert else self._router_at
        role = "expert" if expert else "router"
        return ActorStatus(
            id=name,
            role=role,
            node=nodes.get(node_id, node_id[:12]),
            pid=pid,
            state="ready",
            device=self._config.router.device if role == "router" else self._config.experts.device,
            version=int(vitals["version"]),
            memory_bytes=int(vitals["memory_bytes"]),
            tokens=int(vitals.get("tokens", 0)),
            link=self._links.get(name, ""),
        )

    def _read_deaths(self, deaths: dict[str, Any]) -> None:
        ready, _ = ray.wait(list(deaths.values()), num_returns=len(deaths), timeout=0) if deaths else ([], [])
        for name in [n for n, ref in deaths.items() if ref in ready]:
            try:
                call(name, deaths.pop(name), 1.0)
            except MoeClusterError as error:
                logger.error("lost %s: %s", name, error)
                with self._changed:
                    self._coordinator.actor_lost(name, time.time(), str(error))

    def _carry_out(self, decision: Decision) -> None:
        match decision:
            case StartJob(job_id, config):
                stop = self._stop_job[job_id] = threading.Event()
                threading.Thread(target=self._run_job, args=(job_id, config, stop), name=job_id, daemon=True).start()
            case StopJob(job_id, _):
                if job_id in self._stop_job:
                    self._stop_job[job_id].set()
            case ActorLost(placement=Placement() as placement) if not placement.missing:
                # In the middle of a step the router notices by itself; between steps it need not fall over it.
                self._actors[ROUTER].adopt.remote(placement, self._contacts(placement))
            case ActorLost():
                pass

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _run_job(self, job_id: str, config: JobConfig, stop: threading.Event) -> None:
        reporter = _JobReporter(self, job_id)
        try:
            run_job(config, RayRouter(self._actors[ROUTER]), self._documents(config), reporter, stop.is_set)
        except JobStopped:
            self._end(lambda now: self._coordinator.job_stopped(job_id, now))
        except MoeClusterError as error:
            logger.warning("%s failed: %s", job_id, error)
            text = str(error)
            self._end(lambda now: self._coordinator.job_failed(job_id, text, now))
        except Exception as error:
            logger.exception("%s failed", job_id)
            text = f"{type(error).__name__}: {error}"
            self._end(lambda now: self._coordinator.job_failed(job_id, text, now))
        else:
            self._end(lambda now: self._coordinator.job_finished(job_id, now))
        finally:
            self._stop_job.pop(job_id, None)

    def _end(self, report: Any) -> None:
        with self._changed:
            report(time.time())
            self._changed.notify_all()

    def _documents(self, config: JobConfig) -> Documents:
        from cluster.fabric.data import open_tokens  # Ray Data: a second of importing that only jobs need

        tokenizer = self._tokenizer()
        return Documents(
            train=lambda: open_tokens(config.data, "train", tokenizer),
            heldout=lambda: open_tokens(config.data, "heldout", tokenizer, epochs=1),
            eos_id=tokenizer.eos_id,
        )

    def _tokenizer(self) -> Any:
        return load_tokenizer(self._config.model)


def _remaining(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())


class _JobReporter:
    def __init__(self, control: ControlWorker, job_id: str) -> None:
        self._control, self._job_id = control, job_id

    def step_committed(self, step: int, metrics: dict[str, float], load_LE: list[list[int]]) -> None:
        self._control._end(
            lambda now: self._control._coordinator.step_committed(self._job_id, step, metrics, now, load_LE)
        )

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self._control._end(lambda now: self._control._coordinator.evaluated(self._job_id, metrics, now))


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


def _below(roots: Sequence[Path], path: str, field: str) -> Path:
    """`path` (absolute, or relative to the first root) as a real path that lies strictly below one of the roots."""
    resolved = (roots[0] / path).resolve()
    if not any(root in resolved.parents for root in roots):
        raise InvalidInput(
            "lies outside of the storage root",
            field=field,
            value=path,
            remedy=f"use a path below {', '.join(map(str, roots))}",
        )
    return resolved
