"""From load, actors and redundancy to stages of copies: what is proposed, what it brings, and the way there."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.backend import GroupMove, Rebalance
from cluster.control.load import LoadLE, group_load
from cluster.control.rebalancing import Proposal, Stage, propose
from cluster.errors import FailedPrecondition
from cluster.placement.placement import ActorSlot, spread

EVEN = Placement(epoch=3, holders=(("a",), ("a",), ("b",), ("b",)), group_size=2)
AB = (ActorSlot("a", "n1"), ActorSlot("b", "n2"))
LOAD_16 = [[67, 131, 114, 141, 100, 110, 147, 122, 113, 104, 105, 143, 77, 131, 117, 50]]


def slots(count: int) -> list[ActorSlot]:
    return [ActorSlot(f"e{i}", f"n{i}") for i in range(count)]


def asked(
    placement: Placement, load_LE: LoadLE, actors: Sequence[ActorSlot], redundancy: int = 1, max_groups: int = 0
) -> Proposal:
    return propose(placement, load_LE, actors, 100, redundancy=redundancy, max_groups=max_groups)


def pairs(moves: Sequence[GroupMove]) -> set[tuple[str, str]]:
    return {(move.source, move.target) for move in moves}


def num_nodes(placement: Placement, actors: Sequence[ActorSlot]) -> list[int]:
    """Nodes that hold each group."""
    node_of = {actor.id: actor.node for actor in actors}
    return [len({node_of[actor] for actor in held}) for held in placement.holders]


def num_held(placement: Placement) -> list[int]:
    return [len(placement.held_by(actor)) for actor in placement.actors]


def carry_out(placement: Placement, stages: Sequence[Stage], target: Placement, most: int) -> None:
    """Makes the stages as the edge does, and complains where one breaks a promise."""
    least = [min(len(old), len(new)) for old, new in zip(placement.holders, target.holders, strict=True)]
    for stage in stages:
        assert stage.placement.epoch == placement.epoch + 1
        held = [set(actors) for actors in placement.holders]
        for copy in stage.copies:
            assert copy.source in placement.holders[copy.group], "a source holds the group before the stage"
            assert copy.target not in held[copy.group]
            keeps = copy.source in stage.placement.holders[copy.group]
            assert copy.kind == ("copy" if keeps else "move")
            held[copy.group].add(copy.target)
        for actor in {copy.target for copy in stage.copies}:
            assert sum(actor in actors for actors in held) <= most + 1
        for now, after, fewest in zip(held, stage.placement.holders, least, strict=True):
            assert set(after) <= now, "nobody holds what it did not get"
            assert len(after) == len(set(after)) >= max(fewest, 1)
        placement = stage.placement
    assert placement == target


def test_load_of_groups_is_summed_over_layers_and_experts() -> None:
    assert group_load([[1, 2, 3, 4, 5, 6, 7, 8], [10, 0, 0, 0, 0, 0, 0, 1]], EVEN) == [13, 7, 11, 16]


def test_two_hot_groups_on_one_actor_are_parted() -> None:
    found = asked(EVEN, [[40, 40, 40, 40, 10, 10, 10, 10]], AB, max_groups=2)
    assert found.balance_before == pytest.approx(100 / 160)
    assert found.balance_after == 1
    assert pairs(found.moves) == {("a", "b"), ("b", "a")}
    assert all((move.num_bytes, move.kind) == (100, "move") for move in found.moves)
    (stage,) = found.stages
    assert (stage.placement, stage.placement.epoch, found.message, found.unmet) == (found.target, 4, "", ())
    carry_out(EVEN, found.stages, found.target, most=2)


def test_an_even_load_moves_nothing_and_says_so() -> None:
    found = asked(EVEN, [[5] * 8], AB)
    assert (found.stages, found.moves, found.target) == ((), (), EVEN)
    assert "no move of groups" in found.message


@pytest.mark.parametrize("load_LE", [[[0] * 8], ()])
def test_without_load_there_is_nothing_to_go_by(load_LE: LoadLE) -> None:
    with pytest.raises(FailedPrecondition, match="no load"):
        asked(EVEN, load_LE, AB)


def test_the_report_for_clients() -> None:
    found = asked(EVEN, [[40, 40, 40, 40, 10, 10, 10, 10]], AB, max_groups=2)
    assert found.report(4, done=True, stall_s=0.5) == Rebalance(
        found.moves, found.balance_before, 1.0, 4, True, "", (), stall_s=0.5
    )


# --- Actors come, go and die --------------------------------------------------------------------------------------


@pytest.mark.parametrize("redundancy", [1, 2])
@pytest.mark.parametrize("load_LE", [(), LOAD_16], ids=["no load", "load"])
@pytest.mark.parametrize("sizes", [(2, 3, 2), (4, 8, 6)], ids=str)
def test_scaling_up_and_down(sizes: tuple[int, ...], load_LE: LoadLE, redundancy: int) -> None:
    placement = spread(16, 1, slots(sizes[0]), redundancy)
    for size in sizes[1:]:
        found = asked(placement, load_LE, slots(size), redundancy)
        needed = 16 * redundancy // size + 1
        carry_out(placement, found.stages, found.target, most=needed + 1)
        assert set(found.target.actors) == {actor.id for actor in slots(size)}, "new ones hold some, others nothing"
        assert min(num_nodes(found.target, slots(size))) >= redundancy
        assert max(num_held(found.target)) <= needed + 1
        assert found.balance_after > 0.85
        if not load_LE:
            assert len(found.moves) <= needed * abs(size - len(placement.actors)), "no more than comes or goes"
            assert all(len(held) == redundancy for held in found.target.holders), "no copies on suspicion"
        placement = found.target


@pytest.mark.parametrize("load_LE", [(), LOAD_16], ids=["no load", "load"])
def test_missing_copies_are_made_after_a_death(load_LE: LoadLE) -> None:
    before = spread(16, 1, slots(4), 2)
    after = before.without({"e1"})
    alive = [actor for actor in slots(4) if actor.id != "e1"]
    found = asked(after, load_LE, alive, redundancy=2)
    carry_out(after, found.stages, found.target, most=12)
    assert min(num_nodes(after, alive)) == 1
    assert min(num_nodes(found.target, alive)) == 2
    assert found.unmet == ()
    assert {move.group for move in found.moves} >= set(before.held_by("e1"))


def test_copies_are_made_even_where_no_load_is_evened_out_by_them() -> None:
    alone = Placement(7, (("a",), ("b",)), 1)
    found = asked(alone, [[5, 5]], AB, redundancy=2)
    assert found.balance_before == found.balance_after == 1
    assert found.moves == (GroupMove(0, "a", "b", 100, "copy"), GroupMove(1, "b", "a", 100, "copy"))
    assert found.target == Placement(8, (("a", "b"), ("b", "a")), 1)


def test_the_last_copy_leaves_an_actor_that_is_to_go() -> None:
    placement = Placement(1, (("a", "b"), ("a",), ("b", "a")), 1)
    found = asked(placement, (), [AB[1]])
    assert found.moves == (GroupMove(1, "a", "b", 100, "move"),), "ownership alone is no move"
    assert found.target.holders == (("b",), ("b",), ("b",))


def test_redundancy_that_cannot_be_had_is_said() -> None:
    placement = Placement(1, (("a",), ("b",)), 1)
    found = asked(placement, [[9, 1]], [ActorSlot("a", "n"), ActorSlot("b", "n")], redundancy=2)
    assert found.unmet == ("redundancy 2 of groups 0, 1: the expert actors are on 1 node",)
    found = asked(Placement(1, (("a", "b"), ("b",), ("a",)), 1), [[9, 9, 9]], AB, redundancy=2, max_groups=2)
    assert found.unmet == ("redundancy 2 of groups 1, 2: an actor may hold 2 groups at most",)
    assert found.stages == ()


def test_a_small_node_holds_what_redundancy_needs_of_it() -> None:
    actors = [ActorSlot("a", "n1"), ActorSlot("b", "n1"), ActorSlot("c", "n1"), ActorSlot("d", "n2")]
    placement = spread(8, 1, actors, 2)
    found = asked(placement, [[9, 1, 1, 9, 1, 9, 1, 1]], actors, redundancy=2)
    assert found.unmet == ()
    assert len(found.target.held_by("d")) == 8


# --- Hot groups ---------------------------------------------------------------------------------------------------


def test_a_hot_group_gets_copies_where_there_is_room() -> None:
    placement = spread(8, 1, slots(4))
    load_LE = [[1000, 10, 10, 10, 10, 10, 10, 10]]
    found = asked(placement, load_LE, slots(4))
    assert len(found.target.holders[0]) == 4
    assert found.balance_after > 0.9 > 2 * found.balance_before
    carry_out(placement, found.stages, found.target, most=3)
    tight = asked(placement, load_LE, slots(4), max_groups=2)
    assert all(len(held) == 1 for held in tight.target.holders), "no room"


def test_redundancy_comes_before_copies_of_hot_groups() -> None:
    placement = spread(8, 1, slots(4))
    found = asked(placement, [[1000, 10, 10, 10, 10, 10, 10, 10]], slots(4), redundancy=2)
    assert min(num_nodes(found.target, slots(4))) == 2
    assert len(found.target.holders[0]) == 4
    full = asked(placement, [[1000, 10, 10, 10, 10, 10, 10, 10]], slots(4), redundancy=2, max_groups=4)
    assert num_nodes(full.target, slots(4)) == [2] * 8


# --- What cannot be -----------------------------------------------------------------------------------------------


def test_a_lost_group_is_in_the_way() -> None:
    with pytest.raises(FailedPrecondition, match="no actor holds groups 0, 1 any more"):
        asked(EVEN.without({"a"}), (), [AB[1]])


def test_actors_without_room() -> None:
    with pytest.raises(
        InvalidInput, match=r"max_groups: the actors that stay have no room for 4 .* \(got 3\); use 4 or more"
    ):
        asked(EVEN, (), AB[:1], max_groups=3)
    with pytest.raises(InvalidInput, match="no expert actor left"):
        asked(EVEN, (), ())


# --- Any change ---------------------------------------------------------------------------------------------------

NAMES = "abcdef"


@st.composite
def changes(draw: st.DrawFn) -> tuple[Placement, list[ActorSlot], LoadLE, int, int]:
    """Any placement at all, onto any actors."""
    num_groups = draw(st.integers(1, 10))
    held = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True).map(tuple)
    placement = Placement(5, tuple(draw(held) for _ in range(num_groups)), 1)
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    actors = [ActorSlot(name, f"n{draw(st.integers(0, 3))}") for name in names]
    loads = st.lists(st.sampled_from([0, 1, 5, 40]), min_size=num_groups, max_size=num_groups)
    load_LE = [draw(loads)]
    needed = -(-num_groups // len(actors))
    return placement, actors, load_LE, draw(st.integers(1, 3)), draw(st.sampled_from([0, needed, needed + 2]))


@given(changes())
@settings(max_examples=200, deadline=None)
def test_every_change_keeps_its_promises_on_the_way(
    change: tuple[Placement, list[ActorSlot], LoadLE, int, int],
) -> None:
    placement, actors, load_LE, redundancy, max_groups = change
    try:
        found = asked(placement, load_LE, actors, redundancy, max_groups)
    except FailedPrecondition:
        assert not sum(load_LE[0])
        return
    nodes = len({actor.node for actor in actors})
    most = max_groups or placement.num_groups + 1
    carry_out(placement, found.stages, found.target, most)
    assert bool(found.stages) != bool(found.message)
    assert set(found.target.actors) <= {actor.id for actor in actors}
    assert max(num_held(found.target)) <= most
    on_nodes = num_nodes(found.target, actors)
    assert bool(found.unmet) == (min(on_nodes) < redundancy)
    if not max_groups:
        assert min(on_nodes) >= min(redundancy, nodes), "there is always room by default"
    assert found == asked(placement, load_LE, actors, redundancy, max_groups), "deterministic"
