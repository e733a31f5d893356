from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import InvalidInput
from cluster.bench.eplb import balanced_packing, rebalance_experts, replicate_experts
from cluster.bench.planner import SHAPES, _balance, _node_loss, _zone_loss
from cluster.placement.planner import Plan, plan
from cluster.placement.request import Device

torch = pytest.importorskip("torch")


def devices(*nodes: int, slots: int) -> list[Device]:
    """So many devices on each node."""
    places = [f"n{node}" for node, count in enumerate(nodes) for _ in range(count)]
    return [Device(f"e{i}", node, slots) for i, node in enumerate(places)]


def zipf(num_layers: int, num_units: int, alpha: float = 0.8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    load_U = np.arange(1, num_units + 1) ** -alpha
    return np.stack([rng.permutation(load_U) for _ in range(num_layers)])


def groups(num_units: int, size: int) -> list[int]:
    return [unit // size for unit in range(num_units)]


def nodes_of(made: Plan, layer: int, unit: int) -> set[str]:
    return {made.devices[device].node for device in made.holders[layer][unit]}


def moved(old: Plan, new: Plan) -> int:
    return sum(
        len({new.devices[d].actor for d in now} - {old.devices[d].actor for d in before})
        for layer, old_layer in zip(new.holders, old.holders, strict=True)
        for now, before in zip(layer, old_layer, strict=True)
    )


def check(made: Plan) -> None:
    """What holds for every plan."""
    for layer in made.holders:
        assert all(held for held in layer), "every unit has an owner"
        assert all(len(set(held)) == len(held) for held in layer), "no two copies on one device"
        for number, device in enumerate(made.devices):
            assert sum(number in held for held in layer) <= device.slots


@st.composite
def requests(draw: st.DrawFn) -> tuple[np.ndarray, list[Device], dict[str, Any]]:
    """Uneven in every way: nodes, slots, speeds, groups."""
    num_units = draw(st.integers(1, 14))
    num_devices = draw(st.integers(1, 7))
    made = [
        Device(
            f"e{i}",
            f"n{draw(st.integers(0, 2))}",
            draw(st.integers(0, 6)),
            draw(st.sampled_from([1.0, 1.0, 0.5, 2.0])),
        )
        for i in range(num_devices)
    ]
    short = max(0, num_units - sum(device.slots for device in made))
    made[0] = replace(made[0], slots=made[0].slots + short)
    loads = st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0, 20.0]), min_size=num_units, max_size=num_units)
    load_LU = np.array([draw(loads) for _ in range(draw(st.integers(1, 2)))])
    group_U = draw(st.none() | st.lists(st.integers(0, 3), min_size=num_units, max_size=num_units))
    options = {
        "group_U": group_U,
        "redundancy": draw(st.integers(1, 3)),
        "node_limited": draw(st.booleans()),
        "hot_copies": draw(st.booleans()),
    }
    return load_LU, made, options


@given(requests(), requests())
@settings(max_examples=80, deadline=None)
def test_every_plan_is_sound_and_says_what_it_lacks(first: Any, second: Any) -> None:
    load_LU, made, options = first
    old = plan(load_LU, made, **options)
    check(old)
    check_unmet(old, options)
    check_copies(old, options)
    assert plan(load_LU, made, **options) == old, "deterministic"
    # The devices of another cluster, some of them with the same names: a change of any kind.
    spare = max(0, load_LU.shape[1] - sum(device.slots for device in second[1]))
    others = [replace(device, slots=device.slots + spare) for device in second[1]]
    new = plan(load_LU * 2 + 1, others, **options, previous=old)
    check(new)
    check_unmet(new, options)
    check_copies(new, options)


def check_copies(made: Plan, options: dict[str, Any]) -> None:
    if not options["hot_copies"]:
        assert all(len(held) <= options["redundancy"] for layer in made.holders for held in layer)


def check_unmet(made: Plan, options: dict[str, Any]) -> None:
    units = [(layer, unit) for layer, row in enumerate(made.holders) for unit in range(len(row))]
    lacking = any(len(nodes_of(made, *where)) < options["redundancy"] for where in units)
    assert lacking == any(sentence.startswith("redundancy") for sentence in made.unmet)
    group_U = options["group_U"]
    if group_U is None or not options["node_limited"]:
        return
    for group in set(group_U):
        members = [unit for unit, number in enumerate(group_U) if number == group]
        whole = all(
            set.intersection(*(nodes_of(made, layer, u) for u in members)) for layer in range(len(made.holders))
        )
        assert whole != any(sentence.startswith(f"group {group} spans") for sentence in made.unmet)


def test_without_hot_copies_a_hot_group_gets_no_further_home() -> None:
    here = [Device("e0", "n1", 4), Device("e1", "n0", 0), Device("e2", "n0", 0), Device("e3", "n0", 1)]
    made = plan([[0, 0, 0, 1]], here, group_U=[0, 0, 0, 1], hot_copies=False)
    assert made.holders == (((0,),) * 4,)


@pytest.mark.parametrize("node_limited", [True, False])
@pytest.mark.parametrize("redundancy", [1, 2])
def test_without_hot_copies_those_of_an_earlier_plan_are_given_up(node_limited: bool, redundancy: int) -> None:
    load_LU, here = zipf(3, 16, 1.2), devices(2, 2, slots=12)
    options: dict[str, Any] = {"group_U": groups(16, 4), "node_limited": node_limited, "redundancy": redundancy}
    before = plan(load_LU, here, **options)
    after = plan(load_LU, here, **options, hot_copies=False, previous=before)
    assert after.num_copies == 3 * 16 * redundancy < before.num_copies
    assert after.unmet == ()


def test_groups_stay_in_their_node_and_hot_units_get_the_spare_slots() -> None:
    load_LU = zipf(4, 64, 1.0)
    made = plan(load_LU, devices(4, 4, slots=10), group_U=groups(64, 8))
    check(made)
    assert made.unmet == ()
    assert made.num_copies == 4 * 80
    for layer in range(4):
        for group in range(8):
            homes = set.union(*(nodes_of(made, layer, unit) for unit in range(group * 8, group * 8 + 8)))
            assert len(homes) == 1
        copies = [len(held) for held in made.holders[layer]]
        assert copies[int(load_LU[layer].argmax())] == max(copies) > 1


def test_redundant_groups_are_whole_in_each_of_their_homes() -> None:
    load_LU = zipf(3, 64)
    made = plan(load_LU, devices(3, 3, 3, slots=17), group_U=groups(64, 8), redundancy=2)
    check(made)
    assert made.unmet == ()
    for layer in range(3):
        for group in range(8):
            homes = {frozenset(nodes_of(made, layer, unit)) for unit in range(group * 8, group * 8 + 8)}
            assert len(homes) == 1
            assert len(homes.pop()) == 2
    assert all(not lost for node in ("n0", "n1", "n2") for lost in made.lost_units(node))


def test_free_units_go_anywhere_and_their_copies_to_different_nodes() -> None:
    load_LU = zipf(2, 40)
    single = plan(load_LU, devices(3, 2, slots=9), node_limited=False)
    assert single.mean_balance(load_LU) > 0.99
    assert max(map(len, single.lost_units("n0"))) > 0
    double = plan(load_LU, devices(3, 2, slots=20), redundancy=2, node_limited=False)
    assert double.unmet == ()
    assert double.lost_units("n0") == double.lost_units("n1") == ((), ())


def test_no_more_groups_than_fit_exactly() -> None:
    # 6 groups with 2 homes each in 12 places: a greedy choice by load alone would end with one node for two homes.
    for seed in range(5):
        made = plan(zipf(6, 12, 1.2, seed), devices(1, 1, 1, slots=8), group_U=groups(12, 2), redundancy=2)
        assert made.unmet == ()


@pytest.mark.parametrize(
    ("nodes", "slots", "redundancy", "message"),
    [
        ((2, 2), 5, 2, "redundancy 2 needs 32 slots, 20 are there"),
        ((2, 2), 12, 3, "redundancy 3 needs 3 nodes, 2 are there"),
        ((1, 1, 1), 6, 1, "group 3 spans 2 nodes in 1 of 1 layers"),
    ],
)
def test_what_cannot_be_had_is_said(nodes: tuple[int, ...], slots: int, redundancy: int, message: str) -> None:
    load_LU = np.ones((1, 16))
    load_LU[0, :4] = 2.0
    made = plan(load_LU, devices(*nodes, slots=slots), group_U=groups(16, 4), redundancy=redundancy)
    check(made)
    assert any(message in sentence for sentence in made.unmet), made.unmet


def test_a_straggler_gets_less_and_an_uneven_cluster_is_balanced() -> None:
    load_LU = zipf(1, 64, 0.5)
    uneven = [Device("a", "n0", 30, 1.0), Device("b", "n0", 30, 0.25), Device("c", "n1", 16), Device("d", "n2", 20)]
    made = plan(load_LU, uneven)
    check(made)
    assert made.mean_balance(load_LU) > 0.98
    share_D = made.device_load(load_LU)[0] * [1.0, 0.25, 1.0, 1.0]
    assert share_D[1] < 0.3 * share_D[0]


def test_a_unit_load_is_split_over_its_copies() -> None:
    made = Plan(tuple(devices(1, 1, slots=2)), (((0, 1), (1,)),))
    assert made.device_load([[4.0, 3.0]]).tolist() == [[2.0, 5.0]]
    assert made.balance([[4.0, 3.0]]).tolist() == [3.5 / 5.0]
    assert made.lost_units("n1") == ((1,),)
    assert made.owners() == ("e0", "e1")


@pytest.mark.parametrize("node_limited", [True, False])
def test_a_small_change_of_load_moves_little(node_limited: bool) -> None:
    load_LU = zipf(8, 64)
    here = devices(4, 4, slots=10)
    options: dict[str, Any] = {"group_U": groups(64, 8), "node_limited": node_limited}
    before = plan(load_LU, here, **options)
    assert moved(before, plan(load_LU, here, **options, previous=before)) == 0
    drifted = load_LU * np.random.default_rng(1).uniform(0.9, 1.1, load_LU.shape)
    fresh, kept = plan(drifted, here, **options), plan(drifted, here, **options, previous=before)
    assert moved(before, kept) * 4 <= moved(before, fresh)
    assert kept.mean_balance(drifted) >= 0.97 * fresh.mean_balance(drifted)
    still = plan(drifted, here, **options, previous=before, move_cost=1e6)
    assert still.holders == before.holders


def test_a_plan_of_another_model_is_as_none() -> None:
    here = devices(2, 2, slots=8)
    other = plan(zipf(2, 8), here)
    load_LU = zipf(3, 16)
    assert plan(load_LU, here, previous=other) == plan(load_LU, here)


def test_a_new_device_is_used_and_a_lost_node_made_up_for() -> None:
    load_LU = zipf(1, 32)
    before = plan(load_LU, devices(2, 2, slots=18), redundancy=2)
    grown = plan(load_LU, devices(2, 2, 1, slots=18), redundancy=2, previous=before)
    assert grown.mean_balance(load_LU) > 0.95
    assert moved(before, grown) < 32
    rest = [device for device in grown.devices if device.node != "n1"]
    after = plan(load_LU, [replace(device, slots=32) for device in rest], redundancy=2, previous=grown)
    check(after)
    assert after.unmet == ()
    owners = dict(enumerate(grown.owners()))
    alive = {device.actor for device in rest}
    assert all(owner == owners[unit] for unit, owner in enumerate(after.owners()) if owners[unit] in alive)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"devices": []}, r"devices: there is no device"),
        (
            {"devices": devices(1, 1, slots=1)},
            r"devices: less slots than the 4 units \(got 2\); add devices or slots for 2",
        ),
        ({"devices": [Device("e", "a", 4), Device("e", "b", 4)]}, r"devices: an actor is named twice"),
        ({"devices": [Device("e", "a", 4, 0.0)]}, r"devices: e has no speed \(got 0.0\)"),
        ({"devices": [Device("e", "a", -1)]}, r"devices: e has slots below 0"),
        ({"load_LU": [1.0, 2.0]}, r"load_LU: is not one row of loads a layer"),
        ({"load_LU": [[1.0, float("nan"), 1.0, 1.0]]}, r"load_LU: has a load that is none \(got nan\)"),
        ({"group_U": [0, 1]}, r"group_U: has another length than a row of loads \(got 2\); give one .* 4 units"),
        ({"redundancy": 0}, r"redundancy: is below 1"),
        ({"move_cost": -1.0}, r"move_cost: is below 0"),
    ],
)
def test_what_cannot_be_planned(changed: dict[str, Any], message: str) -> None:
    request: dict[str, Any] = {"load_LU": np.ones((1, 4)), "devices": devices(2, slots=4), **changed}
    with pytest.raises(InvalidInput, match=message):
        plan(request.pop("load_LU"), request.pop("devices"), **request)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_at_least_as_balanced_as_eplb(shape: Any) -> None:
    small = replace(shape, layers=3)
    assert all(_balance(small, alpha).ratio >= 0.9999 for alpha in (0.5, 1.2))


def test_a_node_may_die_which_eplb_does_not_see_to() -> None:
    row = _node_loss(replace(SHAPES[3], layers=2))
    assert row.value == 0
    assert row.peer_value > 0


def test_a_zone_may_be_lost_too() -> None:
    row = _zone_loss(replace(SHAPES[0], layers=2))
    assert row.value == 0
    assert row.peer_value > 0


def test_eplb_makes_the_published_example() -> None:
    """The two-layer example of its README: 12 experts, 16 places, 4 groups, 2 nodes, 8 devices."""
    load_XE = torch.tensor(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    )
    published = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert rebalance_experts(load_XE, 16, 4, 2, 8).tolist() == published


def test_eplb_parts() -> None:
    pack_XE, rank_XE = balanced_packing(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 2)
    assert pack_XE.tolist() == [[0, 1, 1, 0]]
    assert rank_XE.tolist() == [[0, 0, 1, 1]]
    expert_XP, count_XE = replicate_experts(torch.tensor([[6.0, 1.0]]), 4)
    assert expert_XP.tolist() == [[0, 1, 0, 0]]
    assert count_XE.tolist() == [[3, 1]]
