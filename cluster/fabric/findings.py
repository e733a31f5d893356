"""What the actors that outlived a coordinator come to, together with its journal: what is lost, who is to be kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ray

from actors.values import Placement
from cluster.backend import ActorStatus
from cluster.control.coordinator import Coordinator
from cluster.control.journal import Journal
from cluster.control.model import ModelFacts
from cluster.control.past import Standing, StepTold
from cluster.fabric.crew import Survivors
from cluster.fabric.options import ROUTER
from cluster.fabric.standing import ExpertStanding, RouterStanding
from cluster.jobs.runner import metrics_of
from cluster.jobs.schedule import lr_at


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
    is_importing = journal is not None and bool(journal.importing)
    due = None if is_importing else run  # an import begins another, at one after the other, and is to be repeated
    lost = {}
    for name in placement.actors:
        if name not in found.experts:
            lost[name] = "died while the coordinator was away"
        elif flaw := _flaw(found.experts[name][1], placement, due, version):
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


def _flaw(expert: ExpertStanding, placement: Placement, run: int | None, version: int) -> str:
    """Why it cannot hold what the placement says; empty if it can. The last commit may be on its way to it. `run`: None
    if any will do."""
    name, vitals = expert.contact.name, expert.vitals
    if run not in (None, int(vitals["run"])) or not version - 1 <= int(vitals["version"]) <= version:
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
