"""Who owns which expert group: the value, and the pure function that makes the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.errors import InvalidInput


@dataclass(frozen=True)
class ActorSlot:
    """A place for an expert actor."""

    id: str
    node: str


@dataclass(frozen=True)
class Placement:
    epoch: int
    """Counts placements; a message that names another epoch was routed by another placement."""
    owners: tuple[str, ...]
    """Actor id of each expert group."""
    group_size: int
    """Experts of every MoE layer in a group: group g holds experts [g * group_size, (g + 1) * group_size)."""

    @property
    def num_groups(self) -> int:
        return len(self.owners)

    @property
    def num_experts(self) -> int:
        return len(self.owners) * self.group_size

    @property
    def actors(self) -> tuple[str, ...]:
        """Every owner once, in the order of their first group."""
        return tuple(dict.fromkeys(self.owners))

    def groups_of(self, actor: str) -> tuple[int, ...]:
        return tuple(group for group, owner in enumerate(self.owners) if owner == actor)

    def experts_of_group(self, group: int) -> range:
        if not 0 <= group < len(self.owners):
            raise IndexError(f"no expert group {group} of {len(self.owners)}")
        return range(group * self.group_size, (group + 1) * self.group_size)

    def experts_of(self, actor: str) -> tuple[int, ...]:
        return tuple(expert for group in self.groups_of(actor) for expert in self.experts_of_group(group))

    def owner_of_expert(self, expert: int) -> str:
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"no expert {expert} of {self.num_experts}")
        return self.owners[expert // self.group_size]


def spread(num_experts: int, group_size: int, actors: Sequence[ActorSlot], epoch: int = 1) -> Placement:
    """Groups in order over the actors, as evenly as possible: no actor owns two more than another.

    The actors of a node follow one another, so that a node's experts are contiguous, as node-limited gates want them.
    `InvalidInput` if the experts do not divide into groups, or an actor would own none.
    """
    num_groups = _num_groups(num_experts, group_size)
    _check_actors(actors, num_groups)
    nodes = list(dict.fromkeys(actor.node for actor in actors))
    ordered = sorted(actors, key=lambda actor: nodes.index(actor.node))
    share, rest = divmod(num_groups, len(ordered))
    owners = [actor.id for i, actor in enumerate(ordered) for _ in range(share + (i < rest))]
    return Placement(epoch, tuple(owners), group_size)


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
