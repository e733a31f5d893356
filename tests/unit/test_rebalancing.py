"""From load to moves: what is proposed, and what it would bring."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control.load import LoadLE, group_load
from cluster.control.rebalancing import moved, propose
from cluster.errors import FailedPrecondition
from cluster.placement.placement import Placement

EVEN = Placement(epoch=3, owners=("a", "a", "b", "b"), group_size=2)
NODES = {"a": "node-1", "b": "node-2"}


def test_load_of_groups_is_summed_over_layers_and_experts() -> None:
    assert group_load([[1, 2, 3, 4, 5, 6, 7, 8], [10, 0, 0, 0, 0, 0, 0, 1]], EVEN) == [13, 7, 11, 16]


def test_two_hot_groups_on_one_actor_are_parted() -> None:
    found = propose(EVEN, [[40, 40, 40, 40, 10, 10, 10, 10]], NODES, group_bytes=100)
    assert found.balance_before == pytest.approx(100 / 160)
    assert found.balance_after == 1
    assert {(m.source, m.target) for m in found.moves} == {("a", "b"), ("b", "a")}
    assert all(m.num_bytes == 100 for m in found.moves)
    assert (found.done, found.placement_epoch, found.message) == (False, 3, "")


def test_an_even_load_moves_nothing_and_says_so() -> None:
    found = propose(EVEN, [[5] * 8], NODES, group_bytes=100)
    assert found.moves == ()
    assert "no exchange" in found.message


@pytest.mark.parametrize("load_LE", [[[0] * 8], ()])
def test_without_load_there_is_nothing_to_go_by(load_LE: LoadLE) -> None:
    with pytest.raises(FailedPrecondition, match="no load"):
        propose(EVEN, load_LE, NODES, group_bytes=100)


@given(
    owners=st.lists(st.sampled_from("abc"), min_size=3, max_size=12).filter(lambda o: len(set(o)) == 3),
    data=st.data(),
)
def test_moves_lead_to_a_placement_that_is_never_worse(owners: list[str], data: st.DataObject) -> None:
    placement = Placement(1, tuple(owners), 1)
    load_E = data.draw(st.lists(st.integers(0, 1000), min_size=len(owners), max_size=len(owners)).filter(sum))
    found = propose(placement, [load_E], {}, group_bytes=1)
    assert found.balance_after >= found.balance_before - 1e-12
    for move in found.moves:
        assert placement.owners[move.group] == move.source
        placement = moved(placement, move)
        assert placement.owners[move.group] == move.target
    assert placement.epoch == 1 + len(found.moves)
    assert sorted(placement.owners) == sorted(owners), "every actor keeps its number of groups"
    loads = [sum(load for load, owner in zip(load_E, placement.owners, strict=True) if owner == a) for a in "abc"]
    assert found.balance_after == pytest.approx(sum(load_E) / 3 / max(loads))
