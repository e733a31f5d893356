"""A coordinator that died is back in another process: whom it finds alive, and what they say.

What the actors say counts; the journal adds what they cannot know. Everything here may block while Ray's head is away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from actors.errors import MoeClusterError
from actors.values import Placement
from cluster.backend import ActorStatus
from cluster.control.coordinator import Coordinator, ModelFacts
from cluster.control.journal import Journal
from cluster.control.past import Standing, StepTold
from cluster.fabric.calls import call
from cluster.fabric.crew import Survivors, end_process, number_of
from cluster.fabric.options import COORDINATOR, NAMESPACE, ROUTER
from cluster.fabric.workers import ExpertStanding, RouterStanding
from cluster.jobs.runner import metrics_of
from cluster.jobs.schedule import lr_at

logger = logging.getLogger(__name__)

ANSWER_S = 10.0
"""An actor that has not answered for so long is frozen. The router may take longer, for the step at hand, but not to a
ping."""


def find_survivors(cluster: str, journal: Journal | None) -> Survivors:
    """Who is loaded and answers. The others are ended: those that were being started, and those that are frozen."""
    handles = _handles(cluster)
    routers = {name: handle for name, handle in handles.items() if _role(name) == ROUTER}
    router: tuple[Any, RouterStanding] | None = None
    for handle in routers.values():
        standing = _router_standing(handle, handles.values()) if router is None else None
        if standing is None:
            _end(handle, ROUTER, journal)
        else:
            router = handle, standing
    # Only now, since a step that came to its end meanwhile has changed what they have to say.
    experts = {name: handle for name, handle in handles.items() if name not in routers}
    asked = {name: handle.standing.remote() for name, handle in experts.items()}
    deadline = time.monotonic() + ANSWER_S
    found: dict[str, tuple[Any, ExpertStanding]] = {}
    for name in sorted(asked, key=number_of):
        expert: ExpertStanding | None = _answer(name, asked[name], deadline - time.monotonic())
        if expert is None:
            _end(experts[name], name, journal)
        else:
            found[name] = experts[name], expert
    return Survivors(router, found)


def _role(name: str) -> str:
    return name.partition("/")[0]


def _handles(cluster: str) -> dict[str, Any]:
    """By the part of their names that is their own."""
    found: dict[str, Any] = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        prefix, _, name = actor["name"].partition("/")
        if actor["namespace"] == NAMESPACE and prefix == cluster and name != COORDINATOR:
            try:
                found[name] = ray.get_actor(actor["name"], NAMESPACE)
            except ValueError:
                logger.info("%s has just ended", name)
    return found


def _router_standing(router: Any, everybody: Iterable[Any]) -> RouterStanding | None:
    """When the step at hand is over; meanwhile all are told that there is a coordinator. None: it is of no use."""
    ref = router.standing.remote()
    try:
        while not ray.wait([ref], timeout=1.0)[0]:
            for handle in everybody:
                handle.ping.remote()
            call(ROUTER, router.ping.remote(), ANSWER_S)
    except MoeClusterError as error:
        logger.warning("%s does not answer, and is ended: %s", ROUTER, error)
        return None
    standing: RouterStanding | None = _answer(ROUTER, ref, ANSWER_S)
    return standing


def _answer(name: str, ref: Any, timeout_s: float) -> Any:
    """None if it is of no use."""
    try:
        if (answer := call(name, ref, max(1.0, timeout_s))) is None:
            logger.warning("%s was being started, and is ended", name)
        return answer
    except MoeClusterError as error:
        logger.warning("%s does not answer, and is ended: %s", name, error)
        return None


def _end(handle: Any, role: str, journal: Journal | None) -> None:
    ray.kill(handle)
    for process in journal.actors if journal else ():
        if process.name == role:
            end_process(process.node_id, process.pid)


def end_all(cluster: str) -> None:
    """Every actor of a cluster whose coordinator cannot do it any more."""
    for handle in _handles(cluster).values():
        ray.kill(handle)


@dataclass(frozen=True)
class Findings:
    """What there is to go on with."""

    placement: Placement
    """With those of it that are lost."""
    standing: Standing
    lost: Mapping[str, str]
    """Actors of the placement that are dead, or of no use, and why."""
    since_s: float
    """Unix time at which the coordinator was last heard of."""


def weigh(found: Survivors, journal: Journal | None, model: ModelFacts, group_size: int, *, saved: bool) -> Findings:
    """`journal`: of this cluster, if it could be read. `saved`: whether there is a checkpoint."""
    placement = _placement(found, journal, model.num_experts // group_size, group_size)
    run, version = _position(found)
    lost = {}
    for name in placement.actors:
        if name not in found.experts:
            lost[name] = "died while the coordinator was away"
        elif flaw := _flaw(found.experts[name][1], placement, run, version):
            lost[name] = flaw
    heard_s = [expert.heard_s for _, expert in found.experts.values()]
    if found.router:
        heard_s.append(found.router[1].heard_s)
    standing = Standing(
        version,
        is_pristine=(run, version) == (0, 0),
        can_restore=saved,
        has_router=found.router is not None,
    )
    if found.router:
        standing = _with_job(standing, found.router[1])
    since_s = max(heard_s, default=journal.written_s if journal else time.time())
    return Findings(placement, standing, lost, since_s)


def _placement(found: Survivors, journal: Journal | None, num_groups: int, group_size: int) -> Placement:
    """The router's, which is in use; else the last that was written down; else as the expert actors hold the groups."""
    if found.router:
        return found.router[1].placement
    if journal:
        return journal.placement
    held = {name: expert.vitals["groups"] for name, (_, expert) in found.experts.items()}
    holders = tuple(tuple(name for name, groups in held.items() if group in groups) for group in range(num_groups))
    return Placement(0, holders, group_size)


def _position(found: Survivors) -> tuple[int, int]:
    """-> run and version that all should be at: the router's, or the newest of any expert actor."""
    if found.router:
        vitals = found.router[1].vitals
        return int(vitals["run"]), int(vitals["version"])
    all_vitals = [expert.vitals for _, expert in found.experts.values()]
    return max(((int(vitals["run"]), int(vitals["version"])) for vitals in all_vitals), default=(0, 0))


def _flaw(expert: ExpertStanding, placement: Placement, run: int, version: int) -> str:
    """Why it cannot hold what the placement says; empty if it can. The last commit may be on its way to it."""
    name, vitals = expert.contact.name, expert.vitals
    if int(vitals["run"]) != run or not version - 1 <= int(vitals["version"]) <= version:
        return f"is at version {vitals['version']} of run {vitals['run']}, the others at {version} of {run}"
    if missing := set(placement.held_by(name)) - set(vitals["groups"]):
        return f"does not hold expert groups {sorted(missing)}"
    return ""


def _with_job(standing: Standing, router: RouterStanding) -> Standing:
    job, course = router.job, router.course
    if job is None or course.run != int(router.vitals["run"]):
        return standing
    step = standing.version - course.version
    reports = []
    for time_s, report in router.reports:
        number = report.step - course.version
        lr = lr_at(number, job.config.steps, job.config.optimizer, job.config.schedule)
        reports.append(StepTold(time_s, report.seconds, metrics_of(report, lr, report.seconds)))
    return replace(standing, job=job, step=step, reports=tuple(reports))


def tell_losses(coordinator: Coordinator, findings: Findings, now: float) -> None:
    for name, reason in findings.lost.items():
        coordinator.actor_lost(name, now, reason)
    if not findings.standing.has_router:
        coordinator.actor_seen(ActorStatus(ROUTER, "router", "", 0, "ready", device="", version=0), now)
        coordinator.actor_lost(ROUTER, now, "died while the coordinator was away")


def on_their_way(found: Survivors, placement: Placement) -> dict[str, Sequence[int]]:
    """Groups that may have been on their way to each expert actor: all that it is not to hold."""
    groups = range(placement.num_groups)
    return {name: [g for g in groups if name not in placement.holders[g]] for name in found.experts}


def worth_keeping(found: Survivors, findings: Findings, wanted: int) -> Survivors:
    """Without those of no use and, where they are more than wanted, those that hold nothing: they were being started,
    or about to end. These are ended."""
    holders = set(findings.placement.actors) - set(findings.lost)
    idle = [name for name in found.experts if name not in holders and name not in findings.lost]
    idle = idle[max(0, wanted - len(holders & set(found.experts))) :]
    for name in {*findings.lost, *idle} & set(found.experts):
        ray.kill(found.experts[name][0])
    kept = {name: expert for name, expert in found.experts.items() if name not in idle and name not in findings.lost}
    return Survivors(found.router, kept)
