"""Who is there and holds what: the members of the cluster together with the placement of the expert groups on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
        """To go on with. While a change is under way, steps and requests may still use the one before."""
        return self._placement

    @property
    def is_unsettled(self) -> bool:
        """A change of placement is under way that has to do with what is in use."""
        return self._switch is not None and self._placement.epoch != self._switch.before.epoch

    def place(self, placement: Placement) -> None:
        """Replaces the placement by a newer one, which everybody uses or will be told of."""
        self._check_newer(placement)
        self._placement, self._switch = placement, None
        for actor in self.members.all():
            self.members.regroup(actor.id, placement.held_by(actor.id))

    def begin_switch(self, after: Placement) -> None:
        """Copies for this placement are on their way. Until it is `in_use`, or taken back, that of now counts."""
        self._check_newer(after)
        self._switch = Switch(self._placement, after)

    def came(self, group: int, actor: str) -> None:
        if self._switch is not None:
            self._switch = self._switch.with_copy(group, actor)

    def switch(self) -> None:
        """All copies are there: as `place`, of what was begun. `FailedPrecondition` if somebody has died since."""
        switch = self._switch
        if switch is None or switch.gone or any(map(self.members.is_buried, switch.after.actors)):
            raise FailedPrecondition("an actor died meanwhile; try again")
        self.place(switch.after)
        self._switch = switch

    def in_use(self, used: Placement) -> None:
        """Who leads uses this one. If it is of the change under way, that has come to its end with it, but for those
        who died since."""
        switch = self._switch
        if switch is None or used.epoch <= switch.before.epoch:
            return
        if used.epoch != self._placement.epoch:
            newer = max(used.epoch, self._placement.epoch) + 1
            self.place(replace(used.without(switch.gone), epoch=newer))
        self._switch = None

    def held(self, groups: Mapping[str, Collection[int]]) -> None:
        """As `in_use`, by what actors say that they hold: all of what everybody was told of, or they were not all told,
        and what was there before is still there."""
        placement = self._placement
        if self.is_unsettled and all(set(placement.held_by(a)) <= set(groups.get(a, ())) for a in placement.actors):
            self.in_use(placement)

    def take_back(self) -> None:
        """The change under way has come to nothing: the placement before it, without those who died since, as a newer
        one if another was told."""
        if self._switch is not None and self.is_unsettled:
            self.place(replace(self._switch.before, epoch=self._placement.epoch + 1))
        self._switch = None

    def lose(self, actor_id: str) -> bool:
        """It holds nothing any more: the first copies of its groups own them. -> whether it did hold something, or was
        about to."""
        switch = self._switch.without(actor_id) if self._switch is not None else None
        held = actor_id in self._placement.actors or switch != self._switch
        if held:
            left = self._placement.without({actor_id}) if switch is None else switch.left
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
        """The same; what a change that is under way brings does not count yet: it may be taken back."""
        before = self._below(self._switch.before, num_holders) if self._switch is not None else []
        return sorted({*self.groups_below(num_holders), *before})

    def _check_newer(self, placement: Placement) -> None:
        if placement.epoch <= self._placement.epoch:
            raise InvalidInput("is not newer", field="placement.epoch", value=placement.epoch)

    def _below(self, placement: Placement, num_holders: int) -> list[int]:
        ready_G = [sum(map(self.members.is_ready, held)) for held in placement.holders]
        return [group for group, num_ready in enumerate(ready_G) if num_ready < num_holders]

    def require_answers(self) -> None:
        """`FailedPrecondition` while an actor that holds groups does not answer."""
        if silent := [actor for actor in self._placement.actors if not self.members.is_ready(actor)]:
            raise FailedPrecondition(f"expert groups are on {', '.join(silent)}, which does not answer; try again")
