"""Deaths while the holders of expert groups change: what is left is the better of what was there and what has come."""

from __future__ import annotations

import pytest

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.backend import ActorStatus
from cluster.control.fleet import Fleet

ALONE = Placement(5, (("e0",), ("e1",)), 2)
COPIED = Placement(6, (("e0", "e2"), ("e1", "e2")), 2)
MOVED = Placement(6, (("e2",), ("e1",)), 2)


def switching(before: Placement, after: Placement) -> Fleet:
    fleet = Fleet(before, 10.0)
    for name in ("e0", "e1", "e2"):
        fleet.members.seen(ActorStatus(name, "expert", "n0", 1, "ready", device="cpu", version=0), 0.0)
    fleet.begin_switch(after)
    return fleet


def test_what_has_come_counts_when_everybody_uses_it() -> None:
    fleet = switching(ALONE, COPIED)
    assert (fleet.placement, fleet.is_switching) == (COPIED, True)
    assert (fleet.groups_below(2), fleet.scarce_groups(2)) == ([], [0, 1])
    assert [actor.groups for actor in fleet.members.all()] == [(0,), (1,), (0, 1)]
    fleet.end_switch(COPIED)
    assert (fleet.placement, fleet.is_switching, fleet.scarce_groups(2)) == (COPIED, False, [])


def test_a_group_that_moves_is_not_scarce() -> None:
    assert switching(ALONE, MOVED).scarce_groups(1) == []


def test_a_switch_is_taken_back_as_a_newer_placement() -> None:
    fleet = switching(ALONE, COPIED)
    fleet.take_back()
    assert (fleet.placement, fleet.is_switching) == (Placement(7, ALONE.holders, 2), False)
    fleet.take_back()
    assert fleet.placement.epoch == 7, "once"


def test_who_had_the_only_copy_dies_and_what_has_come_goes_on() -> None:
    fleet = switching(ALONE, COPIED)
    assert fleet.lose("e0")
    assert fleet.placement == Placement(7, (("e2",), ("e1", "e2")), 2)
    fleet.end_switch(fleet.placement)
    assert fleet.placement.epoch == 7
    assert not fleet.placement.missing


def test_what_had_not_wholly_come_is_lost_with_its_only_holder() -> None:
    fleet = switching(ALONE, COPIED)
    fleet.lose("e0")
    fleet.take_back()
    assert fleet.placement == Placement(8, ((), ("e1",)), 2)


def test_who_was_to_have_a_group_dies_and_who_has_it_keeps_it() -> None:
    fleet = switching(ALONE, MOVED)
    assert fleet.lose("e2")
    assert fleet.placement == Placement(7, ALONE.holders, 2)
    fleet.end_switch(fleet.placement)
    assert (fleet.placement.epoch, fleet.placement.missing) == (7, ())


def test_who_was_to_have_a_group_dies_when_nobody_else_keeps_it() -> None:
    """Everybody used the new placement already."""
    fleet = switching(ALONE, MOVED)
    fleet.lose("e2")
    fleet.end_switch(MOVED)
    assert fleet.placement == Placement(8, ((), ("e1",)), 2)


def test_who_leaves_dies_before_it_has_left() -> None:
    """It is in the placement before alone, and taking that back must not bring it back."""
    fleet = switching(ALONE, MOVED)
    assert fleet.lose("e0")
    assert fleet.placement == Placement(7, MOVED.holders, 2)
    fleet.take_back()
    assert fleet.placement == Placement(8, ((), ("e1",)), 2)


def test_all_who_die_are_in_neither_placement() -> None:
    fleet = switching(ALONE, COPIED)
    fleet.lose("e0")
    fleet.lose("e2")
    assert fleet.placement == Placement(8, ((), ("e1",)), 2)
    fleet.take_back()
    assert fleet.placement == Placement(9, ((), ("e1",)), 2)


@pytest.mark.parametrize("is_under_way", [True, False])
def test_who_holds_nothing_changes_nothing(is_under_way: bool) -> None:
    fleet = switching(ALONE, COPIED)
    if not is_under_way:
        fleet.end_switch(COPIED)
    assert not fleet.lose("e9")
    assert (fleet.placement, fleet.is_switching) == (COPIED, is_under_way)


def test_a_placement_that_is_not_newer_begins_no_switch() -> None:
    fleet = switching(ALONE, COPIED)
    fleet.end_switch(COPIED)
    with pytest.raises(InvalidInput, match="is not newer"):
        fleet.begin_switch(MOVED)
    assert (fleet.placement, fleet.is_switching) == (COPIED, False)
