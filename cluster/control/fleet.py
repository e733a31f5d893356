"""Who is there and holds what: the members of the cluster together with the placement of the expert groups on them."""

from __future__ import annotations

from dataclasses import replace

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.control.members import Members
from cluster.control.switch import Switch
from cluster.errors import FailedPrecondition
from cluster.placement.placement import ActorSlot


class Fleet:
    def __init__(self, placement: Placement, heartbeat_timeout_s: float) -> None:
        self.members = Members(heartbeat_timeout_s)
        self._placement = placement
        self._switch: Switch | None = None

    # -- the placement ------------------------------------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """To go on with. While a switch is under way, steps and requests may still use the one before."""
        return self._placement

    @property
    def is_switching(self) -> bool:
        return self._switch is not None

    def place(self, placement: Placement) -> None:
        """Replaces the placement by a newer one, which everybody uses or will be told of."""
        if placement.epoch <= self._placement.epoch:
            raise InvalidInput("is not newer", field="placement.epoch", value=placement.epoch)
        self._placement, self._switch = placement, None
        for actor in self.members.all():
            self.members.regroup(actor.id, placement.held_by(actor.id))

    def begin_switch(self, placement: Placement) -> None:
        """As `place`; until the switch ends or is taken back, the placement before is not forgotten."""
        switch = Switch(self._placement, placement)
        self.place(placement)
        self._switch = switch

    def end_switch(self, used: Placement) -> None:
        """Everybody uses this one, of those that there were since the switch began. Who died since is not in it."""
        if self._switch is not None and used.epoch != self._placement.epoch:
            self.place(replace(used.without(self._switch.gone), epoch=self._placement.epoch + 1))
        self._switch = None

    def take_back(self) -> None:
        """A switch that is under way has failed: the placement before, without those who died since, as a newer one."""
        if self._switch is not None:
            self.place(replace(self._switch.before, epoch=self._placement.epoch + 1))

    def lose(self, actor_id: str) -> bool:
        """It holds nothing any more: the first copies of its groups own them. -> whether it did hold something."""
        switch = self._switch.without(actor_id) if self._switch is not None else None
        held = actor_id in self._placement.actors or switch != self._switch
        if held:
            left = self._placement.without({actor_id}) if switch is None else switch.best
            self.place(replace(left, epoch=self._placement.epoch + 1))
            self._switch = switch
        return held

    # -- who holds it -------------------------------------------------------------------------------------------------

    def experts(self) -> tuple[ActorSlot, ...]:
        """Expert actors that answer, in the order in which they were first seen; they may hold groups."""
        ready = (actor for actor in self.members.all() if self.members.is_ready(actor.id))
        return tuple(ActorSlot(actor.id, actor.node, actor.zone) for actor in ready if actor.role == "expert")

    def node_of(self) -> dict[str, str]:
        """Actor -> node."""
        return {actor.id: actor.node for actor in self.members.all()}

    def groups_below(self, num_holders: int) -> list[int]:
        """Groups with fewer ready holders than that."""
        return self._below(self._placement, num_holders)

    def scarce_groups(self, num_holders: int) -> list[int]:
        """The same; what a switch that is under way brings does not count yet: it may be taken back."""
        before = self._below(self._switch.before, num_holders) if self._switch is not None else []
        return sorted({*self.groups_below(num_holders), *before})

    def _below(self, placement: Placement, num_holders: int) -> list[int]:
        ready_G = [sum(map(self.members.is_ready, held)) for held in placement.holders]
        return [group for group, num_ready in enumerate(ready_G) if num_ready < num_holders]

    def require_answers(self) -> None:
        """`FailedPrecondition` while an actor that holds groups does not answer."""
        if silent := [actor for actor in self._placement.actors if not self.members.is_ready(actor)]:
            raise FailedPrecondition(f"expert groups are on {', '.join(silent)}, which does not answer; try again")
