"""A coordinator that died is back in another process: whom it finds alive, and what they say.

What the actors say counts; the journal adds what they cannot know. Everything here may block while Ray's head is away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import ray

from actors.errors import MoeClusterError
from cluster.config import ClusterConfig
from cluster.control.coordinator import Coordinator
from cluster.control.journal import Journal
from cluster.control.model import ModelFacts
from cluster.control.past import Past
from cluster.errors import Unavailable
from cluster.fabric.calls import call
from cluster.fabric.checkpoints import Vault, vault_url
from cluster.fabric.crew import Crew, Survivors
from cluster.fabric.desk import Known, Wanted
from cluster.fabric.factory import number_of
from cluster.fabric.fencing import end_process
from cluster.fabric.findings import Findings, on_their_way, tell_losses, weigh, worth_keeping
from cluster.fabric.journal import read_journal
from cluster.fabric.options import COORDINATOR, NAMESPACE, ROUTER
from cluster.fabric.routers import promote_timeout_s
from cluster.fabric.standing import ExpertStanding, RouterStanding

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


def come_back(config: ClusterConfig, cluster: str, crew: Crew, journal_name: str) -> Known | None:
    """Finds everybody; the crew then goes on with those that are of use, and the others are ended. None if nobody
    lives. `Unavailable` if it is to be tried again."""
    journal = read_journal(vault_url(config), journal_name)
    if journal is not None and journal.cluster != cluster:
        journal = None  # of a life before, which had nothing to do with these actors
    found = find_survivors(cluster, journal, promote_timeout_s(config.router))
    if not found.leader and not found.experts:
        return None
    keys = link_keys_of(found)
    origin, model = _facts(config, crew, found, journal)
    vault = Vault(config, origin)
    findings = weigh(found, journal, model, config.experts.group_size, saved=bool(vault.all()))
    wanted = _wanted(config, found, journal)
    kept = worth_keeping(found, findings, wanted.experts)
    coordinator = _coordinator(config, model, findings, journal)
    numbers = (journal.next_number, journal.next_router) if journal else (0, 1)
    crew.take_over(kept, numbers, model.num_experts, keys)
    crew.leave_off(on_their_way(kept, findings.placement))
    logger.warning(
        "the coordinator is back: version %d, routers %s, expert actors %s%s",
        findings.standing.version,
        ", ".join(kept.routers) or "none",
        ", ".join(kept.experts) or "none",
        "" if journal else "; there is no journal, so that jobs and operations of before are forgotten",
    )
    job = findings.standing.job
    going_on = (job.id, kept.lead.following.course) if job and kept.lead else None
    return Known(coordinator, vault, origin, wanted, going_on)


def _facts(
    config: ClusterConfig, crew: Crew, found: Survivors, journal: Journal | None
) -> tuple[ModelFacts, ModelFacts]:
    """-> of the model as the config says, and as it is: it may have grown, also after the journal's last word."""
    num_experts = found.lead.placement.num_experts if found.lead else None
    if journal is not None and num_experts in (None, journal.model.num_experts):
        return journal.origin, journal.model
    if not found.leader:  # another one is started, and started again when it can be loaded
        origin = crew.start_router()
        crew.end([ROUTER])
        return origin, origin
    handle, _ = found.routers[found.leader]
    timeout_s = config.ray.start_timeout_s
    origin, model = (call(found.leader, handle.facts.remote(count), timeout_s) for count in (0, num_experts))
    return origin, model


def _wanted(config: ClusterConfig, found: Survivors, journal: Journal | None) -> Wanted:
    term = max((said.term for _, said in found.routers.values()), default=0)
    if journal is None:
        num_experts = max(len(found.experts), config.experts.min_actors)
        return Wanted(num_experts, max(len(found.routers), config.router.actors), term)
    leaving = {node.node_id: node.name for node in journal.leaving}
    return Wanted(journal.wanted, journal.wanted_routers, term, leaving)


def _coordinator(config: ClusterConfig, model: ModelFacts, findings: Findings, journal: Journal | None) -> Coordinator:
    now = time.time()
    coordinator = Coordinator.restored_from(
        model,
        findings.placement,
        Past(journal.jobs, journal.operations, journal.entries) if journal else Past(),
        findings.standing,
        now,
        findings.since_s,
        redundancy=config.experts.redundancy,
        max_groups=config.experts.max_groups,
        importing=journal.importing if journal else "",
    )
    tell_losses(coordinator, findings, now)
    return coordinator
