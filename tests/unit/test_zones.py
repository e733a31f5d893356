"""Copies of a group are in different zones, so that the loss of a zone loses nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.values import Placement
from cluster.control.rebalancing import Proposal, propose
from cluster.control.scaling import actors_to_remove
from cluster.placement.placement import ActorSlot, spread
from cluster.placement.planner import Plan, plan
from cluster.placement.request import Device


def devices(text: str, slots: int) -> list[Device]:
    """`a1 a1 b1`: two on a node of zone a, one on a node of zone b."""
    return [Device(f"e{i}", node, slots, zone=node[0]) for i, node in enumerate(text.split())]


def actors(text: str) -> list[ActorSlot]:
    return [ActorSlot(f"e{i}", node, node[0]) for i, node in enumerate(text.split())]


def without_zones(request: list[Device]) -> list[Device]:
    return [replace(device, zone="") for device in request]


def num_zones(made: Plan) -> list[int]:
    """Of every unit of every layer."""
    return [len({made.devices[d].zone for d in held}) for layer in made.holders for held in layer]


def num_nodes(made: Plan) -> list[int]:
    return [len({made.devices[d].node for d in held}) for layer in made.holders for held in layer]


def zones_with_room(request: list[Device], num_units: int, redundancy: int) -> tuple[int, bool]:
    """Zones that each unit can be in, and whether all units can at once.

    A zone has use for one copy of each unit; if the zones' places are enough for all copies, giving each unit the zones
    with most places left leads there (Gale-Ryser).
    """
    places: dict[str, int] = {}
    for device in request:
        places[device.zone] = places.get(device.zone, 0) + min(num_units, device.slots)
    wanted = min(redundancy, sum(count > 0 for count in places.values()))
    return wanted, sum(min(num_units, count) for count in places.values()) >= wanted * num_units


@st.composite
def requests(draw: st.DrawFn, num_units: int) -> list[Device]:
    """Zones, nodes and slots of any size, with room for one copy of each unit at least."""
    nodes = [f"{zone}{i}" for i, zone in enumerate(draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=5)))]
    size, speed = st.integers(0, draw(st.sampled_from([2, 6, 12]))), st.sampled_from([1.0, 1.0, 0.5])
    made = [
        Device(f"e{i}", node, draw(size), draw(speed), node[0])
        for i, node in enumerate(draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=6)))
    ]
    short = max(0, num_units - sum(device.slots for device in made))
    return [replace(made[0], slots=made[0].slots + short), *made[1:]]


@st.composite
def changes(draw: st.DrawFn) -> tuple[np.ndarray, list[Device], list[Device], dict[str, Any]]:
    """Loads, devices before and after, what is asked."""
    num_units = draw(st.integers(1, 8))
    loads = st.lists(st.sampled_from([0.0, 1.0, 5.0, 20.0]), min_size=num_units, max_size=num_units)
    options = {"redundancy": draw(st.integers(1, 3)), "hot_copies": draw(st.booleans())}
    return np.array([draw(loads)]), draw(requests(num_units)), draw(requests(num_units)), options


def check(made: Plan, request: list[Device], redundancy: int) -> None:
    num_units = len(made.holders[0])
    wanted, is_room = zones_with_room(request, num_units, redundancy)
    for number, device in enumerate(request):
        assert sum(number in held for held in made.holders[0]) <= device.slots
    assert all(held and len(set(held)) == len(held) for held in made.holders[0])
    is_short = min(num_zones(made)) < wanted
    assert is_short == any(sentence.startswith("copies in") for sentence in made.unmet), made.unmet
    if is_room:
        assert not is_short
        if wanted > 1:
            assert not any(any(made.lost_with_zone(zone)) for zone in "abc")


@given(changes())
@settings(max_examples=150, deadline=None)
def test_units_are_in_as_many_zones_as_there_is_any_way_for(change: Any) -> None:
    load_LU, before, after, options = change
    first = plan(load_LU, before, **options)
    check(first, before, options["redundancy"])
    check(plan(load_LU, after, **options, previous=first), after, options["redundancy"])
    blind = plan(load_LU, without_zones(after), **options)
    check(plan(load_LU, after, **options, previous=blind), after, options["redundancy"])


@given(changes())
@settings(max_examples=60, deadline=None)
def test_one_zone_is_as_none(change: Any) -> None:
    load_LU, before, after, options = change
    for zone in ("", "a"):
        old, new = ([replace(device, zone=zone) for device in request] for request in (before, after))
        first, expected = plan(load_LU, old, **options), plan(load_LU, without_zones(before), **options)
        assert (first.holders, first.unmet) == (expected.holders, expected.unmet)
        second = plan(load_LU, new, **options, previous=first)
        expected = plan(load_LU, without_zones(after), **options, previous=expected)
        assert (second.holders, second.unmet) == (expected.holders, expected.unmet)


def test_a_zone_may_be_lost_of_free_units_and_of_whole_groups() -> None:
    load_LU = np.random.default_rng(0).pareto(1.5, (6, 32)) + 0.1
    request = devices("a1 a1 a2 a2 b1 b1 b2 b2 c1 c1 c2 c2", slots=8)
    blind = plan(load_LU, without_zones(request), redundancy=2)
    gathered = replace(blind, devices=tuple(request))
    assert any(any(gathered.lost_with_zone(zone)) for zone in "abc"), "nodes alone do not see to it"
    groups = [unit // 4 for unit in range(32)]
    for made in (
        plan(load_LU, request, redundancy=2),
        plan(load_LU, request, redundancy=2, previous=gathered),
        plan(load_LU, request, redundancy=2, group_U=groups),
        plan(load_LU, request, redundancy=2, group_U=groups, previous=gathered),
    ):
        assert made.unmet == ()
        assert not any(any(made.lost_with_zone(zone)) for zone in "abc")
        assert made.mean_balance(load_LU) > 0.8 * blind.mean_balance(load_LU)


def test_two_zones_and_then_different_nodes() -> None:
    made = plan(np.ones((1, 6)), devices("a1 a2 b1 b2", slots=6), redundancy=3, hot_copies=False)
    assert set(num_zones(made)) == {2}
    assert set(num_nodes(made)) == {3}
    assert made.unmet == ()


def test_nodes_of_unknown_zones_are_one_zone_together() -> None:
    request = [Device(f"e{i}", f"n{i}", 4, zone=zone) for i, zone in enumerate(["", "", "a", "a"])]
    made = plan(np.ones((1, 8)), request, redundancy=2, hot_copies=False)
    assert set(num_zones(made)) == {2}


def test_what_zones_have_no_room_for_is_said() -> None:
    request = [*devices("a1 a2", slots=8), Device("e9", "b1", 3, zone="b")]
    made = plan([[1.0] * 8], request, redundancy=2)
    assert sorted(num_zones(made)) == [1] * 5 + [2] * 3
    assert made.unmet == (
        "copies in 2 zones do not fit the slots of the zones: in 1 of 1 layers up to 5 of 8 units are in fewer zones",
    )
    assert min(num_nodes(made)) == 2, "the others are on different nodes at least"


# --- The placement in the beginning ------------------------------------------------------------------------------


def zones_of(placement: Placement, here: list[ActorSlot]) -> list[int]:
    zone_of = {actor.id: actor.zone for actor in here}
    return [len({zone_of[actor] for actor in held if actor in zone_of}) for held in placement.holders]


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[ActorSlot], int, int]:
    nodes = draw(st.lists(st.sampled_from(["a1", "a2", "b1", "b2", "c1"]), min_size=1, max_size=8))
    most = min(4, len(set(nodes)))
    return actors(" ".join(nodes)), draw(st.integers(1, most)), draw(st.integers(len(nodes), 20))


@given(fleets())
@settings(max_examples=150, deadline=None)
def test_the_first_placement_is_in_as_many_zones_as_there_are(fleet: tuple[list[ActorSlot], int, int]) -> None:
    here, redundancy, num_groups = fleet
    placement = spread(num_groups, 1, here, redundancy)
    node_of = {actor.id: actor.node for actor in here}
    assert all(len({node_of[actor] for actor in held}) == len(held) == redundancy for held in placement.holders)
    assert set(zones_of(placement, here)) == {min(redundancy, len({actor.zone for actor in here}))}


def test_the_other_zones_share_the_copies_of_a_node() -> None:
    here = actors("a1 a2 b1 b2 c1 c2")
    placement = spread(24, 1, here, 2)
    held = [len(placement.held_by(actor.id)) for actor in here]
    assert held == [8] * 6
    for lost in "abc":
        after = placement.without({actor.id for actor in here if actor.zone == lost})
        assert after.missing == ()


# --- Changes of the cluster --------------------------------------------------------------------------------------


def asked(placement: Placement, here: list[ActorSlot], redundancy: int = 2, max_groups: int = 0) -> Proposal:
    load_LE = [[1] * placement.num_experts]
    return propose(placement, load_LE, here, 100, redundancy=redundancy, max_groups=max_groups)


def test_copies_in_one_zone_are_worth_moving_apart() -> None:
    here = actors("a1 a2 b1 b2")
    level = Placement(1, (("e0", "e1"), ("e1", "e0"), ("e2", "e3"), ("e3", "e2")), 1)
    assert set(zones_of(level, here)) == {1}
    found = asked(level, here)
    assert found.balance_before == 1.0
    assert set(zones_of(found.target, here)) == {2}
    assert found.balance_after == 1.0
    assert found.unmet == ()
    assert asked(found.target, here).stages == ()


def test_a_zone_is_lost_and_comes_back() -> None:
    here = actors("a1 a2 b1 b2")
    placement = spread(8, 1, here, 2)
    rest = [actor for actor in here if actor.zone == "b"]
    alive = placement.without({actor.id for actor in here if actor.zone == "a"})
    assert alive.missing == ()
    healed = asked(alive, rest)
    assert healed.unmet == ()
    assert set(zones_of(healed.target, rest)) == {1}
    back = [*rest, ActorSlot("e4", "a1", "a"), ActorSlot("e5", "a2", "a")]
    again = asked(healed.target, back)
    assert set(zones_of(again.target, back)) == {2}
    for before, after in pairwise([healed.target, *(stage.placement for stage in again.stages)]):
        assert all(set(old) & set(new) for old, new in zip(before.holders, after.holders, strict=True))


def test_a_small_zone_holds_what_redundancy_needs_of_it() -> None:
    here = actors("a1 a2 a3 b1")
    found = asked(spread(8, 1, here[:3], 2), here)
    assert set(zones_of(found.target, here)) == {2}
    assert len(found.target.held_by("e3")) == 8


def test_zones_that_have_no_room_are_said() -> None:
    here = actors("a1 a2 a3 b1")
    found = asked(spread(8, 1, here[:3], 2), here, max_groups=6)
    zones = zones_of(found.target, here)
    assert sorted(zones) == [1] * 2 + [2] * 6
    groups = ", ".join(str(group) for group, number in enumerate(zones) if number < 2)
    assert found.unmet == (f"copies of groups {groups} in 2 zones: an actor may hold 6 groups at most",)


@pytest.mark.parametrize("newest", ["e2", "e3"])
def test_the_last_actor_of_a_zone_stays_where_another_can_go(newest: str) -> None:
    here = [ActorSlot("e0", "n0", "a"), ActorSlot("e1", "n1", "a")]
    here += [
        ActorSlot("e2", "n2", "b" if newest == "e2" else "a"),
        ActorSlot("e3", "n3", "a" if newest == "e2" else "b"),
    ]
    (gone,) = actors_to_remove(spread(8, 1, here, 2), here, 3, 2)
    assert next(actor.zone for actor in here if actor.id == gone) == "a"
