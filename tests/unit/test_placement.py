from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import InvalidInput
from cluster.placement.placement import ActorSlot, Placement, spread


def slots(*nodes: str) -> list[ActorSlot]:
    return [ActorSlot(f"e{i}", node) for i, node in enumerate(nodes)]


@pytest.mark.parametrize(
    ("num_experts", "group_size", "num_actors", "owners"),
    [
        (32, 8, 1, "e0 e0 e0 e0"),
        (32, 8, 2, "e0 e0 e1 e1"),
        (32, 8, 3, "e0 e0 e1 e2"),
        (32, 8, 4, "e0 e1 e2 e3"),
        (10, 2, 3, "e0 e0 e1 e1 e2"),
    ],
)
def test_groups_are_contiguous_and_even(num_experts: int, group_size: int, num_actors: int, owners: str) -> None:
    assert spread(num_experts, group_size, slots(*"a" * num_actors)).owners == tuple(owners.split())


def test_a_nodes_actors_own_neighbouring_groups() -> None:
    assert spread(8, 2, slots("a", "b", "a", "b")).owners == ("e0", "e2", "e1", "e3")


@given(st.integers(1, 8), st.integers(1, 40), st.lists(st.sampled_from("abc"), min_size=1, max_size=40))
def test_every_expert_has_one_owner_and_every_actor_a_fair_share(
    group_size: int, num_groups: int, nodes: list[str]
) -> None:
    actors = slots(*nodes[:num_groups])
    placement = spread(group_size * num_groups, group_size, actors)
    shares = [len(placement.groups_of(actor.id)) for actor in actors]
    assert sum(shares) == num_groups
    assert max(shares) - min(shares) <= 1
    assert min(shares) >= 1
    experts = [expert for actor in actors for expert in placement.experts_of(actor.id)]
    assert sorted(experts) == list(range(placement.num_experts))
    assert all(expert in placement.experts_of(placement.owner_of_expert(expert)) for expert in experts)
    node_of = {actor.id: actor.node for actor in actors}
    runs = [node for node, _ in itertools.groupby(node_of[owner] for owner in placement.owners)]
    assert len(runs) == len(set(runs)), "a node's groups are contiguous"


def test_helpers() -> None:
    placement = Placement(epoch=3, owners=("a", "b", "a"), group_size=2)
    assert placement.groups_of("a") == (0, 2)
    assert placement.groups_of("nobody") == ()
    assert placement.experts_of_group(1) == range(2, 4)
    assert placement.experts_of("a") == (0, 1, 4, 5)
    assert [placement.owner_of_expert(expert) for expert in range(6)] == list("aabbaa")
    assert (placement.num_groups, placement.num_experts, placement.actors) == (3, 6, ("a", "b"))
    with pytest.raises(IndexError):
        placement.owner_of_expert(6)
    with pytest.raises(IndexError):
        placement.experts_of_group(-1)


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
