from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import InvalidInput
from cluster.placement.moves import Copy, Drop, Move, Own, moves, total_bytes
from cluster.placement.planner import Holders, Plan
from cluster.placement.request import Device


def made(slots: dict[str, int], *layers: list[str]) -> Plan:
    """Layers as lists of units, each the names of its actors, owner first: made({"a": 2}, ["a", "ab"])."""
    number = {actor: i for i, actor in enumerate(slots)}
    holders: Holders = tuple(tuple(tuple(number[actor] for actor in unit) for unit in layer) for layer in layers)
    return Plan(tuple(Device(actor, f"n{i // 2}", count) for i, (actor, count) in enumerate(slots.items())), holders)


class Replay:
    """A cluster that makes the moves and complains."""

    def __init__(self, old: Plan, new: Plan, lost: set[str], spare: int) -> None:
        self.lost, self.spare = lost, spare
        self.slots: dict[str, int] = {}
        for device in (*old.devices, *new.devices):
            self.slots[device.actor] = max(self.slots.get(device.actor, 0), device.slots)
        self.held, self.owner = state_of(old)
        for actors in self.held.values():
            actors -= lost
        goal, _ = state_of(new)
        self.least = {where: min(len(self.held[where]), len(goal[where])) for where in goal}

    def make(self, step: Move) -> None:
        where = (step.layer, step.unit)
        held = self.held[where]
        if isinstance(step, Copy):
            assert step.target not in held
            assert step.source in held if held else step.source is None
            held.add(step.target)
            used = sum(step.target in actors for (layer, _), actors in self.held.items() if layer == step.layer)
            assert used <= self.slots[step.target] + self.spare
        elif isinstance(step, Own):
            assert step.actor in held
            self.owner[where] = step.actor
        else:
            assert step.actor != self.owner[where], "an owner's copy is dropped"
            held.remove(step.actor)
        assert len(held) >= max(self.least[where], 0)

    def ownerless(self) -> set[tuple[int, int]]:
        return {where for where, owner in self.owner.items() if owner not in self.held[where]}


def state_of(plan: Plan) -> tuple[dict[tuple[int, int], set[str]], dict[tuple[int, int], str]]:
    held, owner = {}, {}
    for layer, units in enumerate(plan.holders):
        for unit, devices in enumerate(units):
            actors = [plan.devices[device].actor for device in devices]
            held[layer, unit], owner[layer, unit] = set(actors), actors[0]
    return held, owner


def replay(old: Plan, new: Plan, lost: set[str] = frozenset(), spare: int = 1) -> list[Move]:  # type: ignore[assignment]
    steps = moves(old, new, 10, lost=lost, spare=spare)
    cluster = Replay(old, new, set(lost), spare)
    # Only units that died with their owner are without one, and they are never so again.
    without = cluster.ownerless()
    for step in steps:
        cluster.make(step)
        still = cluster.ownerless()
        assert still <= without
        without = still
    assert (cluster.held, cluster.owner) == state_of(new)
    assert total_bytes(steps) == 10 * sum(isinstance(step, Copy) for step in steps)
    return steps


@st.composite
def plans(draw: st.DrawFn, num_layers: int, num_units: int) -> Plan:
    """Any layout whatever, on devices that are often exactly full."""
    actors = draw(st.lists(st.sampled_from("abcdef"), min_size=1, unique=True))
    holders = [
        [draw(st.lists(st.integers(0, len(actors) - 1), min_size=1, max_size=3, unique=True)) for _ in range(num_units)]
        for _ in range(num_layers)
    ]
    used = [max(sum(device in held for held in layer) for layer in holders) for device in range(len(actors))]
    free = draw(st.sampled_from([0, 0, 1, 3]))
    return Plan(
        tuple(Device(actor, "n" + str(ord(actor) % 3), used[i] + free) for i, actor in enumerate(actors)),
        tuple(tuple(tuple(held) for held in layer) for layer in holders),
    )


@given(st.data(), st.integers(1, 2), st.integers(1, 9), st.sets(st.sampled_from("abcdef"), max_size=3))
@settings(max_examples=250, deadline=None)
def test_no_unit_is_ever_without_an_owner(data: st.DataObject, num_layers: int, num_units: int, lost: set[str]) -> None:
    old, new = data.draw(plans(num_layers, num_units)), data.draw(plans(num_layers, num_units))
    replay(old, new)
    alive = {device.actor for device in new.devices}
    replay(old, new, lost - alive)


def test_nothing_moves_between_equal_plans() -> None:
    plan = made({"a": 1, "b": 2}, ["ab", "b"])
    assert moves(plan, plan, 10) == []


def test_full_actors_swap_through_a_spare_slot() -> None:
    slots = {"a": 2, "b": 2}
    old, new = made(slots, ["a", "a", "b", "b"]), made(slots, ["b", "b", "a", "a"])
    steps = replay(old, new)
    assert sum(isinstance(step, Copy) for step in steps) == 4
    with pytest.raises(InvalidInput, match=r"spare: too few slots to move anything \(got 0\); use spare=1"):
        moves(old, new, 10, spare=0)


def test_a_copy_that_is_left_anyway_makes_the_way_free() -> None:
    # Unit 0 keeps b in both plans: its copy on a goes first and no spare slot is needed.
    slots = {"a": 2, "b": 2}
    steps = replay(made(slots, ["ab", "a", "b"]), made(slots, ["b", "a", "ba"]), spare=0)
    assert steps == [Own(0, 0, "b"), Drop(0, 0, "a"), Copy(0, 2, "b", "a", 10)]


def test_a_dead_owner_is_replaced_by_its_copy_and_what_is_lost_comes_from_the_checkpoint() -> None:
    old = made({"a": 2, "b": 2, "c": 2}, ["ab", "a"])
    new = made({"b": 2, "c": 2}, ["bc", "c"])
    steps = replay(old, new, {"a"})
    assert steps[0] == Own(0, 0, "b")
    assert Copy(0, 1, None, "c", 10) in steps
    assert Copy(0, 0, "b", "c", 10) in steps


def test_a_copy_comes_from_its_own_node_if_it_can() -> None:
    slots = {"a": 1, "b": 1, "c": 1, "d": 1}  # a and b share a node, c and d another
    steps = replay(made(slots, ["ac"]), made(slots, ["acd"]))
    assert steps == [Copy(0, 0, "c", "d", 10)]


def test_plans_of_other_models_are_refused() -> None:
    with pytest.raises(InvalidInput, match="new: has other layers or units"):
        moves(made({"a": 2}, ["a"]), made({"a": 2}, ["a", "a"]), 10)
