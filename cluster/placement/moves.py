"""From one plan to the next in single moves, such that every unit has an owner all the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from actors.errors import InvalidInput
from cluster.placement.planner import Plan


@dataclass(frozen=True)
class Copy:
    """`target` gets the unit from `source`, which keeps it; without a source from the last checkpoint."""

    layer: int
    unit: int
    source: str | None
    target: str
    size_bytes: int


@dataclass(frozen=True)
class Own:
    """`actor` holds the unit and owns it from now on."""

    layer: int
    unit: int
    actor: str


@dataclass(frozen=True)
class Drop:
    """`actor` gives up its copy, which is not the owner's."""

    layer: int
    unit: int
    actor: str


Move = Copy | Own | Drop


def moves(old: Plan, new: Plan, bytes_per_unit: int, *, lost: Collection[str] = (), spare: int = 1) -> list[Move]:
    """Moves to be made one after the other.

    `lost`: actors of the old plan that are dead; nothing is copied from them. At no time does a unit have less copies
    than in that of the two plans where it has fewer (of the old one only those count that live), and no actor holds
    more units of a layer than it has slots, plus `spare` while one comes before another goes. With `spare` 1 there is
    always a way; without it there may be none, which is `InvalidInput`.
    """
    if old.hold_LUD.shape[:2] != new.hold_LUD.shape[:2]:
        raise InvalidInput("has other layers or units than the old plan", field="new", value=new.hold_LUD.shape[:2])
    return [
        move
        for layer in range(len(new.holders))
        for move in _Layer(old, new, layer, bytes_per_unit, frozenset(lost), spare).run()
    ]


def total_bytes(steps: Sequence[Move]) -> int:
    return sum(step.size_bytes for step in steps if isinstance(step, Copy))


class _Layer:
    """The moves of one layer as they are made."""

    def __init__(self, old: Plan, new: Plan, layer: int, size_bytes: int, lost: Collection[str], spare: int) -> None:
        self.layer, self.size_bytes, self.spare = layer, size_bytes, spare
        self.steps: list[Move] = []
        self.held = [[a for a in actors if a not in lost] for actors in _actors(old, layer)]
        self.goal = _actors(new, layer)
        self.least = [min(len(held), len(goal)) for held, goal in zip(self.held, self.goal, strict=True)]
        self.owner = [actors[0] for actors in _actors(old, layer)]
        self.node = {device.actor: device.node for plan in (old, new) for device in plan.devices}
        self.slots: Counter[str] = Counter()
        for device in (*old.devices, *new.devices):
            self.slots[device.actor] = max(self.slots[device.actor], device.slots)
        self.used = Counter(actor for held in self.held for actor in held)
        self.incoming: dict[str, list[int]] = {}
        self.outgoing: dict[str, list[int]] = {}
        # Units without a living copy first: they have no owner until they are back.
        for unit in sorted(range(len(self.held)), key=lambda unit: bool(self.held[unit])):
            held, goal = self.held[unit], self.goal[unit]
            for actor in goal:
                if actor not in held:
                    self.incoming.setdefault(actor, []).append(unit)
            for actor in held:
                if actor not in goal:
                    self.outgoing.setdefault(actor, []).append(unit)

    def run(self) -> list[Move]:
        for unit, (held, goal) in enumerate(zip(self.held, self.goal, strict=True)):
            if goal[0] in held:
                self._own(unit, goal[0])
            elif held and self.owner[unit] not in held:
                self._own(unit, held[0])
        for unit in range(len(self.held)):
            self._drop_where_possible(unit)
        while any(self.incoming.values()):
            if not (self._fill_free_slots() or self._relieve_overfull() or self._use_spare()):
                remedy = "use spare=1"
                raise InvalidInput("too few slots to move anything", field="spare", value=self.spare, remedy=remedy)
        return self.steps

    def _fill_free_slots(self) -> bool:
        done = False
        for actor, units in self.incoming.items():
            while units and self.used[actor] < self.slots[actor]:
                self._copy_in(units[0], actor)
                done = True
        return done

    def _relieve_overfull(self) -> bool:
        """An actor above its slots holds a unit that is to go, and can once it is where it is to be.

        So the one above its slots is followed by the next, until one has a free slot or a copy to drop: two at a time.
        """
        for actor, units in self.outgoing.items():
            if self.used[actor] > self.slots[actor]:
                for unit in units:
                    if self._copy_somewhere(unit):
                        return True
        return False

    def _use_spare(self) -> bool:
        return any(self._copy_somewhere(unit) for units in list(self.incoming.values()) for unit in units)

    def _copy_somewhere(self, unit: int) -> bool:
        for actor in self.goal[unit]:
            if actor not in self.held[unit] and self.used[actor] < self.slots[actor] + self.spare:
                self._copy_in(unit, actor)
                return True
        return False

    def _copy_in(self, unit: int, target: str) -> None:
        self.steps.append(Copy(self.layer, unit, self._source(unit, target), target, self.size_bytes))
        self.held[unit].append(target)
        self.used[target] += 1
        self.incoming[target].remove(unit)
        if target == self.goal[unit][0] or self.owner[unit] not in self.held[unit]:
            self._own(unit, target)
        self._drop_where_possible(unit)

    def _source(self, unit: int, target: str) -> str | None:
        """A copy in the same node, else the owner's."""
        near = [actor for actor in self.held[unit] if self.node[actor] == self.node[target]]
        if near:
            return near[0]
        return self.owner[unit] if self.owner[unit] in self.held[unit] else None

    def _drop_where_possible(self, unit: int) -> None:
        for actor in [actor for actor in self.held[unit] if actor not in self.goal[unit]]:
            if len(self.held[unit]) > self.least[unit] and len(self.held[unit]) > 1:
                rest = [other for other in self.held[unit] if other != actor]
                if self.owner[unit] == actor:
                    self._own(unit, next((other for other in rest if other in self.goal[unit]), rest[0]))
                self.held[unit] = rest
                self.used[actor] -= 1
                self.outgoing[actor].remove(unit)
                self.steps.append(Drop(self.layer, unit, actor))

    def _own(self, unit: int, actor: str) -> None:
        if self.owner[unit] != actor:
            self.steps.append(Own(self.layer, unit, actor))
            self.owner[unit] = actor


def _actors(plan: Plan, layer: int) -> list[list[str]]:
    return [[plan.devices[device].actor for device in held] for held in plan.holders[layer]]
