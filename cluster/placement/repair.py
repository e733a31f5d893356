"""An earlier plan carried over to the devices and homes of today.

L layers   U units   N nodes   D devices
"""

from __future__ import annotations

import numpy as np

from cluster.placement.packing import Bools, Ints, Layout, Problem


def repair(problem: Problem, kept_LUD: Bools) -> Layout:
    """An earlier plan's copies that may stay, and what a device or node less has left missing."""
    hold_LUD = kept_LUD.copy()
    node_DN = problem.node_D[:, None] == np.arange(problem.num_nodes)
    if problem.homes_LUN is not None and (problem.home_bound or not problem.hot_copies):
        hold_LUD &= problem.homes_LUN[:, :, problem.node_D]
    if not problem.hot_copies:
        # One in each home, or one at all: the earlier plan may have had hot copies, or a device was in another node.
        places = node_DN.T if problem.homes_LUN is not None else np.ones((1, len(problem.node_D)), dtype=np.bool_)
        for place_D in places:
            hold_LUD[:, :, place_D] &= hold_LUD[:, :, place_D].cumsum(-1) <= 1
    if problem.zones is not None and problem.homes_LUN is not None:
        # Who is to have a home in another zone leaves what is none, so that others find room there.
        moves_LU = (problem.homes_LUN & (hold_LUD @ node_DN.astype(np.int64) == 0)).any(-1)
        hold_LUD &= problem.homes_LUN[:, :, problem.node_D] | ~moves_LU[..., None]
    over_L = (hold_LUD.sum(1) > problem.slots_D).any(-1)
    on_LUN = hold_LUD @ node_DN.astype(np.int64)
    if problem.homes_LUN is None:
        missing_L = (on_LUN.sum(-1) == 0).any(-1)
    else:
        missing_L = (problem.homes_LUN & (on_LUN == 0)).any((1, 2))
    for layer in np.flatnonzero(over_L | missing_L):
        _Repair(problem, int(layer), hold_LUD[layer]).run()
    return Layout(problem, hold_LUD)


class _Repair:
    """One layer, rarely: in plain loops."""

    def __init__(self, problem: Problem, layer: int, hold_UD: Bools) -> None:
        self.problem, self.hold_UD = problem, hold_UD
        self.load_U = problem.load_LU[layer]
        self.need_U = problem.need_LU[layer].copy()
        self.need_zones_U = None if problem.zones is None else problem.need_zones_LV[layer].copy()
        homes_LUN = problem.homes_LUN
        self.homes_UN = None if homes_LUN is None else homes_LUN[layer]

    def run(self) -> None:
        for device in np.flatnonzero(self.hold_UD.sum(0) > self.problem.slots_D).tolist():
            while self.hold_UD[:, device].sum() > self.problem.slots_D[device]:
                units = np.flatnonzero(self.hold_UD[:, device]).tolist()
                extra = [unit for unit in units if self._is_extra(unit, device)]
                self.hold_UD[min(extra or units, key=self._share), device] = False
        for unit, node in self._missing():
            self._add(unit, np.flatnonzero(self.problem.node_D == node))
        # Where free units filled up the node that others were meant for, and where every unit may go anywhere.
        for unit in np.argsort(-self.load_U, kind="stable").tolist():
            if not self.hold_UD[unit].any():
                self.need_U[:] = 1
                self.need_zones_U = None
                self._add(unit, np.arange(len(self.problem.node_D)))

    def _missing(self) -> list[tuple[int, int]]:
        """Unit and home node, hottest unit first."""
        if self.homes_UN is None:
            return []
        nodes = range(self.problem.num_nodes)
        on_UN = np.stack([self.hold_UD[:, self.problem.node_D == node].any(1) for node in nodes], axis=1)
        lacks_U = on_UN.sum(1) < self.need_U
        missing = [(int(u), int(n)) for u, n in np.argwhere(self.homes_UN & ~on_UN) if lacks_U[u]]
        return sorted(missing, key=lambda item: -self.load_U[item[0]])

    def _add(self, unit: int, devices: Ints) -> None:
        devices = devices[~self.hold_UD[unit, devices]]
        free = devices[self.hold_UD[:, devices].sum(0) < self.problem.slots_D[devices]]
        if not free.size:
            free = self._evict(devices)
        if free.size:
            share_U = self.load_U / np.maximum(1, self.hold_UD.sum(1))
            busy = (share_U @ self.hold_UD[:, free]) / self.problem.speed_D[free]
            self.hold_UD[unit, free[busy.argmin()]] = True

    def _evict(self, devices: Ints) -> Ints:
        """The lightest copy that is not needed makes room. -> its device, if there is one."""
        extra = [
            (self._share(unit), device, unit)
            for device in devices.tolist()
            for unit in np.flatnonzero(self.hold_UD[:, device]).tolist()
            if self._is_extra(unit, device)
        ]
        if not extra:
            return devices[:0]
        _, device, unit = min(extra)
        self.hold_UD[unit, device] = False
        return np.array([device])

    def _is_extra(self, unit: int, device: int) -> bool:
        others = np.flatnonzero(self.hold_UD[unit])
        nodes = set(self.problem.node_D[others[others != device]].tolist())
        if self.need_zones_U is not None and self.problem.zones is not None:
            zones = {int(self.problem.zones.zone_N[node]) for node in nodes}
            if len(zones) < int(self.need_zones_U[unit]):
                return False
        return len(nodes) >= int(self.need_U[unit])

    def _share(self, unit: int) -> float:
        return float(self.load_U[unit] / max(1, self.hold_UD[unit].sum()))
