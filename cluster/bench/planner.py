"""The placement planner against the public EPLB algorithm (`cluster.bench.eplb`), on the same loads.

`eplb_SHAPE_ALPHA`: average over maximum device load, the mean over the layers; Zipf loads of that exponent, the order
of the experts drawn anew for each layer. Where EPLB keeps groups in nodes, so does the planner; `_global`: neither.
`plan_time_SHAPE`: one plan. `node_loss_SHAPE`: redundancy 2 with memory for it, groups in nodes; the most experts of a
layer that the death of one node leaves without a copy, ratio (1 + EPLB's) / (1 + ours), as ours may be 0.
`zone_loss_SHAPE`: the same of a zone, where two nodes each are one.
`drift_moves`: copies that move after each load changed by up to 10 %, from the earlier plan against a plan from
scratch; `drift_balance`: what the two reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.bench.eplb import rebalance_experts
from cluster.bench.result import Report, Row, interleaved, time_row
from cluster.placement.planner import Plan, plan
from cluster.placement.request import Device

ALPHAS = (0.5, 0.7, 0.8, 1.0, 1.2)
TIMED_ALPHA = 0.8
MEAN_LOAD = 1e4
DRIFT = 0.1
NODES_A_ZONE = 2
SEED = 17
PEER = "EPLB"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    experts: int
    groups: int
    nodes: int
    devices_per_node: int
    slots: int
    """Of each device."""
    ample_slots: int
    """Of each device, where every expert is to have two copies."""
    node_limited: bool

    @property
    def num_devices(self) -> int:
        return self.nodes * self.devices_per_node

    def devices(self, slots: int, nodes_a_zone: int = 0) -> list[Device]:
        """Without zones unless told how many nodes each has."""
        nodes = [i // self.devices_per_node for i in range(self.num_devices)]
        zones = [f"z{node // nodes_a_zone}" if nodes_a_zone else "" for node in nodes]
        return [Device(f"e{i}", f"n{nodes[i]}", slots, zone=zones[i]) for i in range(self.num_devices)]

    def loads(self, alpha: float) -> Floats:
        """[layers, experts]"""
        rng = np.random.default_rng([SEED, round(alpha * 100)])
        load_E = np.arange(1, self.experts + 1) ** -alpha
        load_E *= MEAN_LOAD / load_E.mean()
        return np.stack([rng.permutation(load_E) for _ in range(self.layers)])

    def ours(
        self,
        load_LE: Floats,
        slots: int,
        *,
        redundancy: int = 1,
        previous: Plan | None = None,
        nodes_a_zone: int = 0,
    ) -> Plan:
        group_E = np.repeat(np.arange(self.groups), self.experts // self.groups).tolist()
        return plan(
            load_LE,
            self.devices(slots, nodes_a_zone),
            group_U=group_E,
            redundancy=redundancy,
            node_limited=self.node_limited or redundancy > 1,
            previous=previous,
        )

    def theirs(self, load_LE: Floats, slots: int) -> torch.Tensor:
        """Expert in each physical place [layers, places]."""
        groups, nodes = (self.groups, self.nodes) if self.node_limited else (1, 1)
        places = slots * self.num_devices
        return rebalance_experts(torch.from_numpy(load_LE), places, groups, nodes, self.num_devices)


SHAPES = (
    Shape("v3_4x8", 58, 256, 8, 4, 8, slots=9, ample_slots=18, node_limited=True),
    Shape("v3_4x8_global", 58, 256, 8, 4, 8, slots=9, ample_slots=18, node_limited=False),
    Shape("v3_9x8_global", 58, 256, 8, 9, 8, slots=4, ample_slots=8, node_limited=False),
    Shape("small_2x4", 26, 64, 8, 2, 4, slots=10, ample_slots=16, node_limited=True),
    Shape("small_2x4_global", 26, 64, 8, 2, 4, slots=10, ample_slots=16, node_limited=False),
)


def bench_planner(*, rounds: int) -> Report:
    rows = [_balance(shape, alpha) for shape in SHAPES for alpha in ALPHAS]
    rows += [_plan_time(shape, rounds) for shape in SHAPES]
    rows += [_node_loss(shape) for shape in SHAPES]
    rows += [_zone_loss(shape) for shape in SHAPES if shape.nodes > 2]
    rows += [row for shape in SHAPES[:2] for row in _drift(shape)]
    return Report("planner", rows)


def _balance(shape: Shape, alpha: float) -> Row:
    load_LE = shape.loads(alpha)
    ours = shape.ours(load_LE, shape.slots).mean_balance(load_LE)
    theirs = _eplb_balance(load_LE, shape.theirs(load_LE, shape.slots).numpy(), shape.num_devices)
    return Row(f"eplb_{shape.name}_{alpha}", ours, "average/maximum", PEER, theirs, ours / theirs, 1)


def _eplb_balance(load_LE: Floats, expert_LP: NDArray[np.int64], num_devices: int) -> float:
    layer_L1 = np.arange(len(load_LE))[:, None]
    count_LE = np.zeros_like(load_LE)
    np.add.at(count_LE, (layer_L1, expert_LP), 1)
    device_LD = (load_LE / count_LE)[layer_L1, expert_LP].reshape(len(load_LE), num_devices, -1).sum(-1)
    return float((device_LD.mean(-1) / device_LD.max(-1)).mean())


def _plan_time(shape: Shape, rounds: int) -> Row:
    load_LE = shape.loads(TIMED_ALPHA)

    def ours() -> None:
        shape.ours(load_LE, shape.slots)

    def theirs() -> None:
        shape.theirs(load_LE, shape.slots)

    seconds = interleaved({"ours": ours, "theirs": theirs}, rounds)
    return time_row(f"plan_time_{shape.name}", "s", 1.0, seconds["ours"], PEER, seconds["theirs"])


def _node_loss(shape: Shape) -> Row:
    made = shape.ours(shape.loads(TIMED_ALPHA), shape.ample_slots, redundancy=2)
    ours = max(len(lost) for node in range(shape.nodes) for lost in made.lost_units(f"n{node}"))
    return _loss_row(f"node_loss_{shape.name}", ours, _eplb_loss(shape, 1))


def _zone_loss(shape: Shape) -> Row:
    made = shape.ours(shape.loads(TIMED_ALPHA), shape.ample_slots, redundancy=2, nodes_a_zone=NODES_A_ZONE)
    zones = {device.zone for device in made.devices}
    ours = max(len(lost) for zone in zones for lost in made.lost_with_zone(zone))
    return _loss_row(f"zone_loss_{shape.name}", ours, _eplb_loss(shape, NODES_A_ZONE))


def _eplb_loss(shape: Shape, nodes_together: int) -> int:
    """Most experts of a layer that are on no other node than some so many neighbouring ones."""
    expert_LP = shape.theirs(shape.loads(TIMED_ALPHA), shape.ample_slots).numpy()
    most = 0
    for expert_NP in expert_LP.reshape(shape.layers, shape.nodes, -1):
        here = [set(expert_P.tolist()) for expert_P in expert_NP]
        for first in range(0, shape.nodes, nodes_together):
            after = first + nodes_together
            elsewhere = set().union(*here[:first], *here[after:])
            most = max(most, len(set().union(*here[first:after]) - elsewhere))
    return most


def _loss_row(case: str, ours: int, theirs: int) -> Row:
    return Row(case, ours, "experts lost", PEER, theirs, (1 + theirs) / (1 + ours), 1)


def _drift(shape: Shape) -> list[Row]:
    load_LE = shape.loads(TIMED_ALPHA)
    before = shape.ours(load_LE, shape.slots)
    load_LE = load_LE * np.random.default_rng(SEED).uniform(1 - DRIFT, 1 + DRIFT, load_LE.shape)
    kept, fresh = shape.ours(load_LE, shape.slots, previous=before), shape.ours(load_LE, shape.slots)
    moved = [int((after.hold_LUD & ~before.hold_LUD).sum()) for after in (kept, fresh)]
    balance = [after.mean_balance(load_LE) for after in (kept, fresh)]
    case = shape.name.partition("_4x8")[2]
    peer = "a plan from scratch"
    return [
        Row(f"drift_moves{case}", moved[0], "copies", peer, moved[1], moved[1] / max(1, moved[0]), 1),
        Row(f"drift_balance{case}", balance[0], "average/maximum", peer, balance[1], balance[0] / balance[1], 1),
    ]
