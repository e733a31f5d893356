"""Who holds which unit: from loads, devices and groups to owners and copies.

    L layers   U units of a layer (experts; or whole expert groups, then L = 1)   G groups of units
    D devices   N nodes   K slots of the largest device

A unit's load is split evenly over its copies, and a device's load counts divided by its speed. The steps:
groups to home nodes (`homes`), copies of hot units and a greedy packing (`packing`), local search (`search`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.placement.homes import WAYS, kept_homes, new_homes
from cluster.placement.packing import Bools, Floats, Ints, Layout, Problem, pack
from cluster.placement.repair import repair
from cluster.placement.request import Device, check_request, unmet
from cluster.placement.search import Trail, improve
from cluster.placement.zones import Zones

MOVE_COST = 0.0005
"""A copy moves in a layer when that lowers the layer's maximum by this share of its average."""

WORTH_ANOTHER_TRY = 1e-3
"""Other home nodes are tried where their busiest node leaves this share of room for a better balance."""

Holders = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Plan:
    devices: tuple[Device, ...]
    holders: Holders
    """For every layer and unit the devices (their numbers) that hold it, the owner first."""
    unmet: tuple[str, ...] = ()
    """What was asked and could not be had, as sentences."""

    @cached_property
    def hold_LUD(self) -> NDArray[np.bool_]:
        units = [held for layer in self.holders for held in layer]
        hold = np.zeros((len(units), len(self.devices)), dtype=np.bool_)
        rows = np.repeat(np.arange(len(units)), [len(held) for held in units])
        hold[rows, [device for held in units for device in held]] = True
        return hold.reshape(len(self.holders), -1, len(self.devices))

    @property
    def num_copies(self) -> int:
        return int(self.hold_LUD.sum())

    def owners(self, layer: int = 0) -> tuple[str, ...]:
        """Actor that owns each unit of the layer."""
        return tuple(self.devices[held[0]].actor for held in self.holders[layer])

    def device_load(self, load_LU: ArrayLike) -> NDArray[np.float64]:
        """[L, D]: the loads of a device's units, each split evenly over its copies, divided by the device's speed."""
        share_LU = np.asarray(load_LU, dtype=np.float64) / self.hold_LUD.sum(-1)
        speed_D = np.array([device.speed for device in self.devices])
        return np.asarray(np.einsum("lu,lud->ld", share_LU, self.hold_LUD) / speed_D)

    def balance(self, load_LU: ArrayLike) -> NDArray[np.float64]:
        """[L]: average over maximum of the device loads, 1 at best; the average is all load over all speed."""
        load = np.asarray(load_LU, dtype=np.float64)
        average_L = load.sum(-1) / sum(device.speed for device in self.devices)
        maximum_L = self.device_load(load).max(-1)
        return np.asarray(np.divide(average_L, maximum_L, out=np.ones_like(average_L), where=maximum_L > 0))

    def mean_balance(self, load_LU: ArrayLike) -> float:
        return float(self.balance(load_LU).mean())

    def lost_units(self, node: str) -> tuple[tuple[int, ...], ...]:
        """Units of each layer that have no copy outside the node: its death loses them."""
        return self._only_on([device.node == node for device in self.devices])

    def lost_with_zone(self, zone: str) -> tuple[tuple[int, ...], ...]:
        """Units of each layer that the loss of all nodes of a zone loses."""
        return self._only_on([device.zone == zone for device in self.devices])

    def _only_on(self, here_D: Sequence[bool]) -> tuple[tuple[int, ...], ...]:
        elsewhere_D = ~np.array(here_D)
        lost_LU = ~np.asarray(self.hold_LUD[:, :, elsewhere_D].any(-1))
        return tuple(tuple(np.flatnonzero(lost_U).tolist()) for lost_U in lost_LU)


def plan(
    load_LU: ArrayLike,
    devices: Sequence[Device],
    *,
    group_U: Sequence[int] | None = None,
    redundancy: int = 1,
    node_limited: bool = True,
    hot_copies: bool = True,
    previous: Plan | None = None,
    move_cost: float = MOVE_COST,
) -> Plan:
    """Owners and copies of every unit. Deterministic.

    With `node_limited` a group (`group_U`: unit -> group number; left out, every unit is its own) has `redundancy`
    home nodes: each holds the whole group, and hot units get further copies inside them only. Without it units are
    free, and `redundancy` copies are on different nodes. No device holds two copies of a unit. Without `hot_copies` no
    unit gets more copies than that.

    Where devices tell their zones the `redundancy` copies are in as many of them, as far as there are zones and room
    in them; that comes before an even load.

    With `previous` it is improved rather than made anew: of all layouts on the way to the best balance, the one with
    the least `maximum / average + move_cost * copies moved` is taken, layer by layer; a plan from scratch takes part.
    Devices are the same if their actors have the same name. A plan of other layers or units is as none.

    What does not fit is said in `Plan.unmet`. `InvalidInput` if there is no device or less slots than units.
    """
    load = np.asarray(load_LU, dtype=np.float64)
    check_request(load, devices, group_U, redundancy, move_cost)
    # A unit that is its own group is inside a node wherever it is.
    bound = node_limited and group_U is not None
    names, group = np.unique(np.arange(load.shape[1]) if not bound else np.asarray(group_U), return_inverse=True)
    problem = _problem(load, devices, bound, redundancy, hot_copies)
    if previous is not None and previous.hold_LUD.shape[:2] != load.shape:
        previous = None
    if previous is not None:
        layout = _from_previous(problem, group, _carried_over(previous, devices), move_cost)
    else:
        layout = _from_scratch(problem, group)
    holders = _holders(layout.hold_LUD, devices, previous)
    return Plan(tuple(devices), holders, unmet(layout.hold_LUD, problem, names[group], devices))


def _problem(
    load_LU: Floats, devices: Sequence[Device], home_bound: bool, redundancy: int, hot_copies: bool
) -> Problem:
    nodes = list(dict.fromkeys(device.node for device in devices))
    problem = Problem(
        load_LU,
        slots_D=np.array([device.slots for device in devices]),
        speed_D=np.array([device.speed for device in devices], dtype=np.float64),
        node_D=np.array([nodes.index(device.node) for device in devices]),
        num_nodes=len(nodes),
        home_bound=home_bound,
        redundancy=redundancy,
        hot_copies=hot_copies,
    )
    zone_of: dict[str, str] = {}
    for device in devices:
        zone_of[device.node] = zone_of.get(device.node) or device.zone
    return replace(problem, zones=Zones.of(list(zone_of.values()), problem.per_node(problem.slots_D), redundancy))


def _from_scratch(problem: Problem, group_U: Ints) -> Layout:
    if not problem.home_bound and problem.redundancy == 1:
        return _packed(problem)
    homes_LUN = new_homes(problem, group_U, WAYS[0])
    layout = _packed(problem.with_homes(homes_LUN))
    # Level nodes are not all: two groups that both need many copies should not meet in one.
    for way in WAYS[1:] if problem.home_bound else ():
        other_LUN = new_homes(problem, group_U, way)
        promising_L = problem.floor_of(other_LUN) * (1 + WORTH_ANOTHER_TRY) < layout.busiest_L
        rows = np.flatnonzero(promising_L & (other_LUN != homes_LUN).any((1, 2)))
        if rows.size:
            other = _packed(problem.with_homes(other_LUN).of_layers(rows))
            better = other.busiest_L < layout.busiest_L[rows]
            if problem.zones is not None:
                better &= problem.zones.lacking(other_LUN[rows]) <= problem.zones.lacking(homes_LUN[rows])
            layout.put(rows[better], other.unit_LDK[better])
    return layout


def _packed(problem: Problem) -> Layout:
    layout = pack(problem)
    improve(layout)
    return layout


def _from_previous(problem: Problem, group_U: Ints, kept_LUD: Bools, move_cost: float) -> Layout:
    """The earlier plan improved, or in layers where that is worth its moves a new one."""
    homes_LUN = None
    if problem.home_bound or problem.redundancy > 1:
        homes_LUN = kept_homes(problem, group_U, kept_LUD)
    layout = repair(problem.with_homes(homes_LUN), kept_LUD)
    trail = Trail(layout, kept_LUD, move_cost)
    improve(layout, trail)
    trail.note(_from_scratch(problem, group_U), np.arange(len(kept_LUD)))
    trail.restore(layout)
    return layout


def _carried_over(previous: Plan, devices: Sequence[Device]) -> Bools:
    """[L, U, D]: what the devices of today hold of the earlier plan."""
    number = {device.actor: i for i, device in enumerate(previous.devices)}
    known = [i for i, device in enumerate(devices) if device.actor in number]
    kept_LUD = np.zeros((*previous.hold_LUD.shape[:2], len(devices)), dtype=np.bool_)
    kept_LUD[:, :, known] = previous.hold_LUD[:, :, [number[devices[i].actor] for i in known]]
    return kept_LUD


def _holders(hold_LUD: Bools, devices: Sequence[Device], previous: Plan | None) -> Holders:
    """Owner first: the earlier owner if it still holds the unit, else the holder that owns least for its slots."""
    num_layers, num_units, num_devices = hold_LUD.shape
    unit, device = np.nonzero(hold_LUD.reshape(-1, num_devices))
    ends = np.cumsum(np.bincount(unit, minlength=num_layers * num_units))[:-1]
    held = [part.tolist() for part in np.split(device, ends)]
    layers = [held[layer * num_units : (layer + 1) * num_units] for layer in range(num_layers)]
    number = {device.actor: i for i, device in enumerate(devices)}
    for layer, units in enumerate(layers):
        owned = [sum(held[0] == i for held in units if len(held) == 1) for i in range(num_devices)]
        actors = previous.owners(layer) if previous is not None else ()
        for index, holding in enumerate(units):
            if len(holding) > 1:
                owner = number.get(actors[index]) if actors else None
                if owner is None or owner not in holding:
                    owner = min(holding, key=lambda i: owned[i] / devices[i].slots)
                owned[owner] += 1
                holding.insert(0, holding.pop(holding.index(owner)))
    return tuple(tuple(tuple(held) for held in units) for units in layers)
