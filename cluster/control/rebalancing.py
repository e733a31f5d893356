"""From load, actors and what is asked of the placement to copies of expert groups. Pure: the edge carries it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.backend import GroupMove, Rebalance
from cluster.control.load import LoadLE, group_load
from cluster.errors import FailedPrecondition
from cluster.placement.moves import Copy, Move, Own, moves
from cluster.placement.placement import ActorSlot
from cluster.placement.planner import Plan, plan
from cluster.placement.request import Device

MOVE_COST = 0.01
"""Of the average load of an actor: what a move must gain. Load over a window of steps varies by as much by itself."""
SPARE = 1
"""Groups that an actor may hold above `max_groups` while a change is under way."""


@dataclass(frozen=True)
class Stage:
    """Part of a change: copies that are made side by side in the background, then one switch."""

    copies: tuple[GroupMove, ...]
    """Every source holds its group before the stage. May be empty: owners change, or copies are given up."""
    placement: Placement
    """What to switch to when all copies are there; who is no longer in it drops the group."""


@dataclass(frozen=True)
class Proposal:
    target: Placement
    """Of the last stage; without stages the placement of now."""
    stages: tuple[Stage, ...]
    balance_before: float
    balance_after: float
    """Average over maximum load of the actors; before, of those that leave too."""
    unmet: tuple[str, ...] = ()
    """What was asked and cannot be had, as sentences."""
    message: str = ""
    """Why there are no stages; empty otherwise."""

    @property
    def moves(self) -> tuple[GroupMove, ...]:
        return tuple(copy for stage in self.stages for copy in stage.copies)

    def report(self, placement_epoch: int, *, done: bool, stall_s: float = 0.0) -> Rebalance:
        """For clients; `placement_epoch` is that of now, `stall_s` the longest wait of a step for a switch."""
        return Rebalance(
            self.moves,
            self.balance_before,
            self.balance_after,
            placement_epoch,
            done,
            self.message,
            self.unmet,
            stall_s,
        )


def propose(
    placement: Placement,
    load_LE: LoadLE,
    actors: Sequence[ActorSlot],
    group_bytes: int,
    *,
    redundancy: int,
    max_groups: int,
) -> Proposal:
    """The placement of the groups on `actors` that the load asks for, with every group on `redundancy` nodes, in as
    many zones as there are of them.

    `actors`: living ones, also such that hold nothing yet. One of the placement that is not among them gives all its
    groups away, and is a source of copies until then. `max_groups`: most groups an actor may hold, 0 for what
    `redundancy` needs and one more. Hot groups get further copies where there is room. `group_bytes`: of one group.

    At no point of the stages has a group no owner, or fewer holders than in the poorer of old and new placement; and
    no actor gets a group that would be its `max_groups` + 2nd, those on their way included.

    Without load all groups count alike, and no copies are made but those that `redundancy` needs.
    `FailedPrecondition` if there is neither load nor a change of actors or a missing copy, or if a group is lost;
    `InvalidInput` if the actors have no room for the groups.
    """
    if placement.missing:
        raise FailedPrecondition(f"no actor holds {named(placement.missing)} any more")
    load_G = group_load(load_LE, placement)
    has_load = any(load_G)
    if not has_load and not _is_incomplete(placement, actors, redundancy):
        raise FailedPrecondition("there is no load to balance yet; run training steps first")
    most = max_groups or _groups_needed(placement.num_groups, actors, redundancy) + 1
    _check_room(placement, actors, max_groups, most)
    if not has_load:
        load_G = [1] * placement.num_groups
    devices = tuple(Device(actor.id, actor.node, most, zone=actor.zone) for actor in actors)
    old = _as_plan(placement, actors, most)
    new = plan([load_G], devices, redundancy=redundancy, hot_copies=has_load, previous=old, move_cost=MOVE_COST)
    stages = _staged(placement, moves(old, new, group_bytes, spare=SPARE), most + SPARE)
    target = stages[-1].placement if stages else placement
    return Proposal(
        target,
        stages,
        balance_before=old.mean_balance([load_G]),
        balance_after=new.mean_balance([load_G]),
        unmet=_unmet(target, actors, redundancy, most),
        message="" if stages else "no move of groups would make the load more even by what it costs",
    )


# --- What is asked -----------------------------------------------------------------------------------------------


def _is_incomplete(placement: Placement, actors: Sequence[ActorSlot], redundancy: int) -> bool:
    """Whether there is something to do whatever the load: actors came or are to go, or copies are missing."""
    if set(placement.actors) != {actor.id for actor in actors}:
        return True
    wanted = min(redundancy, len(_node_sizes(actors)))
    return bool(_scarce_groups(placement, actors, wanted) or _gathered_groups(placement, actors, redundancy))


def _scarce_groups(placement: Placement, actors: Sequence[ActorSlot], wanted: int) -> list[int]:
    """Groups that are on fewer than `wanted` nodes."""
    node_of = {actor.id: actor.node for actor in actors}
    nodes_G = [{node_of[actor] for actor in held if actor in node_of} for held in placement.holders]
    return [group for group, nodes in enumerate(nodes_G) if len(nodes) < wanted]


def _gathered_groups(placement: Placement, actors: Sequence[ActorSlot], redundancy: int) -> list[int]:
    """Groups that are in fewer zones than they could be."""
    zone_of = {actor.id: actor.zone for actor in actors}
    wanted = _zones_wanted(actors, redundancy)
    zones_G = [{zone_of[actor] for actor in held if actor in zone_of} for held in placement.holders]
    return [group for group, zones in enumerate(zones_G) if len(zones) < wanted]


def _zones_wanted(actors: Sequence[ActorSlot], redundancy: int) -> int:
    return min(redundancy, len({actor.zone for actor in actors}))


def _node_sizes(actors: Sequence[ActorSlot]) -> Counter[str]:
    return Counter(actor.node for actor in actors)


def _groups_needed(num_groups: int, actors: Sequence[ActorSlot], redundancy: int) -> int:
    """Groups that an actor must be able to hold, so that all are on `redundancy` nodes, or on all if there are fewer.

    A node has use for one copy of each group, so a small node's actors may have to hold more than the average; so may
    those of a small zone.
    """
    on_nodes = _needed_each(num_groups, _node_sizes(actors).values(), redundancy)
    return max(on_nodes, _needed_each(num_groups, Counter(actor.zone for actor in actors).values(), redundancy))


def _needed_each(num_groups: int, sizes: Collection[int], redundancy: int) -> int:
    """Groups an actor, so that all are in `redundancy` different places with so many actors each, or in all."""
    copies = min(redundancy, len(sizes)) * num_groups
    return next(n for n in range(1, num_groups + 1) if sum(min(n * size, num_groups) for size in sizes) >= copies)


def _check_room(placement: Placement, actors: Sequence[ActorSlot], max_groups: int, most: int) -> None:
    if not actors:
        raise InvalidInput("there is no expert actor left", field="actors", value=0, remedy="keep 1 or more")
    if most * len(actors) < placement.num_groups:
        raise InvalidInput(
            f"the actors that stay have no room for {placement.num_groups} expert groups",
            field="experts.max_groups",
            value=max_groups,
            remedy=f"use {-(-placement.num_groups // len(actors))} or more, or 0",
        )


def _unmet(target: Placement, actors: Sequence[ActorSlot], redundancy: int, most: int) -> tuple[str, ...]:
    scarce = _scarce_groups(target, actors, redundancy)
    gathered = _gathered_groups(target, actors, redundancy)
    sentences = []
    if scarce:
        sentences.append(f"redundancy {redundancy} of {named(scarce)}: {_why_scarce(actors, redundancy, most)}")
    if gathered:
        zones = _zones_wanted(actors, redundancy)
        sentences.append(f"copies of {named(gathered)} in {zones} zones: an actor may hold {most} groups at most")
    return tuple(sentences)


def _why_scarce(actors: Sequence[ActorSlot], redundancy: int, most: int) -> str:
    num_nodes = len(_node_sizes(actors))
    if num_nodes < redundancy:
        return f"the expert actors are on {num_nodes} node{'s' if num_nodes != 1 else ''}"
    return f"an actor may hold {most} groups at most"


def named(groups: Sequence[int]) -> str:
    """`group 2`, or `groups 2, 3`."""
    return f"group{'s' if len(groups) != 1 else ''} {', '.join(map(str, groups))}"


def _as_plan(placement: Placement, actors: Sequence[ActorSlot], slots: int) -> Plan:
    """With the actors that came since, and with those that leave: their node does not matter any more."""
    node_of: Mapping[str, str] = {actor.id: actor.node for actor in actors}
    names = list(dict.fromkeys([*placement.actors, *node_of]))
    number = {name: i for i, name in enumerate(names)}
    devices = tuple(Device(name, node_of.get(name, ""), slots) for name in names)
    return Plan(devices, (tuple(tuple(number[actor] for actor in held) for held in placement.holders),))


# --- Stages ------------------------------------------------------------------------------------------------------


def _staged(placement: Placement, steps: Sequence[Move], most: int) -> tuple[Stage, ...]:
    """The steps put together into as few stages as `most` groups on an actor allow."""
    stages: list[Stage] = []
    while steps:
        stage, later = _next_stage(placement, steps, most)
        assert len(later) < len(steps), "an actor without room holds a group that it can give up before long"
        stages.append(stage)
        placement, steps = stage.placement, later
    return tuple(stages)


def _next_stage(placement: Placement, steps: Sequence[Move], most: int) -> tuple[Stage, list[Move]]:
    """Takes the steps in turn, and what is left: copies that found no room, with all that comes after for the group."""
    holders = [list(held) for held in placement.holders]
    used = Counter(actor for held in holders for actor in held)
    copies: list[Copy] = []
    later: list[Move] = []
    waiting: set[int] = set()
    for step in steps:
        # What is dropped makes room only at the switch, after all copies of the stage.
        if step.unit in waiting or (isinstance(step, Copy) and used[step.target] >= most):
            waiting.add(step.unit)
            later.append(step)
            continue
        held = holders[step.unit]
        if isinstance(step, Copy):
            held.append(step.target)
            used[step.target] += 1
            copies.append(step)
        elif isinstance(step, Own):
            held.insert(0, held.pop(held.index(step.actor)))
        else:
            held.remove(step.actor)
    after = replace(placement, epoch=placement.epoch + 1, holders=tuple(map(tuple, holders)))
    return Stage(_group_moves(copies, placement, after), after), later


def _group_moves(copies: Sequence[Copy], before: Placement, after: Placement) -> tuple[GroupMove, ...]:
    """The same with sources that hold the group before the stage; first of all those that give it up."""
    leaving = {
        group: [actor for actor in before.holders[group] if actor not in after.holders[group]]
        for group in {copy.unit for copy in copies}
    }
    result = []
    for copy in copies:
        if leaving[copy.unit]:
            source = leaving[copy.unit].pop(0)
        else:
            source = copy.source if copy.source in before.holders[copy.unit] else before.owner(copy.unit)
        kind = "copy" if source in after.holders[copy.unit] else "move"
        result.append(GroupMove(copy.unit, source, copy.target, copy.size_bytes, kind))
    return tuple(result)
