"""A coordinator that died is back in another process: whom it finds alive, and what they say.

What the actors say counts; the journal adds what they cannot know. Everything here may block while Ray's head is away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray

from actors.errors import MoeClusterError
from actors.values import Placement
from cluster.backend import ActorStatus
from cluster.control.coordinator import Coordinator, ModelFacts
from cluster.control.journal import Journal
from cluster.control.past import Standing, StepTold
from cluster.errors import Unavailable
from cluster.fabric.calls import call
from cluster.fabric.crew import Survivors, end_process, number_of
from cluster.fabric.options import COORDINATOR, NAMESPACE, ROUTER
from cluster.fabric.workers import ExpertStanding, RouterStanding
from cluster.jobs.runner import metrics_of
from cluster.jobs.schedule import lr_at

if TYPE_CHECKING:
    from actors.transport.curve import LinkKeys

logger = logging.getLogger(__name__)

ANSWER_S = 10.0
"""An actor that has not answered for so long is frozen. A router may take longer, for the step at hand, but not to a
ping."""


def find_survivors(cluster: str, journal: Journal | None, promote_timeout_s: float) -> Survivors:
    """Who is loaded and answers. The others are ended: those that were being started, and those that are frozen.

    One of the routers leads: where the one that did is dead, another one is promoted.
    """
    handles = _handles(cluster)
    routers = {name: handle for name, handle in handles.items() if _is_router(name)}
    leading, led = _routers(routers, handles.values(), promote_timeout_s)
    # Only now, since a step that came to its end meanwhile has changed what they have to say.
    experts = {name: handle for name, handle in handles.items() if name not in routers}
    asked = {name: handle.standing.remote() for name, handle in experts.items()}
    deadline = time.monotonic() + ANSWER_S
    found: dict[str, tuple[Any, ExpertStanding]] = {}
    for name in sorted(asked, key=number_of):
        expert: ExpertStanding | None = _answer(name, asked[name], deadline - time.monotonic())
        if expert is not None:
            found[name] = experts[name], expert
    survivors = Survivors({_role(name): (routers[name], said) for name, said in led.items()}, _role(leading), found)
    _end_others({name: handle for name, handle in handles.items() if name not in {*led, *found}}, survivors, journal)
    return survivors


def _role(name: str) -> str:
    return name.partition("/")[0]


def _is_router(name: str) -> bool:
    return _role(name).rpartition("-")[0] == ROUTER.rpartition("-")[0]


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


def _routers(
    handles: Mapping[str, Any], everybody: Collection[Any], promote_timeout_s: float
) -> tuple[str, dict[str, RouterStanding]]:
    """-> which leads, and what it and those say that have the trunk from it; by the keys of `handles`."""
    said = _router_standings(handles, everybody)
    terms = {name: standing.term for name, standing in said.items() if standing.leads}
    leading = max(terms, key=lambda name: terms[name], default="")
    if not leading:
        leading = _promoted(handles, said, everybody, promote_timeout_s)
    # Once more, since a step at hand may have changed who follows, and a promotion the version.
    said = _router_standings(handles, everybody) if leading else {}
    if leading not in said:
        return "", {}
    followers = {*said[leading].followers, _role(leading)}
    return leading, {name: standing for name, standing in said.items() if name == leading or _role(name) in followers}


def _router_standings(routers: Mapping[str, Any], everybody: Collection[Any]) -> dict[str, RouterStanding]:
    """Of those that have the trunk and answer, when the step at hand is over."""
    pending = {name: handle.standing.remote() for name, handle in routers.items()}
    said: dict[str, RouterStanding] = {}
    while pending:
        refs = list(pending.values())
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=1.0)
        for name in [name for name, ref in pending.items() if ref in ready]:
            standing: RouterStanding | None = _answer(name, pending.pop(name), ANSWER_S)
            if standing is not None:
                said[name] = standing
        if pending:
            _ping(everybody)
        for name in list(pending):
            try:
                call(name, routers[name].ping.remote(), ANSWER_S)
            except MoeClusterError as error:
                logger.warning("%s does not answer, and is ended: %s", name, error)
                del pending[name]
    return said


def _promoted(
    handles: Mapping[str, Any], said: Mapping[str, RouterStanding], everybody: Collection[Any], timeout_s: float
) -> str:
    """The one that is furthest, and can: it leads the others from now on. Empty if none can."""
    term = max((standing.term for standing in said.values()), default=0)
    heirs = sorted(said, key=lambda name: (int(said[name].vitals["run"]), int(said[name].vitals["version"])))
    while heirs:
        heir = heirs.pop()
        term += 1
        ref = handles[heir].promote.remote([said[name].contact for name in heirs], term)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not ray.wait([ref], timeout=1.0)[0]:
            _ping(everybody)
        try:
            call(heir, ref, 1.0)
        except MoeClusterError as error:
            logger.error("%s cannot lead: %s", heir, error)
            continue
        logger.warning("%s leads now", heir)
        return heir
    return ""


def _ping(everybody: Iterable[Any]) -> None:
    """There is a coordinator."""
    for handle in everybody:
        handle.ping.remote()


def _answer(name: str, ref: Any, timeout_s: float) -> Any:
    """None if it is of no use."""
    try:
        if (answer := call(name, ref, max(1.0, timeout_s))) is None:
            logger.warning("%s is being started", name)
        return answer
    except MoeClusterError as error:
        logger.warning("%s does not answer: %s", name, error)
        return None


def _end_others(others: Mapping[str, Any], found: Survivors, journal: Journal | None) -> None:
    """Also by the number of the process, where the journal knows it: a frozen one does not hear Ray."""
    living = {said.contact.pid for _, said in found.routers.values()}
    living |= {said.contact.pid for _, said in found.experts.values()}
    for name, handle in others.items():
        logger.warning("%s is ended", name)
        ray.kill(handle)
        for process in journal.actors if journal else ():
            if process.name == _role(name) and process.pid not in living:
                end_process(process.node_id, process.pid)


def link_keys_of(found: Survivors) -> LinkKeys | None:
    """Those that all of them have, or None where links are not secured. `Unavailable` if nobody tells.

    They are in the memory of actors alone: in no journal, no checkpoint, and not in Ray's control store.
    """
    for name, (handle, _) in (*found.routers.items(), *found.experts.items()):
        try:
            keys: LinkKeys | None = call(name, handle.link_keys.remote(), ANSWER_S)
            return keys
        except MoeClusterError as error:
            logger.warning("%s does not tell the keys of the links: %s", name, error)
    raise Unavailable("no actor tells the keys of the links")


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
    heard_s += [router.heard_s for _, router in found.routers.values()]
    standing = Standing(
        version,
        is_pristine=(run, version) == (0, 0) and _is_untouched(placement, journal),
        can_restore=saved,
        has_router=found.lead is not None,
    )
    if found.lead:
        standing = _with_job(standing, found.lead)
    since_s = max(heard_s, default=journal.written_s if journal else time.time())
    return Findings(placement, standing, lost, since_s)


def _is_untouched(placement: Placement, journal: Journal | None) -> bool:
    """By an import or a growth, which are no steps."""
    return journal is None or (journal.is_pristine and placement.num_experts == journal.origin.num_experts)


def _placement(found: Survivors, journal: Journal | None, num_groups: int, group_size: int) -> Placement:
    """The router's, which is in use; else the last that was written down; else as the expert actors hold the groups."""
    if found.lead:
        return found.lead.placement
    if journal:
        return journal.placement
    held = {name: expert.vitals["groups"] for name, (_, expert) in found.experts.items()}
    holders = tuple(tuple(name for name, groups in held.items() if group in groups) for group in range(num_groups))
    return Placement(0, holders, group_size)


def _position(found: Survivors) -> tuple[int, int]:
    """-> run and version that all should be at: the router's, or the newest of any expert actor."""
    if found.lead:
        vitals = found.lead.vitals
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
    job, course = router.following.job, router.following.course
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
    return Survivors(found.routers, found.leader, kept)
