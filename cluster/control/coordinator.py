"""The coordinator: the only writer of cluster state. A state machine without threads, clock or network.

The edge calls its methods with the time (Unix, seconds) and carries out the decisions that `step` returns. Calls must
come from one thread. Everything it gives out is a frozen value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.backend import ActorStatus, ClusterStatus, Job, JobEvent, JobState, LoadReport
from cluster.config import JobConfig
from cluster.configcheck import validate_job
from cluster.control.decisions import ActorLost, Decision, StartJob, StopJob
from cluster.control.disturbances import Disturbances
from cluster.control.growth import check_room
from cluster.control.jobtable import JobRecord, JobTable
from cluster.control.ledger import Kind, Ledger
from cluster.control.load import LoadLE, LoadWindow
from cluster.control.members import Members
from cluster.control.operations import OperationTable
from cluster.control.past import BACK, Past, Standing, after_death, after_restart
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


@dataclass(frozen=True)
class ModelFacts:
    """What status tells of the model, and what a job must fit into."""

    name: str
    num_parameters: int
    num_experts: int
    num_moe_layers: int
    top_k: int
    max_positions: int
    """Longest sequence, tokens."""
    vocab_size: int
    shared_share: float = 0.0
    """Parameters of shared experts, which every token visits, over all (S7: below 0.15)."""
    expert_bytes: int = 0
    """Weights of one expert in all MoE layers."""
    architecture: str = ""
    """Class of the model, e.g. `DeepseekV3ForCausalLM`."""


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
        self._model = model
        self._placement = placement
        self._redundancy, self._max_groups = redundancy, max_groups
        self._jobs = JobTable(self._limits.max_queued_jobs, self._limits.max_final_jobs, self._limits.max_events)
        self.operations = OperationTable()
        self.ledger = Ledger()
        self._disturbances = Disturbances(self.ledger)
        self._members = Members(self._limits.heartbeat_timeout_s)
        self._loads = self._new_window()
        self._other_counts: set[int] = set()
        """Numbers of experts that the model had, or may have before its growth is told here."""
        self._version = 0
        self._staleness = 0.0, 0
        """Mean and most, of the last step."""
        self.routers_wanted = 1
        """With fewer the cluster is not whole."""
        self.can_restore = False
        """Whether there is a checkpoint that what is lost can come back from."""
        self.is_pristine = True
        """The weights are still those of the model directory: no step and no import since."""
        self.is_returning = False
        """Everybody is on the way back to a checkpoint: no job begins before it is known which of its steps it has."""
        self.notice = ""
        """What status is to say beside what is known here."""
        self._stopping: str | None = None
        """A job that failed here while its steps may still be running."""
        self._decisions: list[Decision] = []

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
    ) -> Coordinator:
        """After the death of the one before, at `since_s`, while the actors went on. `placement`: that in use; who of
        it is dead is to be told with `actor_lost`.

        A job that ran goes on after the steps that the router says it has done. Where it cannot say so, as it is dead
        too, the job waits for the last checkpoint; without one it has failed.
        """
        self = cls(model, placement, limits, redundancy=redundancy, max_groups=max_groups)
        self._version, self.is_pristine, self.can_restore = standing.version, standing.is_pristine, standing.can_restore
        self.ledger = Ledger.of(past.entries)
        self._disturbances = Disturbances(self.ledger)
        reports = standing.reports
        self._disturbances.recall(reports[-1].time_s if reports else None, [report.seconds for report in reports])
        self._disturbances.lost("coordinator_restart", "coordinator", now, since_s, BACK)
        self.operations.recall(past.operations, "the coordinator died meanwhile; ask for it again", now)
        for recalled in after_death(past.jobs, standing):
            self._jobs.recall(recalled, now)
        return self

    def recalled(self, past: Past, saved: Job | None, message: str, now: float) -> None:
        """After a restart of everything, before the first report: what was known before; see `after_restart`."""
        self.ledger = Ledger.of(past.entries)
        self._disturbances = Disturbances(self.ledger)
        self._disturbances.recall(None, ())
        self.operations.recall(past.operations, "everything was started anew meanwhile; ask for it again", now)
        for recalled in after_restart(past.jobs, saved, message):
            self._jobs.recall(recalled, now)

    # --- Asked by clients ----------------------------------------------------------------------------------------

    def submit(self, config: JobConfig, request_id: str, now: float) -> Job:
        """Idempotent by request id.

        `ConfigError` if the job cannot work with this model, `AlreadyExists` if the id came with another config,
        `ResourceExhausted` if the queue is full.
        """
        validate_job(config, "job", max_positions=self._model.max_positions)
        return self._jobs.submit(config, request_id, now)

    def cancel(self, job_id: str, now: float) -> Job:
        """A queued job ends at once; a running one is told to stop and ends with `job_stopped`.

        `FailedPrecondition` if the job is final; cancelling twice is the same as once.
        """
        record = self._jobs[job_id]
        if record.job.state is JobState.QUEUED:
            record.move(JobState.CANCELLED, now, "cancelled before it started")
        elif record.job.state is not JobState.CANCELLING:
            record.move(JobState.CANCELLING, now)
            self._decisions.append(StopJob(job_id, "cancelled"))
        return record.job

    def job(self, job_id: str) -> Job:
        return self._jobs[job_id].job

    def jobs(self) -> Sequence[Job]:
        """Newest first."""
        return self._jobs.newest_first()

    def job_events(self, job_id: str, after: int, max_events: int) -> tuple[tuple[JobEvent, ...], Job]:
        """Events with a number above `after`, oldest first, of those that are kept; and the job."""
        record = self._jobs[job_id]
        return record.events_after(after, max_events), record.job

    @property
    def past(self) -> Past:
        """All that would be forgotten with this coordinator."""
        operations = tuple(reversed(self.operations.all()))
        return Past(self._jobs.oldest_first(), operations, self.ledger.entries())

    @property
    def model(self) -> ModelFacts:
        return self._model

    def status(self) -> ClusterStatus:
        holders = dict(enumerate(self._placement.holders))
        return ClusterStatus(
            model=self._model.name,
            num_parameters=self._model.num_parameters,
            num_experts=self._model.num_experts,
            num_moe_layers=self._model.num_moe_layers,
            top_k=self._model.top_k,
            version=self._version,
            placement_epoch=self._placement.epoch,
            owners={group: held[0] for group, held in holders.items() if held},
            group_size=self._placement.group_size,
            nodes=tuple(sorted({actor.node for actor in self._members.all()})),
            actors=self._members.all(),
            load_LE=self._loads.load_LE,
            jobs=self._jobs.count_by_state(),
            ready=self._is_ready(),
            message=self._message(),
            max_positions=self._model.max_positions,
            vocab_size=self._model.vocab_size,
            shared_share=self._model.shared_share,
            copies={group: held[1:] for group, held in holders.items() if held[1:]},
            staleness_mean=self._staleness[0],
            staleness_max=self._staleness[1],
        )

    def load_report(self) -> LoadReport:
        """Of the steps in the window; sums over actors and nodes follow the placement of now."""
        node_of = {actor.id: actor.node for actor in self._members.all()}
        return self._loads.report(self._version, self._placement, node_of)

    # --- Reported by the running job -----------------------------------------------------------------------------
    # A report about a job that has ended meanwhile is late, not wrong: it is ignored.

    def step_committed(
        self, job_id: str, step: int, metrics: Mapping[str, float], now: float, load_LE: LoadLE | None = None
    ) -> None:
        """Step `step` (from 1) is part of every actor's weights. Steps come in order; a repeated report is ignored.

        A loss that is not finite fails the job.
        """
        record = self._active(job_id)
        if record is None or step <= record.job.step:
            return
        if step != record.job.step + 1:
            raise InvalidInput(f"step {record.job.step + 1} of {job_id} was never committed", field="step", value=step)
        if load_LE is not None and not self._passed_a_growth(load_LE):
            batch = record.job.config.batch
            tokens = batch.sequences * batch.sequence_length * batch.gradient_accumulation
            self._loads.add(load_LE, self._version + 1, now, tokens, batch.gradient_accumulation)
        self._version += 1
        self._staleness = float(metrics.get("staleness_mean", 0)), int(metrics.get("staleness_max", 0))
        self.is_pristine = False
        self._disturbances.stepped(now, int(metrics.get("retries", 0)), int(metrics.get("tokens", 0)))
        loss = metrics.get("loss", 0.0)
        if math.isfinite(loss):
            record.commit(step, metrics, now)
        else:
            self._fail(record, f"loss of step {step} is {loss}", now)

    def evaluated(self, job_id: str, metrics: Mapping[str, float], now: float) -> None:
        if record := self._active(job_id):
            record.record("eval", now, metrics)

    def note(self, job_id: str, message: str, now: float) -> None:
        """Something a reader of the job's events should know, e.g. a step that was aborted and run again."""
        if record := self._active(job_id):
            record.record("note", now, message=message)

    def job_finished(self, job_id: str, now: float) -> None:
        """Every step is committed."""
        if record := self._ended(job_id):
            if record.job.step < record.job.config.steps:
                raise FailedPrecondition(f"{job_id} committed {record.job.step} of {record.job.config.steps} steps")
            record.move(JobState.SUCCEEDED, now)

    def job_stopped(self, job_id: str, now: float) -> None:
        """The answer to `StopJob`: the step at hand is done or aborted, and no other will begin."""
        record = self._ended(job_id)
        if record is None:
            return
        if record.job.state is JobState.CANCELLING:
            record.move(JobState.CANCELLED, now, f"cancelled after step {record.job.step}")
        else:
            record.move(JobState.FAILED, now, f"stopped after step {record.job.step} without being asked")

    def job_failed(self, job_id: str, error: str, now: float) -> None:
        """The job ended by itself; there is nothing left to stop."""
        if record := self._ended(job_id):
            record.move(JobState.FAILED, now, error)

    # --- Reported by the fabric ----------------------------------------------------------------------------------

    def actor_seen(self, status: ActorStatus, now: float) -> None:
        """A heartbeat, with what the actor says of itself. Its groups are those of the placement, not its own."""
        self._members.seen(dataclasses.replace(status, groups=self._placement.held_by(status.id)), now)

    def actor_lost(self, actor_id: str, now: float, reason: str, *, silent_s: float = 0.0) -> None:
        """The actor's process is dead for certain, or is made so: it was frozen, silent for so long.

        It leaves the placement at once, and the first copies of its groups own them. The running job goes on, unless
        this was the router, or the last holder of a group, and there is no checkpoint to go back to.
        """
        is_news = not self._members.is_buried(actor_id)
        actor = self._members.bury(actor_id)
        self._lose(actor_id, now, reason, is_dead=True)
        if is_news:
            is_router = actor is not None and actor.role == "router"
            kind: Kind = "frozen" if silent_s else "router_death" if is_router else "actor_death"
            self._disturbances.lost(kind, actor_id, now, now - silent_s, reason)

    def actor_left(self, actor_id: str) -> None:
        """It holds no group any more and is ended on purpose. `FailedPrecondition` if it does hold one."""
        if groups := self._placement.held_by(actor_id):
            raise FailedPrecondition(f"{actor_id} still holds {named(groups)}")
        self._members.leave(actor_id)

    @property
    def placement(self) -> Placement:
        return self._placement

    @property
    def is_router_lost(self) -> bool:
        return self._members.has_died("router")

    @property
    def can_return(self) -> bool:
        """Something is lost that no living actor has, expert groups or the trunk, and it can be loaded again."""
        if self._placement.missing:
            return self.can_restore
        return self.is_router_lost and (self.can_restore or self.is_pristine)

    def waiting_job(self) -> Job | None:
        """One that goes on after the steps it has done, as soon as the cluster is ready."""
        record = self._jobs.resuming()
        return record.job if record else None

    @property
    def is_training(self) -> bool:
        return self._jobs.active() is not None

    def actors(self) -> tuple[ActorSlot, ...]:
        """Expert actors that answer, in the order in which they were first seen; they may hold groups."""
        ready = (actor for actor in self._members.all() if self._members.is_ready(actor.id))
        return tuple(ActorSlot(actor.id, actor.node, actor.zone) for actor in ready if actor.role == "expert")

    def rebalance(self, actors: Sequence[ActorSlot]) -> Proposal:
        """How the groups should lie on these actors, by the load of the window, and the way there; see `propose`.

        `FailedPrecondition` too while an actor that holds groups does not answer.
        """
        silent = [actor for actor in self._placement.actors if not self._members.is_ready(actor)]
        if silent:
            raise FailedPrecondition(f"expert groups are on {', '.join(silent)}, which does not answer; try again")
        # Moments travel with the weights: first and second.
        group_bytes = 3 * self._model.expert_bytes * self._placement.group_size
        return propose(
            self._placement,
            self._loads.load_LE,
            actors,
            group_bytes,
            redundancy=self._redundancy,
            max_groups=self._max_groups,
        )

    def placed(self, placement: Placement) -> None:
        """Replaces the placement by a newer one."""
        if placement.epoch <= self._placement.epoch:
            raise InvalidInput("is not newer", field="placement.epoch", value=placement.epoch)
        self._placement = placement
        for actor in self._members.all():
            self._members.regroup(actor.id, placement.held_by(actor.id))

    def active_job(self) -> Job | None:
        """The one that is running or being cancelled."""
        record = self._jobs.active()
        return record.job if record else None

    def resumed(self, version: int, job: Job | None, message: str, now: float, past: Past | None = None) -> None:
        """At the start: all is as it was at this version, and the job goes on after its step."""
        self._version = version
        self.is_pristine = False
        self.recalled(past or Past(), job, message, now)

    def check_growth(self, num_experts: int) -> None:
        """Before the router is asked. `FailedPrecondition` while the placement is not whole, `InvalidInput` if the
        actors may not hold so many groups."""
        if missing := self._placement.missing:
            raise FailedPrecondition(f"no actor holds {named(missing)} any more")
        if silent := [actor for actor in self._placement.actors if not self._members.is_ready(actor)]:
            raise FailedPrecondition(f"expert groups are on {', '.join(silent)}, which does not answer; try again")
        check_room(self._placement, num_experts, self._max_groups)
        self._other_counts.add(num_experts)

    def grown(self, placement: Placement, num_parameters: int, now: float) -> bool:
        """The router and all holders have more experts, as this placement says. -> whether actors died meanwhile: the
        placement kept here is then another, and the router has not heard of it."""
        gone = set(placement.actors) - set(self._placement.actors)
        if gone:
            epoch = max(placement.epoch, self._placement.epoch) + 1
            placement = dataclasses.replace(placement.without(gone), epoch=epoch)
        self._resize(placement.num_experts, num_parameters)
        self.is_pristine = False
        self.placed(placement)
        if record := self._jobs.active():
            record.record("note", now, message=f"the model has {placement.num_experts} experts a layer now")
        return bool(gone)

    def _passed_a_growth(self, load_LE: LoadLE) -> bool:
        """Whether a step's report and the news of a growth have overtaken each other: its load fits no window."""
        others = self._other_counts - {self._model.num_experts}
        return bool(load_LE) and len(load_LE[0]) in others

    def _resize(self, num_experts: int, num_parameters: int) -> None:
        self._other_counts.add(self._model.num_experts)
        share = self._model.shared_share * self._model.num_parameters / num_parameters
        self._model = dataclasses.replace(
            self._model, num_experts=num_experts, num_parameters=num_parameters, shared_share=share
        )
        self._loads = self._new_window()

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
        self._disturbances.restored(self._version - version, message)
        if num_parameters is not None:
            self._resize(placement.num_experts, num_parameters)
        self.placed(placement)
        self._version = version
        self._loads = self._new_window()
        resuming = self._jobs.resuming()
        for job_id, step in steps.items():
            if resuming and resuming.job.id == job_id:
                resuming.go_back(step, message, now)
            elif record := self._active(job_id):
                record.go_back(step, message, now)
        if resuming and resuming.job.step and resuming.job.id not in steps:
            error = f"{message}; the checkpoint is not of this job, whose steps are lost"
            resuming.move(JobState.FAILED, now, error)

    def imported(self) -> None:
        """The weights are those of another directory now."""
        self.is_pristine = False
        self._loads = self._new_window()

    def require_idle(self, what: str) -> None:
        """`FailedPrecondition` while a job runs or comes to its stop."""
        if record := self._jobs.active():
            raise FailedPrecondition(f"{what} while {record.job.id} is {record.job.state.value}; cancel it or wait")
        if self._stopping:
            raise FailedPrecondition(f"{what} while {self._stopping} comes to its stop; try again")

    # --- Time ----------------------------------------------------------------------------------------------------

    def step(self, now: float) -> list[Decision]:
        """What to do now, in order. Each decision is given out once."""
        for actor_id in self._members.silent(now):
            self._lose(actor_id, now, f"silent for more than {self._limits.heartbeat_timeout_s:g} s", is_dead=False)
        if self._jobs.active() is None and self._jobs.resuming() is None:
            self._disturbances.idle()
        has_routers = self._members.count_ready("router") >= self.routers_wanted
        if self._is_ready() and has_routers and not self._groups_below(self._redundancy):
            self._disturbances.whole(now)
            self._members.forget_dead("expert")
        self._give_up_waiting(now)
        self._jobs.forget_old(keep=self._stopping)
        self._start_next(now)
        decisions, self._decisions = self._decisions, []
        return decisions

    def _lose(self, actor_id: str, now: float, reason: str, *, is_dead: bool) -> None:
        groups = self._placement.held_by(actor_id)
        must_switch = is_dead and bool(groups)
        actor = self._members.lose(actor_id)
        if actor is None and not must_switch:
            return
        if must_switch:
            self.placed(self._placement.without({actor_id}))
        role = actor.role if actor else "expert"
        record = self._jobs.active()
        job_id = record.job.id if record else None
        placement = self._placement if must_switch else None
        self._decisions.append(ActorLost(actor_id, role, groups, job_id, reason, placement))
        if record:
            self._tell_job(record, f"{role} {actor_id}", groups if must_switch else (), reason, now)
            if role == "router" and not self.can_restore and not self._members.has_ready("router"):
                self._fail(record, f"router {actor_id} was lost after step {record.job.step}: {reason}", now)

    def _tell_job(self, record: JobRecord, who: str, groups: Sequence[int], reason: str, now: float) -> None:
        """`groups`: those that the actor, now dead, held."""
        gone = [group for group in groups if group in self._placement.missing]
        fate = f"; copies took over {named(groups)}" if groups and not gone else ""
        if gone and self.can_restore:
            fate = f"; no actor holds {named(gone)} any more, the last checkpoint brings them back"
        elif who.startswith("router") and self._members.has_ready("router"):
            fate = "; the other routers go on"
        elif not groups and who.startswith("router") and self.can_restore:
            fate = "; the last checkpoint brings it back"
        record.record("note", now, message=f"{who} lost: {reason}{fate}")
        if gone and not self.can_restore:
            error = f"{who} was lost after step {record.job.step}: {reason}; no actor holds {named(gone)} any more"
            self._fail(record, error, now)

    def _give_up_waiting(self, now: float) -> None:
        """A job that was to go on, and that nothing can bring back what it needs for."""
        record = self._jobs.resuming()
        if record and (self._placement.missing or self.is_router_lost) and not self.can_return:
            record.move(JobState.FAILED, now, self._message())

    def _start_next(self, now: float) -> None:
        record = self._jobs.next_queued()
        if record is None or self._jobs.active() or self._stopping or self.is_returning or not self._is_ready():
            return
        record.move(JobState.RUNNING, now)
        self._decisions.append(StartJob(record.job.id, record.job.config, record.job.step))

    def _fail(self, record: JobRecord, error: str, now: float) -> None:
        record.move(JobState.FAILED, now, error)
        self._decisions.append(StopJob(record.job.id, error))
        self._stopping = record.job.id

    def _ended(self, job_id: str) -> JobRecord | None:
        """As `_active`, for a report that the job's steps have come to an end."""
        record = self._active(job_id)
        if job_id == self._stopping:
            self._stopping = None
        return record

    def _active(self, job_id: str) -> JobRecord | None:
        record = self._jobs[job_id]
        if record.job.state is JobState.QUEUED:
            raise FailedPrecondition(f"{job_id} was never started")
        return None if record.job.state.is_final else record

    # --- Views ---------------------------------------------------------------------------------------------------

    def _is_ready(self) -> bool:
        return self._members.has_ready("router") and not self._groups_below(1)

    def _groups_below(self, num_holders: int) -> list[int]:
        """Groups with fewer ready holders than that."""
        ready_G = [sum(map(self._members.is_ready, held)) for held in self._placement.holders]
        return [group for group, num_ready in enumerate(ready_G) if num_ready < num_holders]

    def _message(self) -> str:
        missing = self._placement.missing
        if missing and self.can_restore:
            return f"restoring {named(missing)} from the last checkpoint" + (f": {self.notice}" if self.notice else "")
        if missing:
            return f"no actor holds {named(missing)} any more"
        if silent := self._groups_below(1):
            return f"expert groups without a ready holder: {', '.join(map(str, silent))}"
        if not self._members.has_ready("router"):
            return self._message_without_router()
        return "; ".join(part for part in (self._degraded(), self.notice) if part)

    def _degraded(self) -> str:
        lacks = []
        if scarce := self._groups_below(self._redundancy):
            have = "has" if len(scarce) == 1 else "have"
            lacks.append(f"{named(scarce)} {have} fewer than {self._redundancy} holders")
        if (count := self._members.count_ready("router")) < self.routers_wanted:
            lacks.append(f"{count} of {self.routers_wanted} routers are ready")
        return f"degraded: {', '.join(lacks)}" if lacks else ""

    def _message_without_router(self) -> str:
        if not self.is_router_lost:
            return "no router is ready"
        if self.can_return:
            return "the router died; bringing it back" + (f": {self.notice}" if self.notice else "")
        return "the router died with weights that are in no checkpoint; set checkpoint.every_steps, and start again"

    def _new_window(self) -> LoadWindow:
        return LoadWindow(self._limits.load_window_steps, self._model.num_moe_layers, self._model.num_experts)
