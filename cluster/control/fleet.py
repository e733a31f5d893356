"""Who is there and holds what: the members of the cluster together with the placement of the expert groups on them."""

from __future__ import annotations

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.control.members import Members
from cluster.errors import FailedPrecondition
from cluster.placement.placement import ActorSlot


class Fleet:
    def __init__(self, placement: Placement, heartbeat_timeout_s: float) -> None:
        self.members = Members(heartbeat_timeout_s)
        self._placement = placement

    @property
    def placement(self) -> Placement:
        return self._placement

    def place(self, placement: Placement) -> None:
        """Replaces the placement by a newer one."""
        if placement.epoch <= self._placement.epoch:
            raise InvalidInput("is not newer", field="placement.epoch", value=placement.epoch)
        self._placement = placement
        for actor in self.members.all():
            self.members.regroup(actor.id, placement.held_by(actor.id))

    def experts(self) -> tuple[ActorSlot, ...]:
        """Expert actors that answer, in the order in which they were first seen; they may hold groups."""
        ready = (actor for actor in self.members.all() if self.members.is_ready(actor.id))
        return tuple(ActorSlot(actor.id, actor.node, actor.zone) for actor in ready if actor.role == "expert")

    def node_of(self) -> dict[str, str]:
        """Actor -> node."""
        return {actor.id: actor.node for actor in self.members.all()}

    def groups_below(self, num_holders: int) -> list[int]:
        """Groups with fewer ready holders than that."""
        ready_G = [sum(map(self.members.is_ready, held)) for held in self._placement.holders]
        return [group for group, num_ready in enumerate(ready_G) if num_ready < num_holders]

    def require_answers(self) -> None:
        """`FailedPrecondition` while an actor that holds groups does not answer."""
        if silent := [actor for actor in self._placement.actors if not self.members.is_ready(actor)]:
            raise FailedPrecondition(f"expert groups are on {', '.join(silent)}, which does not answer; try again")
