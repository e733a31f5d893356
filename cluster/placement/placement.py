"""Who owns which expert group, and who has copies of it, in the beginning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.errors import InvalidInput
from actors.values import Placement


@dataclass(frozen=True)
class ActorSlot:
    """A place for an expert actor."""

    id: str
    node: str
    zone: str = ""
    """Of the node; empty if it is not known."""


Holders = list[list[ActorSlot]]
"""Of each group, its owner first."""


def spread(
    num_experts: int, group_size: int, actors: Sequence[ActorSlot], redundancy: int = 1, epoch: int = 1
) -> Placement:
    """Groups in order over the actors, as evenly as possible: no actor owns two more than another.

    The actors of a node follow one another, so that a node's experts are contiguous, as node-limited gates want them.
    Every group is on `redundancy` nodes. The copies of a node's groups go to all other nodes in turn, so that these
    share its work when it dies, and actors hold as even a number of groups as the nodes allow. Where zones are known
    these nodes are in as many zones as there are, up to `redundancy`: first those of other zones take turns.

    `InvalidInput` if the experts do not divide into groups, an actor would own none, or there are too few nodes.
    """
    num_groups = _num_groups(num_experts, group_size)
    _check_actors(actors, num_groups)
    nodes = list(dict.fromkeys(actor.node for actor in actors))
    _check_redundancy(redundancy, len(nodes))
    ordered = sorted(actors, key=lambda actor: nodes.index(actor.node))
    share, rest = divmod(num_groups, len(ordered))
    owners = [actor for i, actor in enumerate(ordered) for _ in range(share + (i < rest))]
    holders = _with_copies(owners, ordered, redundancy)
    return Placement(epoch, tuple(tuple(actor.id for actor in held) for held in holders), group_size)


def _with_copies(owners: Sequence[ActorSlot], actors: Sequence[ActorSlot], redundancy: int) -> Holders:
    zone_of = {actor.node: actor.zone for actor in actors}
    nodes = list(zone_of)
    num_held = Counter(owner.id for owner in owners)
    num_owned: Counter[str] = Counter()
    holders = [[owner] for owner in owners]
    for held in holders:
        home = held[0].node
        others = nodes[nodes.index(home) + 1 :] + nodes[: nodes.index(home)]
        for node in _apart(home, others, zone_of, num_owned[home])[: redundancy - 1]:
            idlest = min((actor for actor in actors if actor.node == node), key=lambda actor: num_held[actor.id])
            held.append(idlest)
            num_held[idlest.id] += 1
        num_owned[home] += 1
    while _handed_on(holders, actors):
        pass
    return holders


def _apart(home: str, others: Sequence[str], zone_of: Mapping[str, str], turn: int) -> list[str]:
    """Other nodes in the order in which they get copies of the home's group number `turn`: of those that are next in
    turn first one of each zone."""
    far = [node for node in others if zone_of[node] != zone_of[home]]
    near = [node for node in others if zone_of[node] == zone_of[home]]
    in_turn = [nodes[(turn + i) % len(nodes)] for nodes in (far, near) for i in range(len(nodes))]
    first_of_zone = {zone_of[node]: node for node in reversed(in_turn) if zone_of[node] != zone_of[home]}
    return sorted(in_turn, key=lambda node: first_of_zone.get(zone_of[node]) != node)


def _handed_on(holders: Holders, actors: Sequence[ActorSlot]) -> bool:
    """One copy less on an actor that holds at least two groups more than another, to whom a chain of copies leads."""
    num_held = Counter(actor for held in holders for actor in held)
    least = min(num_held[actor] for actor in actors)
    for source in sorted(actors, key=lambda actor: -num_held[actor]):
        if num_held[source] < least + 2:
            break
        came_by: dict[ActorSlot, tuple[int, ActorSlot]] = {}
        reached = [source]
        for actor in reached:
            if num_held[actor] <= num_held[source] - 2:
                _pass_along(holders, came_by, source, actor)
                return True
            for group, other in _takers(holders, actors, actor):
                if other != source and other not in came_by:
                    came_by[other] = group, actor
                    reached.append(other)
    return False


def _takers(holders: Holders, actors: Sequence[ActorSlot], actor: ActorSlot) -> list[tuple[int, ActorSlot]]:
    """Groups of which the actor has a copy, and who could have it instead: nobody on a node that has another one, or
    who would leave the group in fewer zones."""
    takers = []
    for group, held in enumerate(holders):
        if actor in held[1:]:
            rest = [other for other in held if other != actor]
            taken, zones = {other.node for other in rest}, {other.zone for other in rest}
            stays_apart = actor.zone in zones  # wherever it goes
            takers += [
                (group, other)
                for other in actors
                if other != actor
                and other.node not in taken
                and (stays_apart or other.zone == actor.zone or other.zone not in zones)
            ]
    return takers


def _pass_along(
    holders: Holders, came_by: dict[ActorSlot, tuple[int, ActorSlot]], source: ActorSlot, target: ActorSlot
) -> None:
    # The chain is a shortest one, so its steps do not get in each other's way: of two that put copies of one group on
    # one node, or together into fewer zones, the first could have gone where the second went.
    while target != source:
        group, giver = came_by[target]
        holders[group][holders[group].index(giver)] = target
        target = giver


def _check_redundancy(redundancy: int, num_nodes: int) -> None:
    if redundancy < 1:
        raise InvalidInput("is below 1", field="experts.redundancy", value=redundancy, remedy="use 1 or more")
    if redundancy > num_nodes:
        raise InvalidInput(
            f"the copies of a group go to different nodes, and the expert actors are on {num_nodes}",
            field="experts.redundancy",
            value=redundancy,
            remedy=f"use at most {num_nodes}, or put the actors on {redundancy} nodes or more",
        )


def _num_groups(num_experts: int, group_size: int) -> int:
    if group_size < 1:
        raise InvalidInput("is below 1", field="experts.group_size", value=group_size, remedy="use 1 or more")
    if num_experts < 1:
        raise InvalidInput("the model has no routed experts", field="model", value=num_experts)
    if num_experts % group_size:
        divisors = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        raise InvalidInput(
            f"does not divide the model's {num_experts} experts",
            field="experts.group_size",
            value=group_size,
            remedy=f"use one of {', '.join(map(str, divisors))}",
        )
    return num_experts // group_size


def _check_actors(actors: Sequence[ActorSlot], num_groups: int) -> None:
    if not actors:
        raise InvalidInput("there is no expert actor", field="experts.actors", value=0, remedy="use 1 or more")
    if len({actor.id for actor in actors}) < len(actors):
        raise InvalidInput("an actor is named twice", field="experts.actors", value=[actor.id for actor in actors])
    if len(actors) > num_groups:
        raise InvalidInput(
            f"more actors than the {num_groups} expert groups",
            field="experts.actors",
            value=len(actors),
            remedy=f"use at most {num_groups}, or make experts.group_size smaller",
        )
