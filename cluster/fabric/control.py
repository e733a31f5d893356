"""The coordinator's Ray edge: gives the pure state machine a clock, a lock and hands.

One loop watches actors and steps the machine. Jobs run in `jobs`, changes of placement in `changes`, actors are in
`crew`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.errors import InvalidInput
from actors.values import Growth, Placement
from cluster.backend import Checkpoint, ClusterStatus, Job, JobEvent, LoadReport, ModelDirectory, Operation, Rebalance
from cluster.config import ClusterConfig, JobConfig
from cluster.configcheck import validate_job_on
from cluster.control.coordinator import Coordinator
from cluster.control.decisions import ActorLost, Decision, StartJob, StopJob
from cluster.control.ledger import Entry
from cluster.errors import StartupError
from cluster.fabric.autoscaling import Autoscaler
from cluster.fabric.calls import call
from cluster.fabric.changes import Changes
from cluster.fabric.checkpoints import Checkpoints, Vault, num_experts_in, sentence, told
from cluster.fabric.crew import Crew
from cluster.fabric.draining import Draining
from cluster.fabric.growing import Growing
from cluster.fabric.guarded import Guarded
from cluster.fabric.jobs import JobThreads
from cluster.fabric.options import ROUTER
from cluster.fabric.rebalancing import Rebalancer
from cluster.fabric.recovery import Recovery, begin_from, load_experts
from cluster.fabric.routers import Routers, ready_routers
from cluster.fabric.scaling import Scaling
from cluster.fabric.workers import ExpertContact
from cluster.jobs.tokenizer import check_vocabulary, load_tokenizer
from cluster.placement.placement import spread

if TYPE_CHECKING:
    from actors.transport.curve import LinkKeys
    from cluster.checkpoint.store import Found

logger = logging.getLogger(__name__)

BEAT_S = 0.1
FIRST_RUN = 1
"""Of a router that starts from a checkpoint; the next job's is one more."""


class ControlWorker:
    """Created once a cluster; `start` brings up the actors, `stop` ends them."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._stopping = threading.Event()
        self._crew = Crew(config)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> Any:
        """Starts every actor and returns the router's handle. `StartupError` or `InvalidInput` if that cannot be."""
        self._me = ray.get_runtime_context().current_actor
        experts = self._config.experts
        model = self._crew.start_router()
        vault = Vault(self._config, model)
        found = vault.newest() if self._config.checkpoint.resume else None
        check_vocabulary(load_tokenizer(self._config.model), model.vocab_size)
        if found is not None and (num_experts := num_experts_in(found)) != model.num_experts:
            self._crew.num_experts = num_experts
            model = self._crew.facts(num_experts)
        slots = self._crew.start_experts(experts.actors)
        placement = spread(model.num_experts, experts.group_size, slots, experts.redundancy)
        coordinator = Coordinator(model, placement, redundancy=experts.redundancy, max_groups=experts.max_groups)
        self._state = Guarded(coordinator)
        self._changes = Changes(self._state, self._crew)
        self._scaling = Scaling(self._state, self._crew, self._changes, experts)
        self._rebalancer = Rebalancer(self._changes, experts.rebalance_every_s)
        self._autoscaler = Autoscaler(self._state, self._crew, self._changes, self._scaling, experts)
        self._draining = Draining(self._state, self._crew, self._changes, self._scaling)
        self._checkpoints = Checkpoints(vault, self._config.checkpoint.every_steps, self._state, self._crew)
        self._recovery = Recovery(
            self._state, self._crew, self._changes, self._scaling, self._checkpoints, self._me, experts.redundancy
        )
        self._growing = Growing(self._state, self._crew, self._changes, self._checkpoints)
        self._load(placement, [slot.id for slot in slots], found)
        self._routers = Routers(self._state, self._crew, self._changes, self._me, self._config.router)
        self._routers.start()
        self._jobs = JobThreads(
            self._state, self._crew, self._config.model, self._checkpoints, self._recovery, self._routers
        )
        threading.Thread(target=self._loop, name="coordinator", daemon=True).start()
        if not self._state.wait_for(lambda c: c.status().ready, self._config.ray.start_timeout_s):
            raise StartupError(f"not ready in time: {self.status().message}")
        return self._crew.router

    def _load(self, placement: Placement, names: Sequence[str], found: Found | None) -> None:
        """From the model directory, or from a checkpoint."""
        if found is None:
            self._crew.load_experts(placement, names)
        else:
            logger.info("goes on from %s", sentence(found))
            self._crew.load_experts(Placement(0, (), placement.group_size), names)
            load_experts(self._crew, placement, found, FIRST_RUN)
        self._crew.load_router(placement, self._me, found, FIRST_RUN)
        if found is not None:
            begin_from(self._state, found)

    def ready_routers(self) -> dict[str, Any]:
        """Handles of the routers by name, where they and the experts can answer."""
        with self._state.reading() as coordinator:
            return ready_routers(coordinator, self._crew)

    def stop(self) -> None:
        self._stopping.set()
        if hasattr(self, "_draining"):
            self._draining.stop()
        if hasattr(self, "_jobs"):
            self._jobs.stop_all()
        self._crew.end_all()

    def experts(self) -> list[tuple[ExpertContact, Any]]:
        return self._crew.experts()

    def link_keys(self) -> LinkKeys | None:
        return self._crew.link_keys

    # -- asked by the front -------------------------------------------------------------------------------------------

    def submit(self, config: JobConfig, request_id: str) -> Job:
        validate_job_on(config, self._config.experts, "job")
        with self._state.changing() as coordinator:
            return coordinator.submit(config, request_id, time.time())

    def job(self, job_id: str) -> Job:
        with self._state.reading() as coordinator:
            return coordinator.job(job_id)

    def jobs(self) -> Sequence[Job]:
        with self._state.reading() as coordinator:
            return coordinator.jobs()

    def cancel(self, job_id: str) -> Job:
        with self._state.changing() as coordinator:
            return coordinator.cancel(job_id, time.time())

    def job_events(self, job_id: str, after: int, max_events: int, wait_s: float) -> tuple[Sequence[JobEvent], Job]:
        def is_there(coordinator: Coordinator) -> bool:
            events, job = coordinator.job_events(job_id, after, max_events)
            return bool(events) or job.state.is_final

        self._state.wait_for(is_there, wait_s)
        with self._state.reading() as coordinator:
            return coordinator.job_events(job_id, after, max_events)

    def status(self) -> ClusterStatus:
        with self._state.reading() as coordinator:
            return coordinator.status()

    def load_report(self) -> LoadReport:
        with self._state.reading() as coordinator:
            return coordinator.load_report()

    def rebalance(self, dry_run: bool, timeout_s: float) -> Rebalance:
        return self._changes.rebalance(dry_run, timeout_s)

    def scale(self, actors: int, request_id: str) -> Operation:
        return self._scaling.scale(actors, request_id)

    def drain(self, node: str, deadline_s: float, request_id: str) -> Operation:
        return self._draining.drain(node, deadline_s, request_id)

    def grow(self, growth: Growth, request_id: str) -> Operation:
        return self._growing.grow(growth, request_id)

    def scale_routers(self, routers: int, request_id: str) -> Operation:
        return self._routers.scale(routers, request_id)

    def operation(self, operation_id: str) -> Operation:
        with self._state.reading() as coordinator:
            return coordinator.operations.get(operation_id)

    def operations(self) -> Sequence[Operation]:
        with self._state.reading() as coordinator:
            return coordinator.operations.all()

    def cancel_operation(self, operation_id: str) -> Operation:
        with self._state.changing() as coordinator:
            return coordinator.operations.cancel(operation_id, time.time())

    def ledger(self, after: int) -> Sequence[Entry]:
        with self._state.reading() as coordinator:
            return coordinator.ledger.entries(after)

    def export(self, path: str, timeout_s: float) -> ModelDirectory:
        root = Path(self._config.storage.root).resolve()
        directory = _below([root], path, "path")
        directory.parent.mkdir(parents=True, exist_ok=True)
        files = call(ROUTER, self._crew.router.export.remote(str(directory)), timeout_s)
        size = sum((directory / file).stat().st_size for file in files)
        return ModelDirectory(str(directory), tuple(files), size, self.status().version)

    def import_model(self, path: str, timeout_s: float) -> ClusterStatus:
        """Checked here in full before the first weight is touched."""
        roots = [Path(root).resolve() for root in (self._config.storage.root, *self._config.storage.import_roots)]
        directory = _below(roots, path, "path")
        with self._state.reading() as coordinator:
            coordinator.require_idle("a model cannot be imported")
        call(ROUTER, self._crew.router.check_same_architecture.remote(str(directory)), timeout_s)
        call(ROUTER, self._crew.router.replace_weights.remote(str(directory)), timeout_s)
        with self._state.changing() as coordinator:
            coordinator.imported()
        self._checkpoints.after_change()
        return self.status()

    def save_checkpoint(self, timeout_s: float) -> Checkpoint:
        """Steps wait for the copying alone. `StorageFull`, or `Unavailable` while another is written for too long."""
        return told(self._checkpoints.save(timeout_s))

    def checkpoints(self) -> Sequence[Checkpoint]:
        """Newest first."""
        return [told(found) for found in self._checkpoints.vault.all()]

    # -- asked by the router ------------------------------------------------------------------------------------------

    def without(self, gone: Sequence[str]) -> tuple[Placement, list[ExpertContact]]:
        return self._changes.without(gone)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._stopping.wait(BEAT_S):
            try:
                self._look()
                with self._state.changing() as coordinator:
                    decisions = coordinator.step(time.time())
                for decision in decisions:
                    self._carry_out(decision)
                self._draining.look()
                self._routers.look()
                self._scaling.heal()
                self._recovery.heal()
                self._autoscaler.look()
                self._rebalancer.look()
            except Exception:  # the loop must survive: without it no job starts and no death is noticed
                logger.exception("the coordinator's loop stumbled")

    def _look(self) -> None:
        signs = self._crew.look()
        with self._state.changing() as coordinator:
            for status in signs.seen:
                coordinator.actor_seen(status, time.time())
        for name, reason in signs.dead.items():
            logger.error("lost %s: %s", name, reason)
            self._changes.bury(name, reason)
        for name, silent_s in signs.frozen.items():
            self._crew.cut_off(name)
            self._changes.bury(name, f"no answer for {silent_s:.1f} s", silent_s)

    def _carry_out(self, decision: Decision) -> None:
        match decision:
            case StartJob(job_id, config, start_step):
                self._jobs.start(job_id, config, start_step)
            case StopJob(job_id, _):
                self._jobs.stop(job_id)
            case ActorLost(placement=Placement() as placement) if not placement.missing:
                self._changes.switch(placement)
            case ActorLost():
                pass


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
