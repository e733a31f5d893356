from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.placement.placement import ActorSlot, spread


def slots(*nodes: str) -> list[ActorSlot]:
    return [ActorSlot(f"e{i}", node) for i, node in enumerate(nodes)]


def owners(placement: Placement) -> tuple[str, ...]:
    return tuple(placement.owner(group) for group in range(placement.num_groups))


def num_held(placement: Placement) -> Counter[str]:
    return Counter(actor for held in placement.holders for actor in held)


@pytest.mark.parametrize(
    ("num_experts", "group_size", "num_actors", "expected"),
    [
        (32, 8, 1, "e0 e0 e0 e0"),
        (32, 8, 2, "e0 e0 e1 e1"),
        (32, 8, 3, "e0 e0 e1 e2"),
        (32, 8, 4, "e0 e1 e2 e3"),
        (10, 2, 3, "e0 e0 e1 e1 e2"),
    ],
)
def test_groups_are_contiguous_and_even(num_experts: int, group_size: int, num_actors: int, expected: str) -> None:
    assert owners(spread(num_experts, group_size, slots(*"a" * num_actors))) == tuple(expected.split())


def test_a_nodes_actors_own_neighbouring_groups() -> None:
    assert owners(spread(8, 2, slots("a", "b", "a", "b"))) == ("e0", "e2", "e1", "e3")


@given(st.integers(1, 8), st.integers(1, 40), st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.data())
def test_every_group_has_one_owner_and_every_actor_a_fair_share(
    group_size: int, num_groups: int, nodes: list[str], data: st.DataObject
) -> None:
    actors = slots(*nodes[:num_groups])
    node_of = {actor.id: actor.node for actor in actors}
    redundancy = data.draw(st.integers(1, len(set(node_of.values()))))
    placement = spread(group_size * num_groups, group_size, actors, redundancy)
    shares = [len(placement.owned_by(actor.id)) for actor in actors]
    assert sum(shares) == num_groups
    assert max(shares) - min(shares) <= 1
    assert min(shares) >= 1
    assert placement.num_experts == group_size * num_groups
    runs = [node for node, _ in itertools.groupby(node_of[owner] for owner in owners(placement))]
    assert len(runs) == len(set(runs)), "a node's groups are contiguous"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 5), st.integers(0, 12))
def test_copies_are_on_different_nodes_and_as_even_as_these_allow(
    sizes: list[int], redundancy: int, more_groups: int
) -> None:
    redundancy = min(redundancy, len(sizes))
    actors = slots(*(f"n{node}" for node, size in enumerate(sizes) for _ in range(size)))
    node_of = {actor.id: actor.node for actor in actors}
    placement = spread(len(actors) + more_groups, 1, actors, redundancy)
    assert placement == spread(len(actors) + more_groups, 1, actors, redundancy), "deterministic"
    for held in placement.holders:
        assert len({node_of[actor] for actor in held}) == len(held) == redundancy
    count = num_held(placement)
    assert min(count.values()) >= 1
    # No copy could go from an actor to one that holds two less.
    for held in placement.holders:
        for copy in held[1:]:
            taken = {node_of[actor] for actor in held if actor != copy}
            assert all(count[copy] - count[actor.id] <= 1 for actor in actors if actor.node not in taken)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(0, 30))
def test_on_nodes_of_one_size_no_actor_holds_two_groups_more_than_another(
    num_nodes: int, size: int, redundancy: int, more_groups: int
) -> None:
    actors = slots(*(f"n{node}" for node in range(num_nodes) for _ in range(size)))
    placement = spread(len(actors) + more_groups, 1, actors, min(redundancy, num_nodes))
    count = num_held(placement)
    assert max(count.values()) - min(count.values()) <= 1


def test_the_others_share_the_work_of_a_node_that_dies() -> None:
    placement = spread(12, 1, slots(*"abcd"), 2)
    for dead in ("e0", "e1", "e2", "e3"):
        after = placement.without({dead})
        assert after.missing == ()
        assert sorted(len(after.owned_by(actor)) for actor in num_held(after)) == [4, 4, 4]


def test_a_placement_with_copies() -> None:
    placement = Placement(epoch=3, holders=(("a", "b"), ("b", "c"), ("a",)), group_size=2)
    assert (placement.owned_by("a"), placement.held_by("b"), placement.held_by("nobody")) == ((0, 2), (0, 1), ())
    assert placement.experts_of_group(1) == range(2, 4)
    assert (placement.num_groups, placement.num_experts, placement.actors) == (3, 6, ("a", "b", "c"))
    assert (placement.has_copies, placement.missing) == (True, ())
    with pytest.raises(IndexError):
        placement.experts_of_group(-1)
    after = placement.without({"a"})
    assert after == Placement(4, (("b",), ("b", "c"), ()), 2)
    assert (after.missing, after.owner(2), after.actors) == ((2,), "", ("b", "c"))


@pytest.mark.parametrize(
    ("num_experts", "group_size", "actors", "message"),
    [
        (10, 4, slots("a"), r"group_size: does not divide the model's 10 experts \(got 4\); use one of 1, 2, 5, 10"),
        (8, 16, slots("a"), r"group_size: does not divide"),
        (8, 0, slots("a"), r"group_size: is below 1 \(got 0\)"),
        (0, 4, slots("a"), r"no routed experts"),
        (32, 8, slots(*"aaaaa"), r"actors: more actors than the 4 expert groups \(got 5\); use at most 4"),
        (32, 8, [], r"there is no expert actor"),
        (32, 8, [ActorSlot("e", "a"), ActorSlot("e", "b")], r"named twice"),
    ],
)
def test_what_cannot_be_placed(num_experts: int, group_size: int, actors: list[ActorSlot], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        spread(num_experts, group_size, actors)


@pytest.mark.parametrize(
    ("redundancy", "message"),
    [
        (0, r"experts\.redundancy: is below 1 \(got 0\); use 1 or more"),
        (3, r"experts\.redundancy: .* actors are on 2 \(got 3\); use at most 2, or put the actors on 3 nodes or more"),
    ],
)
def test_copies_that_cannot_be_placed(redundancy: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        spread(8, 2, slots("a", "b", "b"), redundancy)
