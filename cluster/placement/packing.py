"""Copies of hot units, and units to devices: the greedy start of a plan.

L layers   U units   V = U + 1 units, the last stands for an empty slot   N nodes   D devices
K slots of the largest device   T places a copy can be meant for: the nodes, or one place that is all of them
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cluster.placement.zones import Zones

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    load_LU: Floats
    slots_D: Ints
    speed_D: Floats
    node_D: Ints
    num_nodes: int
    home_bound: bool
    """Copies stay in their unit's home nodes, and each of these keeps one."""
    redundancy: int = 1
    hot_copies: bool = True
    """Free slots are for further copies of hot units."""
    homes_LUN: Bools | None = None
    """Nodes that each get a copy of the unit to begin with; None: one copy, anywhere."""
    zones: Zones | None = None
    """None where they make no difference."""

    def with_homes(self, homes_LUN: Bools | None) -> Problem:
        return replace(self, homes_LUN=homes_LUN)

    def of_layers(self, rows: Ints) -> Problem:
        homes_LUN = None if self.homes_LUN is None else self.homes_LUN[rows]
        return replace(self, load_LU=self.load_LU[rows], homes_LUN=homes_LUN)

    @cached_property
    def stays_in_node(self) -> bool:
        """Every unit has one home."""
        return self.home_bound and self.homes_LUN is not None and not (self.need_LU > 1).any()

    @cached_property
    def goes_anywhere(self) -> bool:
        return not self.home_bound and not (self.need_LU > 1).any()

    @cached_property
    def need_LU(self) -> Ints:
        """Different nodes that must hold the unit."""
        if self.homes_LUN is None:
            return np.ones(self.load_LU.shape, dtype=np.int64)
        homes_LU: Ints = self.homes_LUN.sum(-1)
        return homes_LU if self.home_bound else np.minimum(homes_LU, self.redundancy)

    @cached_property
    def need_LV(self) -> Ints:
        """The same, and nothing for the empty slot."""
        return np.pad(self.need_LU, ((0, 0), (0, 1)), constant_values=-self.num_nodes)

    @cached_property
    def need_zones_LV(self) -> Ints:
        """Different zones that must hold the unit, and nothing for the empty slot; only where zones matter."""
        assert self.zones is not None
        if self.homes_LUN is None:
            need_LU = np.ones(self.load_LU.shape, dtype=np.int64)
        else:
            need_LU = np.minimum(self.zones.number(self.homes_LUN), self.zones.wanted)
        return np.pad(need_LU, ((0, 0), (0, 1)), constant_values=-self.num_nodes)

    @cached_property
    def allowed_LVN(self) -> Bools:
        """Nodes that a unit may be on; the empty slot any."""
        assert self.homes_LUN is not None
        return np.pad(self.homes_LUN, ((0, 0), (0, 1), (0, 0)), constant_values=True)

    @cached_property
    def average_L(self) -> Floats:
        """Load a unit of speed, were all devices equally busy; above 0."""
        average_L: Floats = self.load_LU.sum(-1) / self.speed_D.sum()
        return np.maximum(average_L, np.finfo(np.float64).tiny)

    def floor_of(self, homes_LUN: Bools) -> Floats:
        """[L]: load by speed of the busiest node, were each unit's load split evenly over its homes."""
        share_LU = self.load_LU / np.maximum(1, homes_LUN.sum(-1))
        speed_N = self.per_node(self.speed_D)
        busy_LN: Floats = np.matmul(share_LU[:, None], homes_LUN)[:, 0] / speed_N
        return np.asarray(busy_LN.max(-1))

    def per_node(self, value_D: NDArray) -> NDArray:
        return np.bincount(self.node_D, weights=value_D, minlength=self.num_nodes).astype(value_D.dtype)


class Layout:
    """What is in every slot, with the counts that the search needs at hand. Mutable, unlike a plan."""

    def __init__(self, problem: Problem, hold_LUD: Bools) -> None:
        num_layers, num_units, num_devices = hold_LUD.shape
        self.problem = problem
        self.empty = num_units
        layer, device, unit = np.nonzero(hold_LUD.transpose(0, 2, 1))
        used_LD = hold_LUD.sum(1)
        first_LD = np.cumsum(used_LD).reshape(used_LD.shape) - used_LD
        slot = np.arange(len(unit)) - first_LD[layer, device]
        self.unit_LDK = np.full((num_layers, num_devices, max(1, int(problem.slots_D.max()))), num_units)
        self.unit_LDK[layer, device, slot] = unit
        self.load_LV = np.pad(problem.load_LU, ((0, 0), (0, 1)))
        self.held_LVD = np.zeros((num_layers, num_units + 1, num_devices), dtype=np.bool_)
        self.on_LVN = np.zeros((num_layers, num_units + 1, problem.num_nodes), dtype=np.int64)
        self.share_LV = np.zeros_like(self.load_LV)
        self.load_LD = np.zeros(used_LD.shape)
        self.refresh(np.arange(num_layers))

    @property
    def hold_LUD(self) -> Bools:
        return self.held_LVD[:, :-1]

    @property
    def busiest_L(self) -> Floats:
        return np.asarray((self.load_LD / self.problem.speed_D).max(-1))

    def put(self, rows: Ints, unit_RDK: Ints) -> None:
        self.unit_LDK[rows] = unit_RDK
        self.refresh(rows)

    def refresh(self, rows: Ints) -> None:
        """Everything of these layers anew from what is in the slots."""
        held_RVD = np.zeros((len(rows), *self.held_LVD.shape[1:]), dtype=np.bool_)
        row, device, slot = np.ogrid[: len(rows), : self.unit_LDK.shape[1], : self.unit_LDK.shape[2]]
        unit_RDK = self.unit_LDK[rows]
        held_RVD[row, unit_RDK, device + 0 * slot] = True
        held_RVD[:, self.empty] = False
        self.held_LVD[rows] = held_RVD
        node_DN = np.eye(self.problem.num_nodes)[self.problem.node_D]
        self.on_LVN[rows] = held_RVD @ node_DN
        self.share_LV[rows] = self.load_LV[rows] / np.maximum(1, self.on_LVN[rows].sum(-1))
        self.load_LD[rows] = self.share_LV[rows[:, None, None], unit_RDK].sum(-1)


def pack(problem: Problem) -> Layout:
    """Heaviest copy first, to the device that is least busy with it, among those it may be on."""
    homes_LUN = problem.homes_LUN
    base_LU = np.ones(problem.load_LU.shape, dtype=np.int64) if homes_LUN is None else homes_LUN.sum(-1)
    width_N = problem.per_node((problem.slots_D > 0).astype(np.int64))
    slots_N = problem.per_node(problem.slots_D)
    if problem.home_bound and homes_LUN is not None:
        spare_LN = slots_N - homes_LUN.sum(1)
        extra_LUT = _hot_copies(problem, base_LU, homes_LUN, spare_LN, homes_LUN * (width_N - 1))
        copies_LUT = homes_LUN + extra_LUT
    else:
        spare_L1 = slots_N.sum() - base_LU.sum(1, keepdims=True)
        room_LU1 = (width_N.sum() - base_LU)[..., None]
        extra_LU1 = _hot_copies(problem, base_LU, room_LU1 >= 0, spare_L1, room_LU1)
        homes = np.zeros((*base_LU.shape, problem.num_nodes), dtype=np.int64) if homes_LUN is None else homes_LUN
        copies_LUT = np.concatenate([homes, extra_LU1 + (homes_LUN is None)], axis=-1)
    return Layout(problem, _place(problem, *_items(problem.load_LU, copies_LUT)))


def _hot_copies(problem: Problem, base_LU: Ints, home_LUT: Bools, spare_LT: Ints, room_LUT: Ints) -> Ints:
    """Spare slots to the unit with the most load a copy, one after the other. -> further copies [L, U, T].

    `spare_LT`: slots left; `room_LUT`: devices of the place that do not hold the unit yet.
    """
    spare_LT, room_LUT = spare_LT.copy(), room_LUT.copy()
    extra_LUT = np.zeros_like(room_LUT)
    if not problem.hot_copies:
        return extra_LUT
    load_LU, count_LU = problem.load_LU, base_LU.copy()
    layers = np.arange(len(load_LU))

    def shut(rows: Ints, share_RU: Floats) -> Floats:
        """Units without a place for another copy are out."""
        can_RUT = home_LUT[rows] & (room_LUT[rows] > 0) & (spare_LT[rows] > 0)[:, None]
        return np.where(can_RUT.any(-1), share_RU, 0.0)

    share_LU = shut(layers, load_LU / np.maximum(1, count_LU))
    while True:
        unit_L = share_LU.argmax(1)
        live = np.flatnonzero(share_LU[layers, unit_L] > 0)
        if not live.size:
            return extra_LUT
        unit = unit_L[live]
        open_RT = np.where(room_LUT[live, unit] > 0, spare_LT[live], 0)
        place = open_RT.argmax(1)
        extra_LUT[live, unit, place] += 1
        room_LUT[live, unit, place] -= 1
        spare_LT[live, place] -= 1
        count_LU[live, unit] += 1
        share_LU[live, unit] = load_LU[live, unit] / count_LU[live, unit]
        full = live[(spare_LT[live, place] == 0) | (room_LUT[live, unit, place] == 0)]
        if full.size:
            share_LU[full] = shut(full, share_LU[full])


def _items(load_LU: Floats, copies_LUT: Ints) -> tuple[Ints, Ints]:
    """Unit and place of every copy, heaviest first: [L, copies], padded with -1."""
    layer, unit, place = np.nonzero(copies_LUT)
    times = copies_LUT[layer, unit, place]
    layer, unit, place = (np.repeat(index, times) for index in (layer, unit, place))
    share = load_LU[layer, unit] / copies_LUT.sum(-1)[layer, unit]
    order = np.lexsort((unit, -share, layer))
    layer, unit, place = layer[order], unit[order], place[order]
    num_L = np.bincount(layer, minlength=len(load_LU))
    position = np.arange(len(layer)) - (np.cumsum(num_L) - num_L)[layer]
    unit_LI = np.full((len(load_LU), num_L.max()), -1)
    place_LI = np.zeros_like(unit_LI)
    unit_LI[layer, position], place_LI[layer, position] = unit, place
    return unit_LI, place_LI


def _place(problem: Problem, unit_LI: Ints, place_LI: Ints) -> Bools:
    """-> hold [L, U, D]. A copy that fits nowhere is left out; the last place means any node."""
    num_layers, num_units = problem.load_LU.shape
    layers, num_nodes = np.arange(num_layers), problem.num_nodes
    # One row more than nodes: what is meant for any node is barred from none.
    barred_TD = np.where(problem.node_D == np.arange(num_nodes + 1)[:, None], 0.0, np.inf)
    barred_TD[num_nodes] = 0.0
    taken_LUD = np.zeros((num_layers, num_units, len(problem.node_D)))  # inf where the unit is
    count_LU = np.zeros((num_layers, num_units), dtype=np.int64)
    np.add.at(count_LU, (layers[:, None], unit_LI), unit_LI >= 0)
    share_LI = problem.load_LU[layers[:, None], unit_LI] / np.maximum(1, count_LU[layers[:, None], unit_LI])
    free_LD = np.tile(problem.slots_D, (num_layers, 1))
    load_LD = np.where(free_LD > 0, 0.0, np.inf)
    reserve = _Reserve(problem, place_LI, unit_LI)
    slowness_D = 1.0 / problem.speed_D
    for unit_L, place_L, share_L in zip(unit_LI.T, place_LI.T, share_LI.T, strict=True):
        cost_LD = (load_LD + share_L[:, None]) * slowness_D + barred_TD[place_L] + taken_LUD[layers, unit_L]
        if reserve.matters:
            cost_LD += reserve.barred(place_L, free_LD)
        device_L = cost_LD.argmin(1)
        rows = np.flatnonzero((unit_L >= 0) & (cost_LD[layers, device_L] < np.inf))
        unit, device = unit_L[rows], device_L[rows]
        taken_LUD[rows, unit, device] = np.inf
        load_LD[rows, device] += share_L[rows]
        free_LD[rows, device] -= 1
        load_LD[rows, device] = np.where(free_LD[rows, device] > 0, load_LD[rows, device], np.inf)
    return taken_LUD > 0


class _Reserve:
    """Slots kept back in each node for the copies that must come there, where others may go to any node."""

    def __init__(self, problem: Problem, place_LI: Ints, unit_LI: Ints) -> None:
        places = np.arange(problem.num_nodes)
        self.left_LN = ((place_LI[..., None] == places) & (unit_LI >= 0)[..., None]).sum(1)
        self.matters = not problem.home_bound and bool(self.left_LN.any())
        self.node_D = problem.node_D
        self.node_DN = problem.node_D[:, None] == places

    def barred(self, place_L: Ints, free_LD: Ints) -> Floats:
        bound = np.flatnonzero(place_L < self.left_LN.shape[1])
        self.left_LN[bound, place_L[bound]] -= 1
        any_L = place_L == self.left_LN.shape[1]
        open_LN = free_LD @ self.node_DN > self.left_LN
        return np.where(any_L[:, None] & ~open_LN[:, self.node_D], np.inf, 0.0)
