"""Deaths while the holders of expert groups change: what is left is the better of what was there and what has come."""

from __future__ import annotations

import pytest

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.backend import ActorStatus
from cluster.control.fleet import Fleet
from cluster.errors import FailedPrecondition

ALONE = Placement(5, (("e0",), ("e1",)), 2)
COPIED = Placement(6, (("e0", "e2"), ("e1", "e2")), 2)
MOVED = Placement(6, (("e2",), ("e1",)), 2)


def begun(before: Placement, after: Placement) -> Fleet:
    fleet = Fleet(before, 10.0)
    for name in ("e0", "e1", "e2"):
        fleet.members.seen(ActorStatus(name, "expert", "n0", 1, "ready", device="cpu", version=0), 0.0)
    fleet.begin_switch(after)
    return fleet


def switching(before: Placement, after: Placement) -> Fleet:
    """All copies have come, and everybody is being told."""
    fleet = begun(before, after)
    for group, held in enumerate(after.holders):
        for actor in set(held) - set(before.holders[group]):
            fleet.came(group, actor)
    fleet.switch()
    return fleet


def test_what_has_come_counts_when_everybody_uses_it() -> None:
    fleet = begun(ALONE, COPIED)
    assert (fleet.placement, fleet.is_unsettled) == (ALONE, False)
    fleet = switching(ALONE, COPIED)
    assert (fleet.placement, fleet.is_unsettled) == (COPIED, True)
    assert (fleet.groups_below(2), fleet.scarce_groups(2)) == ([], [0, 1])
    assert [actor.groups for actor in fleet.members.all()] == [(0,), (1,), (0, 1)]
    fleet.in_use(ALONE)
    assert fleet.is_unsettled, "the router is still to be told"
    fleet.in_use(COPIED)
    assert (fleet.placement, fleet.is_unsettled, fleet.scarce_groups(2)) == (COPIED, False, [])


def test_a_group_that_moves_is_not_scarce() -> None:
    assert switching(ALONE, MOVED).scarce_groups(1) == []


def test_a_change_is_taken_back_as_a_newer_placement() -> None:
    fleet = switching(ALONE, COPIED)
    fleet.take_back()
    assert (fleet.placement, fleet.is_unsettled) == (Placement(7, ALONE.holders, 2), False)
    fleet.take_back()
    assert fleet.placement.epoch == 7, "once"


def test_a_change_that_nobody_was_told_of_leaves_no_trace() -> None:
    fleet = begun(ALONE, COPIED)
    fleet.came(0, "e2")
    fleet.take_back()
    assert fleet.placement == ALONE
    fleet.lose("e0")
    assert fleet.placement == Placement(6, ((), ("e1",)), 2), "what came was given up"


@pytest.mark.parametrize("is_told", [True, False])
def test_who_had_the_only_copy_dies_and_what_has_come_goes_on(is_told: bool) -> None:
    fleet = switching(ALONE, COPIED) if is_told else begun(ALONE, COPIED)
    fleet.came(0, "e2")
    assert fleet.lose("e0")
    epoch = 7 if is_told else 6
    assert fleet.placement == Placement(epoch, (("e2",), ("e1",)), 2)
    fleet.in_use(fleet.placement)
    assert (fleet.placement.epoch, fleet.placement.missing, fleet.is_unsettled) == (epoch, (), False)


def test_what_has_not_come_is_lost_with_its_only_holder() -> None:
    fleet = begun(ALONE, COPIED)
    fleet.came(1, "e2")
    fleet.lose("e0")
    assert fleet.placement.missing == (0,)


def test_what_had_not_wholly_come_is_lost_with_its_only_holder() -> None:
    fleet = switching(ALONE, COPIED)
    fleet.lose("e0")
    fleet.take_back()
    assert fleet.placement == Placement(8, ((), ("e1",)), 2)


def test_a_copy_that_is_part_of_every_commit_comes_before_one_that_has_come() -> None:
    """The last update of who died may not have reached what follows it."""
    before = Placement(5, (("e0", "e1"),), 2)
    fleet = switching(before, Placement(6, (("e2", "e0"),), 2))
    fleet.lose("e0")
    assert fleet.placement.holders == (("e1",),)


def test_two_groups_that_move_away_from_who_dies_and_to_it() -> None:
    before = Placement(5, (("e0",), ("e1",)), 2)
    fleet = switching(before, Placement(6, (("e1",), ("e2",)), 2))
    fleet.lose("e1")
    assert fleet.placement.holders == (("e0",), ("e2",))


def test_who_was_to_have_a_group_dies_and_who_has_it_keeps_it() -> None:
    fleet = switching(ALONE, MOVED)
    assert fleet.lose("e2")
    assert fleet.placement == Placement(7, ALONE.holders, 2)
    fleet.in_use(fleet.placement)
    assert (fleet.placement.epoch, fleet.placement.missing) == (7, ())


def test_who_was_to_have_a_group_dies_when_nobody_else_keeps_it() -> None:
    """Everybody used the new placement already."""
    fleet = switching(ALONE, MOVED)
    fleet.lose("e2")
    fleet.in_use(MOVED)
    assert fleet.placement == Placement(8, ((), ("e1",)), 2)


def test_who_leaves_dies_before_it_has_left() -> None:
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
        fleet.in_use(COPIED)
    assert not fleet.lose("e9")
    assert (fleet.placement, fleet.is_unsettled) == (COPIED, is_under_way)


@pytest.mark.parametrize("victim", ["e0", "e2"])
def test_nobody_is_told_of_a_placement_with_the_dead(victim: str) -> None:
    fleet = begun(ALONE, MOVED)
    fleet.came(0, "e2")
    fleet.members.bury(victim)
    fleet.lose(victim)
    with pytest.raises(FailedPrecondition, match="died meanwhile"):
        fleet.switch()
    assert fleet.placement.holders == (("e2" if victim == "e0" else "e0",), ("e1",))


def test_nobody_is_told_of_a_placement_with_who_died_before_it_was_begun() -> None:
    fleet = begun(ALONE, COPIED)
    fleet.take_back()
    fleet.members.bury("e2")
    fleet.lose("e2")
    fleet.begin_switch(COPIED)
    with pytest.raises(FailedPrecondition, match="died meanwhile"):
        fleet.switch()


def test_a_placement_that_is_not_newer_begins_no_change() -> None:
    fleet = switching(ALONE, COPIED)
    fleet.in_use(COPIED)
    with pytest.raises(InvalidInput, match="is not newer"):
        fleet.begin_switch(MOVED)
    assert (fleet.placement, fleet.is_unsettled) == (COPIED, False)
