"""The benchmark's course: a disturbed cluster that trains and then serves, and an undisturbed one to compare with.

Talks to both over gRPC only; faults hit the processes that the status names. One loop looks at the cluster four times a
second, and every wait is made of such looks.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from actors.errors import MoeClusterError
from cluster.backend import ActorStatus, JobState, Operation, OperationState
from cluster.chaos import schedule
from cluster.chaos.cuts import cut_links
from cluster.chaos.record import PHASES, Look, Phase, Record, Span, Strike, Vitals
from cluster.chaos.report import has_grown, least_of
from cluster.chaos.schedule import Fault, Kind
from cluster.chaos.service import ServiceProcess, service_process
from cluster.chaos.strikes import Freezer, kill, raylet_of
from cluster.chaos.updates import updates_made
from cluster.chaos.work import Streams, Watched, expected_tokens
from cluster.config import ClusterConfig, JobConfig, StorageConfig
from cluster.configfile import find_config, load_model
from cluster.errors import FailedPrecondition
from cluster.fabric.workertools import SLOW_UPDATES
from cluster.service.client import Client

logger = logging.getLogger(__name__)

LOOK_S = 0.25
VITALS_S = 1.0
CALM_LOOKS = 5
"""Vitals of a calm cluster are the least of so many looks: an open call has handles too."""
CALM_TIMEOUT_S = 10.0
HEAL_TIMEOUT_S = 90.0
"""A cluster that is not whole after this will not be."""
STATUS_TIMEOUT_S = 5.0
READY_TIMEOUT_S = 30.0
STEADY_S = 3.0
"""The first steps of a job are slower: the reference begins after them."""
SETTLED_S = 2.0
"""After a stall: whoever took the actor for dead has said so by then."""
MANY_STEPS = 10**8
"""The job ends by being cancelled."""
MODEL = "trained"
DISTURBED, UNDISTURBED = "disturbed", "undisturbed"


EXACT_MODEL = "exact"
"""The shipped model without a part that computes in float32 whatever the dtype is."""


@dataclass(frozen=True)
class Settings:
    cluster: ClusterConfig
    job: JobConfig
    """Its number of steps is of no account, and its schedule must not depend on it."""
    output: Path
    minutes: float
    """With faults, in equal parts for the phases."""
    reference_s: float
    mtbf_s: float
    min_gap_s: float
    kinds: Sequence[Kind]
    seed: int
    streams: int
    phases: Sequence[Phase] = PHASES
    """In which faults strike: training while streams go on, and serving only."""
    max_faults: int = 0
    """A phase ends when it has had so many; 0: only with its time."""
    slow_updates_s: float = 0.0
    """Every expert actor waits so long before each update, which makes it lag behind in a job with a staleness."""
    compare: bool = True
    """With the losses and tokens of an undisturbed cluster, which takes as long again."""

    @property
    def environment(self) -> dict[str, str]:
        """Of both clusters."""
        return {SLOW_UPDATES: str(self.slow_updates_s)} if self.slow_updates_s else {}


Say = Callable[[str], None]
Tick = Callable[[str, float], None]
"""(what is being done, share of it that is done)"""


def is_exact(cluster: ClusterConfig) -> bool:
    """Whether losses do not depend, but for the last bits of float64, on who computes which expert."""
    return cluster.router.dtype == "float64" and cluster.model == load_model(find_config(EXACT_MODEL, "models"))


def run_chaos(settings: Settings, say: Say, tick: Tick) -> Record:
    """Ctrl-C (KeyboardInterrupt) ends it early: what has been seen so far is returned."""
    record = Record(
        settings.cluster.experts.actors,
        settings.cluster.router.dtype,
        settings.job.optimizer.staleness,
        is_exact=is_exact(settings.cluster),
    )
    plan = schedule.faults(settings.seed, settings.mtbf_s, settings.min_gap_s, settings.kinds)
    try:
        _disturbed(settings, plan, record, say, tick)
        if settings.compare:
            _undisturbed(settings, record, say, tick)
    except KeyboardInterrupt:
        record.interrupted = True
        say("interrupted: the report covers what there is")
    except MoeClusterError as error:
        record.problems.append(f"the run broke off: {error}")
    return record


def _disturbed(settings: Settings, plan: Iterator[Fault], record: Record, say: Say, tick: Tick) -> None:
    say("starting the cluster that will be disturbed ...")
    cluster = service_process(_fresh(settings, DISTURBED), settings.output, DISTURBED, record, settings.environment)
    with cluster as service, Client(service.target) as client:
        client.wait_ready(READY_TIMEOUT_S)
        _Disturbed(settings, plan, record, service, client, say, tick).run()


def _undisturbed(settings: Settings, record: Record, say: Say, tick: Tick) -> None:
    """The same steps and the same requests where nothing happens."""
    if not record.commits:
        return
    steps = max(commit.step for commit in record.commits)
    say(f"the same {steps} steps on a cluster that is left alone ...")
    cluster = service_process(_fresh(settings, UNDISTURBED), settings.output, UNDISTURBED, record, settings.environment)
    with cluster as service, Client(service.target) as client:
        client.wait_ready(READY_TIMEOUT_S)
        job = client.submit_job(replace(settings.job, steps=steps))
        losses = []
        with closing(client.watch_job(job.id)) as events:
            for event in events:
                if event.kind == "step":
                    losses.append(event.metrics["loss"])
                    tick("undisturbed", event.step / steps)
        ended = client.get_job(job.id)
        if ended.state is not JobState.SUCCEEDED:
            raise FailedPrecondition(f"the undisturbed job {ended.state.value}: {ended.error}")
        record.undisturbed_losses = tuple(losses)
        if "serving" in record.spans:
            client.import_model(str(settings.output / DISTURBED / MODEL))
            record.expected = expected_tokens(client)


def _fresh(settings: Settings, name: str) -> ClusterConfig:
    """With a storage of its own that is empty: a cluster goes on from the checkpoints that it finds."""
    root = settings.output / name
    shutil.rmtree(root, ignore_errors=True)
    storage = StorageConfig(str(root), import_roots=(str(settings.output / DISTURBED),))
    return replace(settings.cluster, storage=storage)


class _Disturbed:
    """One cluster through both phases."""

    def __init__(
        self,
        settings: Settings,
        plan: Iterator[Fault],
        record: Record,
        service: ServiceProcess,
        client: Client,
        say: Say,
        tick: Tick,
    ) -> None:
        self._settings, self._plan, self._record = settings, plan, record
        self._next = next(plan)
        self._service, self._client, self._say, self._tick = service, client, say, tick
        self._freezer = Freezer()
        self._wanted = record.base
        self._gone: set[int] = set()
        """Processes that were hit for good."""
        self._vitals_at_s = 0.0

    def run(self) -> None:
        try:
            with Streams(self._client, self._record, "training", self._settings.streams):
                self._train()
            if self._await_whole(HEAL_TIMEOUT_S):
                raise FailedPrecondition("no end to the training phase: the cluster is not whole")
            self._count_updates()
            if "serving" in self._settings.phases:
                self._client.export_model(MODEL)
                with Streams(self._client, self._record, "serving", self._settings.streams):
                    self._under_faults("serving")
        finally:
            self._freezer.close()
            self._keep_ledger()

    def _train(self) -> None:
        job = Watched(
            self._client, self._client.submit_job(replace(self._settings.job, steps=MANY_STEPS)), self._record
        )
        try:
            self._reference()
            if "training" in self._settings.phases:
                self._under_faults("training")
        finally:
            job.end()

    def _reference(self) -> None:
        self._say("training undisturbed ...")
        deadline = time.monotonic() + HEAL_TIMEOUT_S
        while not self._record.commits and time.monotonic() < deadline:
            self._look()
        self._wait(STEADY_S, "warming up")
        start_s = time.time()
        self._wait(self._settings.reference_s, "reference")
        self._record.reference = Span(start_s, time.time())

    def _under_faults(self, phase: Phase) -> None:
        """The phase's part of the minutes, and then as long as it takes until all is as it was."""
        seconds = 60 * self._settings.minutes / len(self._settings.phases)
        before = self._calm()
        self._say(f"{phase} with faults for {seconds:.0f} s ...")
        start_s = time.time()
        span = self._record.spans[phase] = Span(start_s, start_s + seconds)
        try:
            self._strikes(phase, span)
            if not self._has_had_enough(phase):
                self._wait_until(span.end_s, phase, span)
        finally:
            self._record.spans[phase] = Span(start_s, min(span.end_s, time.time()))
        if self._await_whole(HEAL_TIMEOUT_S):
            return
        if self._wanted != self._record.base:
            self._say(f"back to {self._record.base} expert actors")
            self._scale(self._record.base)
            self._await_whole(HEAL_TIMEOUT_S)
        self._record.calm[phase] = before, self._calm(before)

    # -- faults -------------------------------------------------------------------------------------------------------

    def _strikes(self, phase: Phase, span: Span) -> None:
        due_s = span.start_s + self._settings.min_gap_s  # a short phase shall have a fault too
        while due_s < span.end_s and not self._has_had_enough(phase):
            self._wait_until(due_s, phase, span)
            held_back_s = 0.0
            if self._look(phase, span):
                if self._await_whole(span.end_s - time.time(), phase, span):
                    return
                held_back_s = time.time() - due_s
            fault, self._next = self._next, next(self._plan)
            struck_s = time.time()
            self._strike(fault, phase, struck_s, held_back_s)
            due_s = struck_s + self._next.gap_s

    def _has_had_enough(self, phase: Phase) -> bool:
        count = sum(strike.phase == phase for strike in self._record.strikes)
        return 0 < self._settings.max_faults <= count

    def _strike(self, fault: Fault, phase: Phase, now_s: float, held_back_s: float) -> None:
        """Carries it out and waits until all is as it was."""
        hit = schedule.victims(fault, self._client.status(timeout_s=STATUS_TIMEOUT_S))
        target = self._target(fault) if fault.kind == "scale" else self._wanted
        subject = self._subject(fault, hit, target)
        late = f", held back for {held_back_s:.1f} s" if held_back_s > 0 else ""
        self._say(f"fault {fault.number}: {fault.kind} {subject}{late}")
        strike = Strike(fault.number, phase, fault.kind, subject, now_s, held_back_s)
        self._record.strikes.append(strike)
        problem = self._carry_out(fault.kind, hit, target)
        missing = self._await_whole(HEAL_TIMEOUT_S, fault.kind)
        recovered_s = None if missing else time.time()
        after = f"after {time.time() - now_s:.1f} s {missing or 'whole again'}"
        self._say(f"fault {fault.number}: " + "; ".join(part for part in (after, problem) if part))
        problem = "; ".join(part for part in (problem, missing and after) if part)
        self._record.strikes[-1] = replace(strike, recovered_s=recovered_s, problem=problem)

    def _carry_out(self, kind: Kind, hit: Sequence[ActorStatus], target: int) -> str:
        """-> what went wrong beyond what was meant to."""
        if kind == "scale":
            return self._scale(target)
        if kind == "coordinator":
            return "" if self._service.kill_coordinator() else "there was none to kill"
        if kind == "stall":
            self._freezer.freeze(hit[0], schedule.STALL_S)
            self._wait(schedule.STALL_S + SETTLED_S, "stall")
            return self._taken_for_dead(hit[0].pid, f"it stood still for {schedule.STALL_S:g} s only")
        if kind == "cut":
            return self._cut(hit[0].pid)
        self._gone |= {actor.pid for actor in hit}
        if kind == "freeze":
            self._freezer.freeze(hit[0], schedule.FREEZE_S)
        elif kind == "node":
            raylet = raylet_of(hit[0])
            kill(hit)
            if raylet is not None:
                raylet.kill()
        else:
            kill(hit)
        return ""

    def _subject(self, fault: Fault, hit: Sequence[ActorStatus], target: int) -> str:
        names = ", ".join(actor.id for actor in hit)
        if fault.kind == "scale":
            return f"{self._wanted} to {target} expert actors"
        if fault.kind == "coordinator":
            return fault.kind
        return f"{hit[0].node} with {names}" if fault.kind == "node" else names

    def _target(self, fault: Fault) -> int:
        experts = self._settings.cluster.experts
        least = max(experts.min_actors, experts.redundancy)
        return schedule.scale_target(fault, self._wanted, self._record.base, least, experts.max_actors)

    def _cut(self, pid: int) -> str:
        try:
            if not cut_links(pid):
                return "it had no links to cut"
            self._wait(schedule.CUT_AGAIN_S, "cut")
            cut_links(pid)
        except OSError as error:
            return f"no right to cut links: {error}"
        self._wait(SETTLED_S, "cut")
        return self._taken_for_dead(pid, "its links could be opened again")

    def _taken_for_dead(self, pid: int, though: str) -> str:
        status = self._client.status(timeout_s=STATUS_TIMEOUT_S)
        is_there = any(actor.pid == pid for actor in schedule.ready_experts(status))
        return "" if is_there else f"taken for dead though {though}"

    def _scale(self, target: int) -> str:
        """Waits for it, and before for another change that is under way. -> what went wrong."""
        deadline = time.monotonic() + HEAL_TIMEOUT_S
        try:
            while (operation := self._asked_to_scale(target, deadline)) is None:
                self._look("scale")
            while not operation.state.is_final and time.monotonic() < deadline:
                self._look("scale")
                operation = self._client.operation(operation.id)
        except MoeClusterError as error:
            return f"scaling to {target} failed: {error}"
        if operation.state is OperationState.SUCCEEDED:
            self._wanted = target
            return ""
        return f"scaling to {target} {operation.state.value}: {operation.error or operation.message}"

    def _asked_to_scale(self, target: int, deadline: float) -> Operation | None:
        """None while the cluster is busy with another change."""
        try:
            return self._client.scale(target)
        except FailedPrecondition:
            if time.monotonic() >= deadline:
                raise
            return None

    # -- looking ------------------------------------------------------------------------------------------------------

    def _await_whole(self, timeout_s: float, doing: str = "healing", span: Span | None = None) -> str:
        """-> what is missing still; empty if all is as it should be."""
        deadline = time.monotonic() + timeout_s
        while missing := self._look(doing, span):
            if time.monotonic() >= deadline:
                return missing
        return ""

    def _wait(self, seconds: float, doing: str) -> None:
        now_s = time.time()
        self._wait_until(now_s + seconds, doing, Span(now_s, now_s + seconds))

    def _wait_until(self, time_s: float, doing: str, span: Span) -> None:
        while time.time() < time_s:
            self._look(doing, span)

    def _look(self, doing: str = "", span: Span | None = None) -> str:
        """Takes `LOOK_S`. -> what is missing."""
        started = time.monotonic()
        try:
            status = self._client.status(timeout_s=STATUS_TIMEOUT_S)
        except MoeClusterError as error:
            missing, count = f"no status: {error}", 0
            logger.warning(missing)
        else:
            missing = schedule.what_is_missing(status, self._wanted, self._gone)
            count = sum(actor.pid not in self._freezer.frozen for actor in schedule.ready_experts(status))
            if started >= self._vitals_at_s:
                self._vitals_at_s = started + VITALS_S
                self._record.vitals.append(self._service.vitals(status))
        now_s = time.time()
        self._record.looks.append(Look(now_s, count, missing))
        if span is not None:
            self._tick(doing, min(1.0, (now_s - span.start_s) / max(1e-9, span.end_s - span.start_s)))
        time.sleep(max(0.0, LOOK_S - (time.monotonic() - started)))
        return missing

    def _calm(self, before: Vitals | None = None) -> Vitals:
        """The least of a few looks; of more where it is not down to `before` yet: processes take time to end."""
        status = self._client.status(timeout_s=STATUS_TIMEOUT_S)
        least = self._service.vitals(status, without_channels=True)
        deadline, looks = time.monotonic() + CALM_TIMEOUT_S, 1
        while looks < CALM_LOOKS or (before and has_grown(before, least) and time.monotonic() < deadline):
            self._look("calm")
            least = least_of(least, self._service.vitals(status, without_channels=True))
            looks += 1
        return least

    def _count_updates(self) -> None:
        try:
            self._record.updates_made = updates_made(self._client)
        except MoeClusterError as error:
            self._record.problems.append(f"updates could not be counted: {error}")

    def _keep_ledger(self) -> None:
        try:
            self._record.ledger = self._client.ledger().entries
        except MoeClusterError as error:
            self._record.problems.append(f"no ledger: {error}")
