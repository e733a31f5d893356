"""The coordinator: the only writer of cluster state. A state machine without threads, clock or network.

The edge calls its methods with the time (Unix, seconds) and carries out the decisions that `step` returns. Calls must
come from one thread. Everything it gives out is a frozen value.

Its records: `jobs`, `operations` and the `ledger`; the model, and who is there and holds what. What concerns several of
them is here; `health` says what they amount to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from actors.values import Placement
from cluster.backend import ActorStatus, ClusterStatus, Job, LoadReport
from cluster.control.decisions import ActorLost, Decision
from cluster.control.disturbances import Disturbances
from cluster.control.fleet import Fleet
from cluster.control.growth import check_room
from cluster.control.health import Health
from cluster.control.jobdesk import JobDesk
from cluster.control.jobtable import JobTable
from cluster.control.ledger import Kind, Ledger
from cluster.control.load import LoadLE
from cluster.control.model import ModelFacts, ModelRecord
from cluster.control.operations import OperationTable
from cluster.control.past import BACK, Past, Recalled, Standing, after_death, after_restart
from cluster.control.rebalancing import Proposal, named, propose
from cluster.errors import FailedPrecondition
from cluster.placement.placement import ActorSlot


@dataclass(frozen=True)
class Limits:
    max_queued_jobs: int = 16
    max_final_jobs: int = 1000
    """Ended jobs that are remembered, with their request ids."""
    max_events: int = 10_000
    """Events kept of a job, newest last."""
    heartbeat_timeout_s: float = 10.0
    load_window_steps: int = 50
    """Training steps over which expert load is summed."""


class Coordinator:
    def __init__(
        self,
        model: ModelFacts,
        placement: Placement,
        limits: Limits | None = None,
        *,
        redundancy: int = 1,
        max_groups: int = 0,
    ) -> None:
        """`redundancy` and `max_groups` as in `ExpertsConfig`."""
        self._limits = limits or Limits()
        self._redundancy, self._max_groups = redundancy, max_groups
        self._decisions: list[Decision] = []
        table = JobTable(self._limits.max_queued_jobs, self._limits.max_final_jobs, self._limits.max_events)
        self.jobs = JobDesk(table, model.max_positions, self._decisions.append)
        self.operations = OperationTable()
        self._keep_ledger(Ledger())
        self._model = ModelRecord(model, self._limits.load_window_steps)
        self._fleet = Fleet(placement, self._limits.heartbeat_timeout_s)
        self._members = self._fleet.members
        self.health = Health(self._fleet, redundancy)
        self.is_returning = False
        """Everybody is on the way back to a checkpoint: no job begins before it is known which of its steps it has."""
        self.importing = ""
        """The model directory of the import that is under way; empty if none is."""

    @property
    def model(self) -> ModelFacts:
        return self._model.facts

    @property
    def placement(self) -> Placement:
        return self._fleet.placement

    # --- After a restart -----------------------------------------------------------------------------------------

    @classmethod
    def restored_from(
        cls,
        model: ModelFacts,
        placement: Placement,
        past: Past,
        standing: Standing,
        now: float,
        since_s: float,
        limits: Limits | None = None,
        *,
        redundancy: int = 1,
        max_groups: int = 0,
        importing: str = "",
    ) -> Coordinator:
        """After the death of the one before, at `since_s`, while the actors went on. `placement`: that in use; who of
        it is dead is to be told with `actor_lost`. `importing`: an import was under way, and is to be brought to its
        end.

        A job that ran goes on after the steps that the router says it has done. Where it cannot say so, as it is dead
        too, the job waits for the last checkpoint; without one it has failed.
        """
        self = cls(model, placement, limits, redundancy=redundancy, max_groups=max_groups)
        self._model.version = standing.version
        self.health.is_pristine, self.health.can_restore = standing.is_pristine, standing.can_restore
        self.importing = importing
        self._recall(past, after_death(past.jobs, standing), "the coordinator died meanwhile; ask for it again", now)
        reports = standing.reports
        self._disturbances.recall(reports[-1].time_s if reports else None, [report.seconds for report in reports])
        self._disturbances.lost("coordinator_restart", "coordinator", now, since_s, BACK)
        return self

    def recalled(self, past: Past, saved: Job | None, message: str, now: float) -> None:
        """After a restart of everything, before the first report: what was known before; see `after_restart`."""
        jobs = after_restart(past.jobs, saved, message)
        self._recall(past, jobs, "everything was started anew meanwhile; ask for it again", now)
        self._disturbances.recall(None, ())

    def resumed(self, version: int, job: Job | None, message: str, now: float, past: Past | None = None) -> None:
        """At the start: all is as it was at this version, and the job goes on after its step."""
        self._model.version = version
        self.health.is_pristine = False
        self.recalled(past or Past(), job, message, now)

    def _recall(self, past: Past, jobs: Sequence[Recalled], operations_error: str, now: float) -> None:
        self._keep_ledger(Ledger.of(past.entries))
        self.operations.recall(past.operations, operations_error, now)
        self.jobs.recall(jobs, now)

    def _keep_ledger(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._disturbances = Disturbances(ledger)

    # --- Looked at -----------------------------------------------------------------------------------------------

    @property
    def past(self) -> Past:
        """All that would be forgotten with this coordinator."""
        operations = tuple(reversed(self.operations.all()))
        return Past(self.jobs.oldest_first(), operations, self.ledger.entries())

    def status(self) -> ClusterStatus:
        model, placement, actors = self.model, self.placement, self._members.all()
        holders = dict(enumerate(placement.holders))
        return ClusterStatus(
            model=model.name,
            num_parameters=model.num_parameters,
            num_experts=model.num_experts,
            num_moe_layers=model.num_moe_layers,
            top_k=model.top_k,
            version=self._model.version,
            placement_epoch=placement.epoch,
            owners={group: held[0] for group, held in holders.items() if held},
            group_size=placement.group_size,
            nodes=tuple(sorted({actor.node for actor in actors})),
            actors=actors,
            load_LE=self._model.load_LE,
            jobs=self.jobs.count_by_state(),
            ready=self.health.is_ready,
            message=self.health.message(),
            max_positions=model.max_positions,
            vocab_size=model.vocab_size,
            shared_share=model.shared_share,
            copies={group: held[1:] for group, held in holders.items() if held[1:]},
            staleness_mean=self._model.staleness[0],
            staleness_max=self._model.staleness[1],
        )

    def load_report(self) -> LoadReport:
        """Of the steps in the window; sums over actors and nodes follow the placement of now."""
        return self._model.load_report(self.placement, self._fleet.node_of())

    def actors(self) -> tuple[ActorSlot, ...]:
        """Expert actors that answer, in the order in which they were first seen; they may hold groups."""
        return self._fleet.experts()

    # --- Reported by the running job; the rest of what it says, to `jobs` -----------------------------------------

    def step_committed(
        self, job_id: str, step: int, metrics: Mapping[str, float], now: float, load_LE: LoadLE | None = None
    ) -> None:
        """Step `step` (from 1) is part of every actor's weights. Steps come in order; a repeated report is ignored.

        A loss that is not finite fails the job.
        """
        job = self.jobs.next_step(job_id, step)
        if job is None:
            return
        self._model.step(job.config.batch, metrics, now, load_LE)
        self.health.is_pristine = False
        self._disturbances.stepped(now, int(metrics.get("retries", 0)), int(metrics.get("tokens", 0)))
        self.jobs.committed(job_id, step, metrics, now)

    # --- Reported by the fabric ----------------------------------------------------------------------------------

    def actor_seen(self, status: ActorStatus, now: float) -> None:
        """A heartbeat, with what the actor says of itself. Its groups are those of the placement, not its own."""
        self._members.seen(dataclasses.replace(status, groups=self.placement.held_by(status.id)), now)

    def actor_lost(
        self, actor_id: str, now: float, reason: str, *, silent_s: float = 0.0, pid: int | None = None
    ) -> None:
        """The actor's process is dead for certain, or is made so: it was frozen, silent for so long. `pid`: where it is
        known, since what it said may still be on its way here.

        It leaves the placement at once, and the first copies of its groups own them. The running job goes on, unless
        this was the router, or the last holder of a group, and there is no checkpoint to go back to.
        """
        is_news = not self._members.is_buried(actor_id, pid)
        actor = self._members.bury(actor_id, pid)
        self._lose(actor_id, now, reason, is_dead=True)
        if is_news:
            is_router = actor is not None and actor.role == "router"
            kind: Kind = "frozen" if silent_s else "router_death" if is_router else "actor_death"
            self._disturbances.lost(kind, actor_id, now, now - silent_s, reason)

    def actor_left(self, actor_id: str, pid: int | None = None) -> None:
        """It holds no group any more and is ended on purpose. `FailedPrecondition` if it does hold one. `pid` as of
        `actor_lost`."""
        if groups := self.placement.held_by(actor_id):
            raise FailedPrecondition(f"{actor_id} still holds {named(groups)}")
        self._members.leave(actor_id, pid)

    def placed(self, placement: Placement) -> None:
        """Replaces the placement by a newer one."""
        self._fleet.place(placement)

    def begin_switch(self, after: Placement) -> None:
        """Copies for this placement are on their way; each is told to `came`, and when all are there comes `switch`. A
        death meanwhile leaves each group where it was or, if nobody of those lives, where it has come."""
        self._fleet.begin_switch(after)

    def came(self, group: int, actor: str) -> None:
        """The group is there, whole, and follows every update."""
        self._fleet.came(group, actor)

    def switch(self) -> None:
        """As `placed`, of what was begun; the router has not been told of it yet. `FailedPrecondition` if somebody has
        died since."""
        self._fleet.switch()

    def in_use(self, used: Placement) -> None:
        """What the router that leads says: with a placement of the change under way, that has come to its end."""
        self._fleet.in_use(used)

    def held(self, groups: Mapping[str, Collection[int]]) -> None:
        """What actors say that they hold, where no router lives to say what is in use."""
        self._fleet.held(groups)

    def take_back(self) -> None:
        """A change that is under way, if one is, comes to nothing: the placement before it, as a newer one."""
        self._fleet.take_back()

    @property
    def is_unsettled(self) -> bool:
        """A change of placement is under way, and the router may or may not use what has come of it."""
        return self._fleet.is_unsettled

    def grown(self, placement: Placement, num_parameters: int, now: float) -> bool:
        """The router and all holders have more experts, as this placement says, or no longer have them. -> whether the
        placement kept here is another, as actors died meanwhile, and the router has not heard of it."""
        gone = set(placement.actors) - set(self.placement.actors)
        if is_other := bool(gone) or placement.epoch <= self.placement.epoch:
            epoch = max(placement.epoch, self.placement.epoch) + 1
            placement = dataclasses.replace(placement.without(gone), epoch=epoch)
        self._model.resize(placement.num_experts, num_parameters)
        self.health.is_pristine = False
        self.placed(placement)
        if job := self.jobs.active():
            self.jobs.note(job.id, f"the model has {placement.num_experts} experts a layer now", now)
        return is_other

    def restored(
        self,
        placement: Placement,
        version: int,
        steps: Mapping[str, int],
        message: str,
        now: float,
        num_parameters: int | None = None,
    ) -> None:
        """What was lost is back, and everybody is at this version. `steps`: job -> step it goes on after. A job that
        waits to go on after other steps has failed; one of which no step is known begins anew. `num_parameters`: of the
        model, if it has another number of experts again."""
        self._disturbances.restored(self._model.version - version, message)
        if num_parameters is not None:
            self._model.resize(placement.num_experts, num_parameters)
        self.placed(placement)
        if self.health.mixed:
            self.end_import()
        self._model.version = version
        self._model.forget_load()
        self.jobs.go_back(steps, message, now)

    def begin_import(self, directory: str) -> None:
        """Until `end_import` some weights may be of this directory and the others those of before, and no job begins.
        `FailedPrecondition` while one is there, another import, or a return to a checkpoint."""
        self.jobs.require_idle("a model cannot be imported")
        if self.importing and not self.health.mixed:
            raise FailedPrecondition(f"{self.importing} is being imported; wait for its end")
        if self.is_returning:
            raise FailedPrecondition("a checkpoint is being restored; wait for its end")
        self.importing, self.health.mixed = directory, ""
        self.health.is_pristine = False
        self._model.forget_load()

    def cut_off_import(self, reason: str) -> None:
        """The weights are of two models, for this reason, until a checkpoint is restored or another import begins."""
        self.health.mixed = reason

    def end_import(self) -> None:
        self.importing = self.health.mixed = ""

    # --- Changes that are asked for ------------------------------------------------------------------------------

    def rebalance(self, actors: Sequence[ActorSlot]) -> Proposal:
        """How the groups should lie on these actors, by the load of the window, and the way there; see `propose`.

        `FailedPrecondition` too while an actor that holds groups does not answer.
        """
        self._fleet.require_answers()
        # Moments travel with the weights: first and second.
        group_bytes = 3 * self.model.expert_bytes * self.placement.group_size
        return propose(
            self.placement,
            self._model.load_LE,
            actors,
            group_bytes,
            redundancy=self._redundancy,
            max_groups=self._max_groups,
        )

    def check_growth(self, num_experts: int) -> None:
        """Before the router is asked. `FailedPrecondition` while the placement is not whole, `InvalidInput` if the
        actors may not hold so many groups."""
        if missing := self.placement.missing:
            raise FailedPrecondition(f"no actor holds {named(missing)} any more")
        if self.importing:
            raise FailedPrecondition(f"{self.importing} is being imported; wait for its end")
        self._fleet.require_answers()
        check_room(self.placement, num_experts, self._max_groups)
        self._model.expect(num_experts)

    # --- Time ----------------------------------------------------------------------------------------------------

    def step(self, now: float) -> list[Decision]:
        """What to do now, in order. Each decision is given out once."""
        for actor_id in self._members.silent(now):
            self._lose(actor_id, now, f"silent for more than {self._limits.heartbeat_timeout_s:g} s", is_dead=False)
        if self.jobs.active() is None and self.jobs.waiting() is None:
            self._disturbances.idle()
        if self.health.is_whole:
            self._disturbances.whole(now)
            self._members.forget_dead("expert")
        if (self.placement.missing or self.health.is_router_lost) and not self.health.can_return:
            self.jobs.give_up_waiting(self.health.message(), now)
        self.jobs.forget_old()
        if self.health.is_ready and not self.is_returning and not self.importing:
            self.jobs.start_next(now)
        decisions = list(self._decisions)
        self._decisions.clear()
        return decisions

    def _lose(self, actor_id: str, now: float, reason: str, *, is_dead: bool) -> None:
        groups = self.placement.held_by(actor_id)
        actor = self._members.lose(actor_id)
        must_switch = is_dead and self._fleet.lose(actor_id)
        if actor is None and not must_switch:
            return
        role, job = actor.role if actor else "expert", self.jobs.active()
        placement = self.placement if must_switch else None
        self._decisions.append(ActorLost(actor_id, role, groups, job.id if job else None, reason, placement))
        if job:
            self._tell_job(job, role, actor_id, groups if must_switch else (), reason, now)

    def _tell_job(self, job: Job, role: str, actor_id: str, groups: Sequence[int], reason: str, now: float) -> None:
        """`groups`: those that the actor, now dead, held. The job fails if it cannot go on."""
        who = f"{role} {actor_id}"
        self.jobs.note(job.id, f"{who} lost: {reason}{self.health.after_loss(role, groups)}", now)
        if self.health.can_restore:
            return
        ended = f"{who} was lost after step {job.step}: {reason}"
        if gone := self.health.missing_of(groups):
            self.jobs.fail(job.id, f"{ended}; no actor holds {named(gone)} any more", now)
        elif role == "router" and not self._members.has_ready("router"):
            self.jobs.fail(job.id, ended, now)
