"""What a coordinator works with, from the moment that it knows the state of its cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.values import Course
from cluster.config import ClusterConfig
from cluster.control.coordinator import Coordinator
from cluster.control.journal import Journal, LeavingNode
from cluster.control.model import ModelFacts
from cluster.fabric.autoscaling import Autoscaler
from cluster.fabric.changes import Changes
from cluster.fabric.checkpoints import Checkpoints, Vault
from cluster.fabric.crew import Crew
from cluster.fabric.draining import Draining
from cluster.fabric.growing import Growing
from cluster.fabric.guarded import Guarded
from cluster.fabric.importing import Imports
from cluster.fabric.jobs import JobThreads
from cluster.fabric.journal import Keeper
from cluster.fabric.pins import Pins
from cluster.fabric.rebalancing import Rebalancer
from cluster.fabric.recovery import Recovery
from cluster.fabric.routers import Routers
from cluster.fabric.scaling import Scaling
from cluster.fabric.snapshots import Snapshots


@dataclass(frozen=True)
class Wanted:
    """What there should be by now, whatever the config says."""

    experts: int
    """Expert actors."""
    routers: int
    term: int = 0
    """The highest that any router has led in."""
    leaving: Mapping[str, str] = field(default_factory=dict)
    """Id -> name of the nodes that were emptied, and are to be taken away."""


@dataclass(frozen=True)
class Known:
    """With what a coordinator begins, at the start or after the death of the one before."""

    coordinator: Coordinator
    vault: Vault
    origin: ModelFacts
    """Of the model as the config says."""
    wanted: Wanted
    going_on: tuple[str, Course] | None = None
    """The job that the router's steps are of, and what they are counted from."""


@dataclass(frozen=True)
class Desk:
    """What a coordinator works with, from the moment that it knows the state of the cluster."""

    state: Guarded
    changes: Changes
    scaling: Scaling
    rebalancer: Rebalancer
    autoscaler: Autoscaler
    draining: Draining
    growing: Growing
    routers: Routers
    checkpoints: Checkpoints
    snapshots: Snapshots
    recovery: Recovery
    jobs: JobThreads
    keeper: Keeper
    pins: Pins
    imports: Imports


def set_up(config: ClusterConfig, cluster: str, crew: Crew, control: Any, known: Known, journal: str) -> Desk:
    """`control`: the coordinator's own handle. `journal`: the name of its file."""
    state, experts, wanted = Guarded(known.coordinator), config.experts, known.wanted
    changes = Changes(state, crew)
    scaling = Scaling(state, crew, changes, experts, wanted.experts)
    checkpoints = Checkpoints(known.vault, config.checkpoint.every_steps, state, crew)
    if known.going_on:
        checkpoints.job_goes_on(*known.going_on)
    snapshots = Snapshots(experts.snapshot_every_steps, state, crew, checkpoints)
    recovery = Recovery(state, crew, changes, scaling, checkpoints, snapshots, control, experts.redundancy)
    routers = Routers(state, crew, changes, control, config.router, wanted.routers, wanted.term)
    draining = Draining(state, crew, changes, scaling, wanted.leaving)

    def take() -> Journal:
        with state.reading() as coordinator:
            now = Wanted(scaling.wanted_if_cut_off, routers.wanted_if_cut_off, leaving=draining.leaving_if_cut_off)
            return journal_of(coordinator, cluster, known.origin, now, crew)

    def is_worth_it(journal: Journal) -> bool:
        wanted = journal.wanted, journal.wanted_routers
        return not journal.is_empty or wanted != (experts.actors, config.router.actors) or bool(journal.leaving)

    keeper = Keeper(known.vault.url, take, is_worth_it, journal)
    return Desk(
        state,
        changes,
        scaling,
        Rebalancer(changes, experts.rebalance_every_s),
        Autoscaler(state, crew, changes, scaling, experts),
        draining,
        Growing(state, crew, changes, checkpoints, routers),
        routers,
        checkpoints,
        snapshots,
        recovery,
        JobThreads(state, crew, config.model, checkpoints, recovery, routers, snapshots),
        keeper,
        Pins(crew, config.router.max_pins),
        Imports(state, crew, routers, checkpoints, snapshots, keeper),
    )


def journal_of(coordinator: Coordinator, cluster: str, origin: ModelFacts, wanted: Wanted, crew: Crew) -> Journal:
    past = coordinator.past
    next_number, next_router = crew.next_numbers
    return Journal(
        cluster=cluster,
        written_s=time.time(),
        origin=origin,
        model=coordinator.model,
        is_pristine=coordinator.health.is_pristine,
        placement=coordinator.placement,
        wanted=wanted.experts,
        next_number=next_number,
        wanted_routers=wanted.routers,
        next_router=next_router,
        jobs=past.jobs,
        operations=past.operations,
        entries=past.entries,
        actors=crew.processes(),
        leaving=tuple(LeavingNode(node_id, name) for node_id, name in sorted(wanted.leaving.items())),
        importing=coordinator.importing,
    )
