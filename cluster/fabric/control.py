"""The coordinator's Ray edge: gives the pure state machine a clock, a lock and hands.

One loop watches actors and steps the machine. Jobs run in `jobs`, changes of placement in `changes`, actors are in
`crew`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.errors import InvalidInput, MoeClusterError
from actors.values import Growth, Placement
from cluster.backend import (
    Checkpoint,
    ClusterStatus,
    Job,
    JobEvent,
    LoadReport,
    ModelDirectory,
    Operation,
    Pin,
    Rebalance,
)
from cluster.config import ClusterConfig, JobConfig
from cluster.configcheck import validate_job_on
from cluster.control.coordinator import Coordinator
from cluster.control.decisions import ActorLost, Decision, StartJob, StopJob
from cluster.control.journal import Journal
from cluster.control.ledger import Entry
from cluster.control.model import ModelFacts
from cluster.control.past import Past
from cluster.errors import StartupError, Unavailable
from cluster.fabric.attaching import check_same
from cluster.fabric.calls import call
from cluster.fabric.checkpoints import Vault, num_experts_in, sentence, told
from cluster.fabric.comeback import come_back
from cluster.fabric.contacts import ExpertContact
from cluster.fabric.crew import Crew
from cluster.fabric.desk import Desk, Known, Wanted, set_up
from cluster.fabric.guarded import Guarded
from cluster.fabric.journal import name_for, read_journal
from cluster.fabric.loops import each
from cluster.fabric.options import ROUTER, WATCH
from cluster.fabric.recovery import begin_from, load_experts
from cluster.fabric.routers import ready_routers
from cluster.jobs.tokenizer import check_vocabulary, load_tokenizer
from cluster.placement.placement import spread

if TYPE_CHECKING:
    from actors.transport.curve import LinkKeys
    from cluster.checkpoint.store import Found

logger = logging.getLogger(__name__)

BEAT_S = 0.1
LOOP = "the coordinator's loop"
PING_EVERY_S = 2.0
AGAIN_S = 2.0
"""After an attempt to come back that failed."""
FINISH_S = 20.0
"""For the last checkpoint, when all ends in order."""
FIRST_RUN = 1
"""Of a router that starts from a checkpoint; the next job's is one more."""


class ControlWorker:
    """Created once a cluster; `start` brings up the actors, `stop` ends them.

    Ray starts another process in the place of one that died. It finds the actors as they are, which went on meanwhile;
    until it knows all of them its calls raise `Unavailable`.
    """

    def __init__(self, config: ClusterConfig, cluster: str) -> None:
        """`cluster`: a name that no other one on this Ray cluster has."""
        self._config, self._cluster = config, cluster
        self._stopping = threading.Event()
        self._crew = Crew(config, cluster)
        checkpoint = config.checkpoint
        self._journal_name = name_for(cluster, is_passing=not checkpoint.resume and not checkpoint.every_steps)
        self._seat: Desk | None = None
        self._starting = threading.Lock()
        context = ray.get_runtime_context()
        self._me = context.current_actor
        threading.Thread(target=self._ping, name="pings", daemon=True).start()
        if context.was_current_actor_reconstructed:
            threading.Thread(target=self._come_back, name="comeback", daemon=True).start()

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> Any:
        """Starts every actor and returns the router's handle. `StartupError` or `InvalidInput` if that cannot be."""
        with self._starting:
            if self._seat is None:
                self._begin()
        if not self._state.wait_for(lambda c: c.status().ready, self._config.ray.start_timeout_s):
            raise StartupError(f"not ready in time: {self.status().message}")
        return self._crew.router

    def attach(self, config: ClusterConfig) -> Any:
        """For another front: the router's handle, or None while it or an expert actor is not there. `InvalidInput` that
        names the first value in which its config is not that of the cluster; `Unavailable` before the start is over."""
        check_same(self._config, config)
        with self._at.state.reading() as coordinator:
            return self._crew.router if coordinator.status().ready else None

    def _begin(self) -> None:
        experts = self._config.experts
        # Beside the router's, which takes as long.
        processes = self._crew.create_experts(experts.actors, read_model=bool(self._config.model.path))
        model = origin = self._crew.start_router()
        vault = Vault(self._config, origin)
        found = vault.newest() if self._config.checkpoint.resume else None
        past = self._past_of(read_journal(vault.url), origin) if self._config.checkpoint.resume else Past()
        check_vocabulary(load_tokenizer(self._config.model), origin.vocab_size)
        if found is not None and (num_experts := num_experts_in(found)) != origin.num_experts:
            self._crew.num_experts = num_experts
            model = self._crew.facts(num_experts)
        slots = self._crew.await_experts(processes)
        placement = spread(model.num_experts, experts.group_size, slots, experts.redundancy)
        coordinator = Coordinator(model, placement, redundancy=experts.redundancy, max_groups=experts.max_groups)
        wanted = Wanted(experts.actors, self._config.router.actors)
        desk = self._set_up(Known(coordinator, vault, origin, wanted))
        self._load(placement, [slot.id for slot in slots], found)
        if found is not None:
            begin_from(desk.state, found, past)
        else:
            coordinator.recalled(past, None, "", time.time())
        desk.routers.start()
        self._sit_down(desk)

    def _past_of(self, journal: Journal | None, origin: ModelFacts) -> Past:
        if journal is None:
            return Past()
        if journal.origin != origin:
            logger.warning("the journal is of another model, %s: its jobs are not taken over", journal.origin.name)
            return Past()
        return Past(journal.jobs, journal.operations, journal.entries)

    def _load(self, placement: Placement, names: Sequence[str], found: Found | None) -> None:
        """From the model directory, or from a checkpoint."""
        if found is None:
            self._crew.load_experts(placement, names)
        else:
            logger.info("goes on from %s", sentence(found))
            self._crew.load_experts(Placement(0, (), placement.group_size), names)
            load_experts(self._crew, placement, found, FIRST_RUN)
        self._crew.load_router(placement, self._me, found, FIRST_RUN)

    def _set_up(self, known: Known) -> Desk:
        return set_up(self._config, self._cluster, self._crew, self._me, known, self._journal_name)

    def _sit_down(self, desk: Desk) -> None:
        self._seat = desk
        desk.keeper.start()
        threading.Thread(target=self._loop, args=(desk,), name="coordinator", daemon=True).start()

    def _come_back(self) -> None:
        while not self._stopping.is_set():
            try:
                self._find_everybody()
                return
            except MoeClusterError as error:
                logger.error("the coordinator is not back yet: %s", error)
            except Exception:
                logger.exception("the coordinator's return stumbled")
            self._stopping.wait(AGAIN_S)

    def _find_everybody(self) -> None:
        known = come_back(self._config, self._cluster, self._crew, self._journal_name)
        if known is None:
            logger.error("nobody outlived the coordinator; all begins anew")
            self._begin()
            return
        coordinator, desk = known.coordinator, self._set_up(known)
        desk.snapshots.recall(coordinator.status().version)
        importing = coordinator.importing
        may_lack_a_checkpoint = not coordinator.health.is_pristine and coordinator.jobs.waiting() is None
        self._sit_down(desk)
        if importing:
            desk.imports.go_on(importing)
        elif may_lack_a_checkpoint:  # of a change, or of a job's end, right before the death
            desk.checkpoints.after_change()

    @property
    def _at(self) -> Desk:
        if self._seat is None:
            raise Unavailable("the coordinator has just come back and looks around; try again")
        return self._seat

    @property
    def _state(self) -> Guarded:
        return self._at.state

    def ready_routers(self) -> dict[str, Any]:
        """Handles of the routers by name, where they and the experts can answer."""
        with self._state.reading() as coordinator:
            return ready_routers(coordinator, self._crew)

    def stop(self) -> None:
        self._stopping.set()
        if (desk := self._seat) is not None:
            desk.draining.stop()
            desk.jobs.stop_all()
            desk.checkpoints.finish(FINISH_S)
            desk.keeper.close()
        self._crew.end_all()

    def experts(self) -> list[tuple[ExpertContact, Any]]:
        return self._crew.experts()

    def link_keys(self) -> LinkKeys | None:
        with self._state.reading():  # before it knows everybody it would make new ones
            return self._crew.link_keys

    # -- asked by the front -------------------------------------------------------------------------------------------

    def submit(self, config: JobConfig, request_id: str) -> Job:
        validate_job_on(config, self._config.experts, "job")
        with self._state.changing() as coordinator:
            job = coordinator.jobs.submit(config, request_id, time.time())
        self._at.keeper.write_now()  # what was promised must not be forgotten
        return job

    def job(self, job_id: str) -> Job:
        with self._state.reading() as coordinator:
            job = coordinator.jobs.get(job_id)
        self._keep_end_of(job)
        return job

    def jobs(self) -> Sequence[Job]:
        with self._state.reading() as coordinator:
            return coordinator.jobs.newest_first()

    def cancel(self, job_id: str) -> Job:
        with self._state.changing() as coordinator:
            job = coordinator.jobs.cancel(job_id, time.time())
        self._at.keeper.write_now()
        return job

    @ray.method(concurrency_group=WATCH)
    def job_events(self, job_id: str, after: int, max_events: int, wait_s: float) -> tuple[Sequence[JobEvent], Job]:
        def is_there(coordinator: Coordinator) -> bool:
            events, job = coordinator.jobs.events(job_id, after, max_events)
            return bool(events) or job.state.is_final

        self._state.wait_for(is_there, wait_s)
        with self._state.reading() as coordinator:
            events, job = coordinator.jobs.events(job_id, after, max_events)
        self._keep_end_of(job)
        return events, job

    def _keep_end_of(self, told: Job | Operation) -> None:
        """Whoever is told of an end must not find it undone by the death of this process."""
        if told.state.is_final:
            self._at.keeper.write_now()

    def status(self) -> ClusterStatus:
        with self._state.reading() as coordinator:
            status = coordinator.status()
        return replace(status, pins=self._at.pins.all())

    def pin_version(self, name: str, ttl_s: float, timeout_s: float) -> Pin:
        with self._state.reading() as coordinator:
            version = coordinator.status().version
        return self._at.pins.pin(name, ttl_s, version, timeout_s)

    def unpin_version(self, name: str, timeout_s: float) -> None:
        self._at.pins.unpin(name, timeout_s)

    def load_report(self) -> LoadReport:
        with self._state.reading() as coordinator:
            return coordinator.load_report()

    def rebalance(self, dry_run: bool, timeout_s: float) -> Rebalance:
        return self._at.changes.rebalance(dry_run, timeout_s)

    def scale(self, actors: int, request_id: str) -> Operation:
        operation = self._at.scaling.scale(actors, request_id)
        self._at.keeper.write_now()
        return operation

    def drain(self, node: str, deadline_s: float, request_id: str) -> Operation:
        operation = self._at.draining.drain(node, deadline_s, request_id)
        self._at.keeper.write_now()
        return operation

    def grow(self, growth: Growth, request_id: str) -> Operation:
        operation = self._at.growing.grow(growth, request_id)
        self._at.keeper.write_now()
        return operation

    def scale_routers(self, routers: int, request_id: str) -> Operation:
        operation = self._at.routers.scale(routers, request_id)
        self._at.keeper.write_now()
        return operation

    def operation(self, operation_id: str) -> Operation:
        with self._state.reading() as coordinator:
            operation = coordinator.operations.get(operation_id)
        self._keep_end_of(operation)
        return operation

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
        roots = [Path(root).resolve() for root in (self._config.storage.root, *self._config.storage.import_roots)]
        directory = _below(roots, path, "path")
        self._at.imports.replace_weights(directory, timeout_s)
        return self.status()

    def save_checkpoint(self, timeout_s: float) -> Checkpoint:
        """Steps wait for the copying alone. `StorageFull`, or `Unavailable` while another is written for too long."""
        return told(self._at.checkpoints.save(timeout_s))

    def checkpoints(self) -> Sequence[Checkpoint]:
        """Newest first."""
        return [told(found) for found in self._at.checkpoints.vault.all()]

    # -- asked by the router ------------------------------------------------------------------------------------------

    def without(self, gone: Sequence[str], used: Placement) -> tuple[Placement, list[ExpertContact]]:
        return self._at.changes.without(gone, used)

    def _ping(self) -> None:
        """Beside all else: loading takes minutes, in which nobody is asked how it is."""
        while not self._stopping.wait(PING_EVERY_S):
            each("the thread of pings", [self._crew.ping])  # actors that hear nothing for long end themselves

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _loop(self, desk: Desk) -> None:
        looks: list[Callable[[], object]] = [
            partial(self._look, desk),
            partial(self._step, desk),
            desk.draining.look,
            desk.routers.look,
            desk.scaling.heal,
            desk.recovery.heal,
            desk.autoscaler.look,
            desk.rebalancer.look,
            desk.checkpoints.look,
            desk.pins.look,
        ]
        while not self._stopping.wait(BEAT_S):
            each(LOOP, looks)

    def _step(self, desk: Desk) -> None:
        with desk.state.changing() as coordinator:
            decisions = coordinator.step(time.time())
        each(LOOP, [partial(self._carry_out, desk, decision) for decision in decisions])

    def _look(self, desk: Desk) -> None:
        signs = self._crew.look()
        with desk.state.changing() as coordinator:
            for status in signs.seen:
                coordinator.actor_seen(status, time.time())
        deaths = [partial(self._bury, desk, name, reason) for name, reason in signs.dead.items()]
        absences = [partial(self._cut_off, desk, name, silent_s) for name, silent_s in signs.frozen.items()]
        each(LOOP, [*deaths, *absences])

    def _bury(self, desk: Desk, name: str, reason: str) -> None:
        logger.error("lost %s: %s", name, reason)
        desk.changes.bury(name, reason)

    def _cut_off(self, desk: Desk, name: str, silent_s: float) -> None:
        self._crew.cut_off(name)
        desk.changes.bury(name, f"no answer for {silent_s:.1f} s", silent_s)

    def _carry_out(self, desk: Desk, decision: Decision) -> None:
        match decision:
            case StartJob(job_id, config, start_step):
                desk.jobs.start(job_id, config, start_step)
            case StopJob(job_id, _):
                desk.jobs.stop(job_id)
            case ActorLost(placement=Placement()):
                desk.changes.tell_of_a_death()
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
