"""Who keeps whose snapshot."""

from __future__ import annotations

from collections import Counter

import pytest

from cluster.placement.peers import peers
from cluster.placement.placement import ActorSlot


def slots(nodes: str) -> list[ActorSlot]:
    """`aab`: actors 0 and 1 on node a, 2 on node b."""
    return [ActorSlot(f"e{i}", node) for i, node in enumerate(nodes)]


def kept_by(nodes: str) -> dict[str, str]:
    actors = slots(nodes)
    return {part: keeper.id for part, keeper in peers(actors, actors).items() if keeper is not None}


def test_a_ring_where_all_are_alike() -> None:
    assert kept_by("abcd") == {"e0": "e1", "e1": "e2", "e2": "e3", "e3": "e0"}


@pytest.mark.parametrize("nodes", ["aabb", "aaabbb", "abab", "aabbcc", "abcabc"])
def test_on_another_node_and_no_keeper_has_two(nodes: str) -> None:
    node_of = {actor.id: actor.node for actor in slots(nodes)}
    found = kept_by(nodes)
    assert len(found) == len(nodes)
    assert all(node_of[part] != node_of[keeper] for part, keeper in found.items())
    assert max(Counter(found.values()).values()) == 1


def test_one_node_is_better_than_nothing() -> None:
    assert kept_by("aa") == {"e0": "e1", "e1": "e0"}
    assert kept_by("a") == {}


def test_a_crowded_node_is_kept_elsewhere_all_the_same() -> None:
    assert kept_by("aaab") == {"e0": "e3", "e1": "e3", "e2": "e3", "e3": "e0"}


def test_who_writes_need_not_keep() -> None:
    (found,) = peers([ActorSlot("router-0", "head")], slots("ab")).values()
    assert found == ActorSlot("e0", "a")
