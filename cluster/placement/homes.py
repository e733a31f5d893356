"""Groups to their home nodes.

L layers   U units   G groups   N nodes
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.placement.packing import Bools, Floats, Ints, Problem
from cluster.placement.zones import Lodging, set_apart

GAIN = 1e-3
"""What a change must take off the busiest node's load to be made, as a share of it."""
MAX_SWAPS_TRIED = 4_000_000
"""Group swaps are tried all at once; above this number of them they are not."""


class Homes:
    """Which groups live on which nodes, layer by layer, and the slots and loads that follow. Mutable."""

    def __init__(self, problem: Problem, group_U: Ints) -> None:
        self.member_UG = group_U[:, None] == np.arange(group_U.max() + 1)
        self.size_G = self.member_UG.sum(0)
        self.load_LG = problem.load_LU @ self.member_UG
        self.load_LU = problem.load_LU
        self.slots_N = problem.per_node(problem.slots_D)
        self.slowness_N = 1.0 / np.maximum(problem.per_node(problem.speed_D * (problem.slots_D > 0)), 1e-300)
        shape = (*self.load_LG.shape, problem.num_nodes)
        self.homes_LGN = np.zeros(shape, dtype=np.bool_)
        self.layers = np.arange(shape[0])
        self.spans_LG = np.zeros(shape[:2], dtype=np.bool_)
        self.spanning_LUN = np.zeros((*problem.load_LU.shape, problem.num_nodes), dtype=np.bool_)
        self.wanted = min(problem.redundancy, problem.num_nodes)
        self.zones = problem.zones

    @property
    def room_LN(self) -> Ints:
        return np.asarray(self.slots_N - self.spanning_LUN.sum(1) - np.einsum("lgn,g->ln", self.homes_LGN, self.size_G))

    @property
    def share_LG(self) -> Floats:
        """Load of a group in each of its homes."""
        return np.asarray(self.load_LG / np.maximum(1, self.homes_LGN.sum(-1)))

    @property
    def busy_LN(self) -> Floats:
        return np.asarray(np.einsum("lgn,lg->ln", self.homes_LGN, self.share_LG) * self.slowness_N)

    def trim(self, rows: Ints) -> None:
        """At most `wanted` homes for each group."""
        homes_RGN = self.homes_LGN[rows]
        if self.zones is not None:
            self.homes_LGN[rows] = self.zones.first(homes_RGN, self.wanted)
        else:
            self.homes_LGN[rows] = homes_RGN & (np.cumsum(homes_RGN, axis=-1) <= self.wanted)

    def set_apart(self) -> None:
        """Groups into as many zones as wanted."""
        if self.zones is None:
            return
        for layer in np.flatnonzero(self.gathered_L()):
            lodging = Lodging(
                self.homes_LGN[layer], self.size_G, self.share_LG[layer], self.room_LN[layer], self.slowness_N
            )
            set_apart(self.zones, lodging, self.wanted)

    def gathered_L(self) -> Bools:
        """Layers in which whole groups are in fewer zones than wanted."""
        assert self.zones is not None
        few_LG = self.zones.number(self.homes_LGN) < self.zones.wanted
        return np.asarray((few_LG & self.homes_LGN.any(-1)).any(-1))

    def of_units(self) -> Bools:
        """[L, U, N]"""
        return np.asarray(self.homes_LGN[:, self.member_UG.argmax(1)] | self.spanning_LUN)

    def spill(self) -> None:
        """The units of a group that no node has room for go where there is room, hottest units first."""
        for layer, group in np.argwhere(~self.homes_LGN.any(-1)):
            units = np.flatnonzero(self.member_UG[:, group])
            spanning_UN, room_N = self.spanning_LUN[layer], self.room_LN[layer]
            for unit in units[np.argsort(-self.load_LU[layer, units], kind="stable")]:
                # A node that was chosen is filled up, so that the group spans as few as it can.
                chosen_N = spanning_UN[units].any(0) & (room_N > 0)
                node = int(np.where(chosen_N, room_N + room_N.max() + 1, room_N).argmax())
                spanning_UN[unit, node] = True
                room_N[node] -= 1
            self.spans_LG[layer, group] = True


@dataclass(frozen=True)
class Way:
    """How new homes are looked for; which is best depends on how well the copies fit in afterwards."""

    even: bool
    """No node gets more groups than its part of the slots, so that hot groups find slots for copies everywhere."""
    swaps: bool
    """Groups are swapped until nodes are as level as they get."""


WAYS = (Way(even=True, swaps=True), Way(even=True, swaps=False), Way(even=False, swaps=True))


def new_homes(problem: Problem, group_U: Ints, way: Way) -> Bools:
    """Home nodes of every unit, [L, U, N]: least busy nodes that have room, heaviest groups first."""
    homes = Homes(problem, group_U)
    slots_N = homes.slots_N
    if way.even:
        homes.slots_N = _even_slots(homes)
    _spread(homes, _homes_each(homes))
    if way.swaps:
        _swap_groups(homes)
    homes.slots_N = slots_N
    homes.spill()
    _complete(homes)
    homes.set_apart()
    if problem.home_bound and problem.hot_copies:
        _relieve(homes)
    return homes.of_units()


def _even_slots(homes: Homes) -> Ints:
    """Slots to give to groups such that every node gets its part of them; all slots if not all groups fit then."""
    num_groups, largest = len(homes.size_G), homes.size_G.max()
    needed = _homes_each(homes) * num_groups
    part_N = -(-needed * homes.slots_N // homes.slots_N.sum())
    fits = np.minimum(np.minimum(part_N, homes.slots_N // largest), num_groups).sum() >= needed
    return np.minimum(homes.slots_N, part_N * largest) if fits else homes.slots_N


def kept_homes(problem: Problem, group_U: Ints, kept_LUD: Bools) -> Bools:
    """The home nodes of an earlier plan's copies, with new ones for groups that have too few by now."""
    homes = Homes(problem, group_U)
    node_DN = (problem.node_D[:, None] == np.arange(problem.num_nodes)).astype(np.int64)
    on_LUN = (kept_LUD @ node_DN) > 0
    # A group lives where at least half of it is; the rest of it comes back there.
    count_LGN = np.einsum("lun,ug->lgn", on_LUN, homes.member_UG, dtype=np.int64)
    homes.homes_LGN[:] = 2 * count_LGN >= homes.size_G[:, None]
    if not (problem.home_bound and problem.hot_copies):
        # Copies beyond those that are needed make no home of a node.
        homes.trim(homes.layers)
    for layer in np.flatnonzero((homes.room_LN < 0).any(-1)):
        _shrink(homes, int(layer), count_LGN[layer])
    _complete(homes)
    _trim_for_room(homes)
    homes.set_apart()
    lost = np.flatnonzero(~homes.homes_LGN.any((1, 2)) | ~homes.homes_LGN.any(-1).all(-1))
    homes_LUN = homes.of_units()
    if lost.size:
        homes_LUN[lost] = new_homes(problem, group_U, WAYS[0])[lost]
    return homes_LUN


def _homes_each(homes: Homes) -> int:
    """The most homes, up to those wanted, that every group can have."""
    num_groups = len(homes.size_G)
    fit_N = homes.slots_N // homes.size_G.max()
    most = max(
        (r for r in range(1, homes.wanted + 1) if np.minimum(fit_N, num_groups).sum() >= r * num_groups), default=1
    )
    return min(most, int((fit_N > 0).sum()) or 1)


def _spread(homes: Homes, homes_each: int) -> None:
    """`homes_each` different nodes for every group, where they have room."""
    num_groups, largest = len(homes.size_G), homes.size_G.max()
    # Groups of one size: by load. Others: by size, as the large ones find room only in the beginning.
    order_LG = np.lexsort((-homes.load_LG, np.broadcast_to(-homes.size_G, homes.load_LG.shape)), axis=-1)
    room_LN = np.tile(homes.slots_N, (len(homes.layers), 1))
    load_LN = np.zeros(room_LN.shape)
    rows = homes.layers[:, None]
    for placed, group_L in enumerate(order_LG.T):
        size_L1 = homes.size_G[group_L][:, None]
        share_L1 = homes.load_LG[rows, group_L[:, None]] / homes_each
        key_LN = np.where(room_LN >= size_L1, (load_LN + share_L1) * homes.slowness_N, np.inf)
        if homes_each > 1:
            key_LN = _must_take(key_LN, room_LN // largest, num_groups - placed, homes_each)
        order_LN = np.argsort(key_LN, axis=-1, kind="stable") if homes.zones is None else homes.zones.order(key_LN)
        chosen_LH = order_LN[:, :homes_each]
        fits_LH = key_LN[rows, chosen_LH] < np.inf
        homes.homes_LGN[rows, group_L[:, None], chosen_LH] = fits_LH
        room_LN[rows, chosen_LH] -= size_L1 * fits_LH
        load_LN[rows, chosen_LH] += share_L1 * fits_LH


def _must_take(key_LN: Floats, fit_LN: Ints, groups_left: int, homes_each: int) -> Floats:
    """Puts first the nodes that must be taken now, else the last groups would not find enough different nodes.

    `groups_left` groups can use `min(fit, groups_left)` places of a node; passing over a node that fits them all
    wastes one.
    """
    critical_LN = (fit_LN >= groups_left) & (key_LN < np.inf)
    slack_L = np.minimum(fit_LN, groups_left).sum(-1) - homes_each * groups_left
    forced_L = np.maximum(0, critical_LN.sum(-1) - np.maximum(0, slack_L))
    rank_LN = np.argsort(np.argsort(np.where(critical_LN, key_LN, np.inf), axis=-1, kind="stable"), axis=-1)
    return np.where(critical_LN & (rank_LN < forced_L[:, None]), rank_LN - float(fit_LN.shape[1]), key_LN)


def _swap_groups(homes: Homes) -> None:
    """Swaps two groups, or moves one, off the busiest node while its load falls."""
    num_layers, num_groups, num_nodes = homes.homes_LGN.shape
    if num_nodes == 1 or num_layers * num_groups**2 * num_nodes > MAX_SWAPS_TRIED:
        return
    active = homes.layers
    while active.size:
        active = active[_swap_once(homes, active)]


def _swap_once(homes: Homes, rows: Ints) -> Bools:
    """One swap in each of the layers; whether there was a good one."""
    homes_RGN, share_RG = homes.homes_LGN[rows], homes.share_LG[rows]
    # The group after the last is none, so that a swap with it is a move.
    share_RH, size_H = np.pad(share_RG, ((0, 0), (0, 1))), np.append(homes.size_G, 0)
    homes_RHN = np.pad(homes_RGN, ((0, 0), (0, 1), (0, 0)))
    homes_RHN[:, -1] = False
    busy_RN, room_RN = homes.busy_LN[rows], homes.room_LN[rows]
    index, top = np.arange(len(rows)), busy_RN.argmax(1)
    on_top_RH = homes_RHN[index, :, top]
    give_RGHN = share_RG[:, :, None, None] - share_RH[:, None, :, None]
    grow_GH = homes.size_G[:, None] - size_H
    top_load_R = busy_RN[index, top]
    after_top = top_load_R[:, None, None, None] - give_RGHN * homes.slowness_N[top][:, None, None, None]
    after = np.maximum(after_top, busy_RN[:, None, None, :] + give_RGHN * homes.slowness_N)
    there_RHN = homes_RHN | (np.arange(len(size_H)) == len(homes.size_G))[:, None]
    may = on_top_RH[:, :-1, None, None] & ~homes_RGN[:, :, None, :]
    may = may & (there_RHN & ~on_top_RH[:, :, None])[:, None]
    if homes.zones is not None:
        may_RHN2 = homes.zones.may_swap(homes_RHN, top)
        may &= may_RHN2[:, :-1, None, :, 0] & may_RHN2[:, None, :, :, 1]
    may &= (grow_GH[:, :, None] <= room_RN[:, None, None, :]) & (-grow_GH <= room_RN[index, top][:, None, None])[
        ..., None
    ]
    after = np.where(may, after, np.inf).reshape(len(rows), -1)
    best = after.argmin(1)
    good: Bools = after[index, best] < top_load_R * (1 - GAIN)
    group, other, node = np.unravel_index(best, may.shape[1:])
    for row, g, h, n, p in zip(rows[good], group[good], other[good], node[good], top[good], strict=True):
        homes.homes_LGN[row, g, [p, n]] = [False, True]
        if h < len(homes.size_G):
            homes.homes_LGN[row, h, [p, n]] = [True, False]
    return good


def _complete(homes: Homes) -> None:
    """More homes, one a round, for the groups that have too few: first those with fewest, of these the hottest."""
    rows = np.flatnonzero(((homes.homes_LGN.sum(-1) < homes.wanted) & ~homes.spans_LG).any(-1))
    while rows.size:
        homes_RGN = homes.homes_LGN[rows]
        count_RG = homes_RGN.sum(-1)
        can_RGN = ~homes_RGN & (homes.room_LN[rows][:, None] >= homes.size_G[:, None])
        open_RG = can_RGN.any(-1) & (count_RG < homes.wanted) & ~homes.spans_LG[rows]
        key_RG = np.where(open_RG, homes.load_LG[rows] - count_RG * (homes.load_LG[rows].max() + 1), -np.inf)
        group_R = key_RG.argmax(1)
        index = np.flatnonzero(open_RG.any(-1))
        rows, group = rows[index], group_R[index]
        busy_RN = np.where(can_RGN[index, group], homes.busy_LN[rows], np.inf)
        if homes.zones is not None:
            taken_RZ = homes.zones.on(homes.homes_LGN[rows, group]) > 0
            elsewhere_RN = (busy_RN < np.inf) & ~taken_RZ[:, homes.zones.zone_N]
            busy_RN = np.where(elsewhere_RN.any(-1, keepdims=True) & ~elsewhere_RN, np.inf, busy_RN)
        homes.homes_LGN[rows, group, busy_RN.argmin(1)] = True


def _relieve(homes: Homes) -> None:
    """One more home for the hottest group of the busiest node, while a node has room for it and the load falls."""
    rows = homes.layers
    while rows.size:
        index = np.arange(len(rows))
        homes_RGN, busy_RN = homes.homes_LGN[rows], homes.busy_LN[rows]
        top = busy_RN.argmax(1)
        can_RGN = ~homes_RGN & (homes.room_LN[rows][:, None] >= homes.size_G[:, None])
        key_RG = np.where(can_RGN.any(-1) & homes_RGN[index, :, top], homes.share_LG[rows], -1.0)
        group = key_RG.argmax(1)
        node = np.where(can_RGN[index, group], busy_RN, np.inf).argmin(1)
        rows, group, node, before = (x[key_RG[index, group] > 0] for x in (rows, group, node, busy_RN.max(1)))
        homes.homes_LGN[rows, group, node] = True
        worse = homes.busy_LN[rows].max(1) >= before * (1 - GAIN)
        homes.homes_LGN[rows[worse], group[worse], node[worse]] = False
        rows = rows[~worse]


def _shrink(homes: Homes, layer: int, count_GN: Ints) -> None:
    """Nodes with less slots than their groups need give up the groups of which they hold least."""
    for node in np.flatnonzero(homes.room_LN[layer] < 0):
        while homes.room_LN[layer, node] < 0:
            here = np.flatnonzero(homes.homes_LGN[layer, :, node])
            others_G = homes.homes_LGN[layer].sum(-1)
            group = min(here, key=lambda g: (others_G[g] == 1, count_GN[g, node]))
            homes.homes_LGN[layer, group, node] = False


def _trim_for_room(homes: Homes) -> None:
    """Layers with a group that lacks homes: groups with more than they need give them up, and it is tried again."""
    count_LG = homes.homes_LGN.sum(-1)
    short_L = (count_LG < homes.wanted).any(-1)
    if homes.zones is not None:
        short_L |= homes.gathered_L()
    short = np.flatnonzero(short_L & (count_LG > homes.wanted).any(-1))
    if short.size:
        homes.trim(short)
        _complete(homes)
