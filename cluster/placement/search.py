"""Local search: takes load off the busiest device of every layer until no single change does.

All layers take a step at once. A change is good if all devices it touches end up below the busiest one's load, so the
sorted loads fall from step to step and the search ends. A stuck layer gets a few kicks: the least bad new copy.

    R layers that are still searched (rows)   K slots   M partners of the busiest device   C slots tried for a new copy
    D devices   N nodes   V units and the empty slot
"""

from __future__ import annotations

import numpy as np

from cluster.placement.packing import Bools, Floats, Ints, Layout, Problem

FEW_PARTNERS = 6
"""Least busy devices that are tried first; all others only if these do not help."""
SLOTS_TRIED = 12
GAIN = 1e-6
"""What a change must take off the busiest device's load, as a share of it."""
TOLERANCE = 1e-4
"""A layer is level when its busiest device has at most this share more than the least it can have."""
KICKS = 4
WORTH_A_KICK = 5e-3
"""A stuck layer whose busiest device has this share too much is changed for the worse, so often, to search on."""
MAX_STEPS = 600


class Trail:
    """Remembers the best layout on the way from an earlier plan: balance against copies moved.

    Scores `maximum / average + move_cost * moved + units on too few nodes + units in too few zones`; less is better.
    """

    def __init__(self, layout: Layout, kept_LUD: Bools, move_cost: float) -> None:
        self.kept_LUD = kept_LUD
        self.move_cost = move_cost
        self.best_LDK = layout.unit_LDK.copy()
        self.score_L = self._score(layout, np.arange(len(kept_LUD)))

    def _score(self, layout: Layout, rows: Ints) -> Floats:
        problem = layout.problem
        maximum_R = (layout.load_LD[rows] / problem.speed_D).max(-1)
        if not self.move_cost:
            return np.asarray(maximum_R)
        moved_R = (layout.hold_LUD[rows] & ~self.kept_LUD[rows]).sum((1, 2))
        lacking_R = ((layout.on_LVN[rows, :-1] > 0).sum(-1) < problem.redundancy).sum(-1)
        if problem.zones is not None:
            lacking_R = lacking_R + problem.zones.lacking(layout.on_LVN[rows, :-1])
        return np.asarray(maximum_R / problem.average_L[rows] + self.move_cost * moved_R + lacking_R)

    def note(self, layout: Layout, rows: Ints) -> None:
        score_R = self._score(layout, rows)
        better = score_R < self.score_L[rows]
        self.score_L[rows[better]] = score_R[better]
        self.best_LDK[rows[better]] = layout.unit_LDK[rows[better]]

    def restore(self, layout: Layout) -> None:
        layout.unit_LDK[:] = self.best_LDK
        layout.refresh(np.arange(len(self.best_LDK)))


def improve(layout: Layout, trail: Trail | None = None) -> None:
    """The best layout on the way, by the trail or else by balance alone."""
    if layout.load_LD.shape[1] == 1:
        return
    trail = trail or Trail(layout, layout.hold_LUD, move_cost=0.0)
    changes = (_swap_any, _copy_hot, _drop_copy) if layout.problem.hot_copies else (_swap_any, _drop_copy)
    kicks_L = np.full(len(layout.load_LD), KICKS if layout.problem.hot_copies else 0)
    rows = np.arange(len(layout.load_LD))
    for _ in range(MAX_STEPS):
        rows = rows[~_is_level(layout, rows, TOLERANCE)]
        if not rows.size:
            break
        improved = _swap(layout, rows, FEW_PARTNERS)
        stuck = ~improved
        for change in changes:
            if stuck.any():
                improved[stuck] = change(layout, rows[stuck])
                stuck = ~improved
        kicked = np.flatnonzero(stuck & (kicks_L[rows] > 0))
        kicked = kicked[~_is_level(layout, rows[kicked], WORTH_A_KICK)]
        if kicked.size:
            kicks_L[rows[kicked]] -= 1
            improved[kicked] = _copy_hot(layout, rows[kicked], at_any_price=True)
        rows = rows[improved]
        trail.note(layout, rows)
    trail.restore(layout)


def _is_level(layout: Layout, rows: Ints, tolerance: float) -> Bools:
    """Layers whose busiest device has the average of all, or of its node where units stay in theirs."""
    problem = layout.problem
    busy_RD = layout.load_LD[rows] / problem.speed_D
    floor_R = problem.average_L[rows]
    if problem.stays_in_node:
        node_DN = problem.node_D[:, None] == np.arange(problem.num_nodes)
        speed_N = problem.speed_D @ node_DN
        floor_R = np.maximum(floor_R, (layout.load_LD[rows] @ node_DN / speed_N).max(-1))
    return np.asarray(busy_RD.max(-1) <= floor_R * (1 + tolerance))


def _swap_any(layout: Layout, rows: Ints) -> Bools:
    return _swap(layout, rows, layout.load_LD.shape[1])


def _swap(layout: Layout, rows: Ints, num_partners: int) -> Bools:
    """Swaps a copy of the busiest device for a lighter one (or an empty slot) elsewhere. -> where it helped."""
    problem = layout.problem
    index = np.arange(len(rows))
    slowness_D = 1.0 / problem.speed_D
    busy_RD = layout.load_LD[rows] * slowness_D
    top = busy_RD.argmax(1)
    partner_RM = _partners(problem, busy_RD, top, num_partners)
    mine_RK, theirs_RMK = layout.unit_LDK[rows, top], layout.unit_LDK[rows[:, None], partner_RM]
    layer = rows[:, None, None]
    share_RK, share_RMK = layout.share_LV[rows[:, None], mine_RK], layout.share_LV[layer, theirs_RMK]
    bad_give_RKM = layout.held_LVD[layer, mine_RK[:, :, None], partner_RM[:, None]]
    bad_take_RMK = layout.held_LVD[layer, theirs_RMK, top[:, None, None]]
    slot_K = np.arange(theirs_RMK.shape[-1])
    bad_take_RMK |= slot_K >= problem.slots_D[partner_RM][..., None]
    if not (problem.stays_in_node or problem.goes_anywhere):
        bad_give_RKM |= _forbidden(layout, layer, mine_RK[:, :, None], top[:, None, None], partner_RM[:, None])
        bad_take_RMK |= _forbidden(layout, layer, theirs_RMK, partner_RM[:, :, None], top[:, None, None])
    # Where the change is not allowed the load is infinite; both sides are laid out as [R, K of mine, M, K of theirs].
    give = share_RK[:, :, None, None] - share_RMK[:, None]
    after_top = (layout.load_LD[rows, top][:, None, None, None] - give) * slowness_D[top][:, None, None, None]
    after_partner = layout.load_LD[rows[:, None], partner_RM][:, None, :, None] + give
    after_partner *= slowness_D[partner_RM][:, None, :, None]
    after = np.maximum(after_top, after_partner, out=after_top)
    after += np.where(bad_give_RKM, np.inf, 0.0)[..., None]
    after += np.where(bad_take_RMK, np.inf, 0.0)[:, None]
    best = after.reshape(len(rows), -1).argmin(1)
    k, m, slot = np.unravel_index(best, after.shape[1:])
    helped: Bools = after[index, k, m, slot] < busy_RD[index, top] * (1 - GAIN)
    good = np.flatnonzero(helped)
    _apply_swap(layout, rows[good], (top[good], k[good]), (partner_RM[good, m[good]], slot[good]))
    return helped


def _partners(problem: Problem, busy_RD: Floats, top: Ints, num_partners: int) -> Ints:
    """The least busy devices that copies of the busiest may go to; the busiest itself pads the list, to no effect."""
    index = np.arange(len(busy_RD))
    key_RD = busy_RD
    if problem.stays_in_node:
        key_RD = np.where(problem.node_D == problem.node_D[top][:, None], busy_RD, np.inf)
        num_partners = min(num_partners, int(np.bincount(problem.node_D).max()) - 1)
    else:
        key_RD = key_RD.copy()
    key_RD[index, top] = np.inf
    count = max(1, min(num_partners, busy_RD.shape[1] - 1))
    partner_RM = np.argpartition(key_RD, count - 1, axis=-1)[:, :count]
    return np.where(key_RD[index[:, None], partner_RM] < np.inf, partner_RM, top[:, None])


def _forbidden(layout: Layout, layer: Ints, unit: Ints, source: Ints, target: Ints) -> Bools:
    """Whether a copy may not go from one device to another: out of its homes, or too few nodes or zones are left."""
    problem = layout.problem
    leave, enter = problem.node_D[source], problem.node_D[target]
    nodes = (layout.on_LVN > 0).sum(-1)[layer, unit]
    nodes_after = nodes - (layout.on_LVN[layer, unit, leave] == 1) + (layout.on_LVN[layer, unit, enter] == 0)
    forbidden = nodes_after < problem.need_LV[layer, unit]
    if problem.zones is not None:
        forbidden |= _gathers(layout, layer, unit, leave, enter)
    if problem.home_bound:
        forbidden |= ~problem.allowed_LVN[layer, unit, enter]
    return np.asarray(forbidden & (leave != enter))


def _gathers(layout: Layout, layer: Ints, unit: Ints, leave: Ints, enter: Ints) -> Bools:
    """Whether too few zones are left with the unit when a copy goes from one node to another."""
    problem = layout.problem
    assert problem.zones is not None
    leave, enter = problem.zones.zone_N[leave], problem.zones.zone_N[enter]
    on_LVZ = problem.zones.on(layout.on_LVN)
    zones_after = (on_LVZ > 0).sum(-1)[layer, unit]
    zones_after = zones_after - (on_LVZ[layer, unit, leave] == 1) + (on_LVZ[layer, unit, enter] == 0)
    return np.asarray((zones_after < problem.need_zones_LV[layer, unit]) & (leave != enter))


def _apply_swap(layout: Layout, rows: Ints, here: tuple[Ints, Ints], there: tuple[Ints, Ints]) -> None:
    (device, slot), (other_device, other_slot) = here, there
    node_D = layout.problem.node_D
    unit, other = layout.unit_LDK[rows, device, slot], layout.unit_LDK[rows, other_device, other_slot]
    layout.unit_LDK[rows, device, slot], layout.unit_LDK[rows, other_device, other_slot] = other, unit
    give = layout.share_LV[rows, unit] - layout.share_LV[rows, other]
    layout.load_LD[rows, device] -= give
    layout.load_LD[rows, other_device] += give
    for moved, source, target in ((unit, device, other_device), (other, other_device, device)):
        layout.held_LVD[rows, moved, source], layout.held_LVD[rows, moved, target] = False, True
        layout.on_LVN[rows, moved, node_D[source]] -= 1
        layout.on_LVN[rows, moved, node_D[target]] += 1
    layout.held_LVD[rows, layout.empty] = False
    layout.on_LVN[rows, layout.empty] = 0


def _drop_copy(layout: Layout, rows: Ints) -> Bools:
    """The busiest device gives up a copy that can be missed; slow devices are better left with empty slots."""
    problem, index = layout.problem, np.arange(len(rows))
    busy_RD = layout.load_LD[rows] / problem.speed_D
    top = busy_RD.argmax(1)
    unit_RK = layout.unit_LDK[rows, top]
    spare_RK = _can_be_missed(layout, rows[:, None], unit_RK, problem.node_D[top][:, None])
    count_RK = np.maximum(2, layout.on_LVN[rows[:, None], unit_RK].sum(-1))
    rises_RK = layout.load_LV[rows[:, None], unit_RK] / (count_RK * (count_RK - 1))
    others_RKD = layout.held_LVD[rows[:, None], unit_RK] & (np.arange(busy_RD.shape[1]) != top[:, None])[:, None]
    after_RKD = busy_RD[:, None] + rises_RK[..., None] / problem.speed_D
    after_RK = np.where(spare_RK, np.where(others_RKD, after_RKD, 0.0).max(-1), np.inf)
    slot = after_RK.argmin(1)
    helped: Bools = after_RK[index, slot] < busy_RD[index, top] * (1 - GAIN)
    helped &= layout.load_LV[rows, unit_RK[index, slot]] > 0
    layout.unit_LDK[rows[helped], top[helped], slot[helped]] = layout.empty
    layout.refresh(rows[helped])
    return helped


def _can_be_missed(layout: Layout, layer: Ints, unit: Ints, node: Ints) -> Bools:
    """Whether a unit stays on enough nodes, in enough zones, without its copy on the device of that node."""
    problem = layout.problem
    spare = layout.on_LVN[layer, unit].sum(-1) > 1
    if not (problem.stays_in_node or problem.goes_anywhere):
        on_SN = layout.on_LVN[layer, unit]
        alone = layout.on_LVN[layer, unit, node] == 1
        spare &= (on_SN > 0).sum(-1) - alone >= problem.need_LV[layer, unit]
        if (zones := problem.zones) is not None:
            on_LVZ = zones.on(layout.on_LVN)
            alone = on_LVZ[layer, unit, zones.zone_N[node]] == 1
            spare &= (on_LVZ > 0).sum(-1)[layer, unit] - alone >= problem.need_zones_LV[layer, unit]
    return np.asarray(spare & (unit != layout.empty))


def _copy_hot(layout: Layout, rows: Ints, at_any_price: bool = False) -> Bools:
    """One more copy of a unit of the busiest device, in an empty slot or in place of a copy that can be missed."""
    problem, index = layout.problem, np.arange(len(rows))
    busy_RD = layout.load_LD[rows] / problem.speed_D
    top = busy_RD.argmax(1)
    device_RC, slot_RC, possible_RC = _cheap_slots(layout, rows, top)
    layer = rows[:, None, None]
    old_RC = layout.unit_LDK[rows[:, None], device_RC, slot_RC]
    new_RK = layout.unit_LDK[rows, top]
    count_LV = np.maximum(1, layout.on_LVN[rows].sum(-1))
    load_RV = layout.load_LV[rows]
    count_RK, count_RC = count_LV[index[:, None], new_RK], count_LV[index[:, None], old_RC]
    load_RK, load_RC = load_RV[index[:, None], new_RK], load_RV[index[:, None], old_RC]
    falls_RK, rises_RC = load_RK / (count_RK * (count_RK + 1)), load_RC / (count_RC * np.maximum(1, count_RC - 1))
    on_new_RKD, on_old_RCD = layout.held_LVD[rows[:, None], new_RK], layout.held_LVD[rows[:, None], old_RC]
    at_RCD = device_RC[..., None] == np.arange(busy_RD.shape[1])
    gain_RCD = np.where(at_RCD, -(load_RC / count_RC)[..., None], on_old_RCD * rises_RC[..., None])
    # [R, K, C, D]: loads after the change; only devices that it touches count.
    after = layout.load_LD[rows][:, None, None] + gain_RCD[:, None] - (on_new_RKD * falls_RK[..., None])[:, :, None]
    after += at_RCD[:, None] * (load_RK / (count_RK + 1))[:, :, None, None]
    touched = on_new_RKD[:, :, None] | (on_old_RCD | at_RCD)[:, None]
    after = np.where(touched, after / problem.speed_D, 0.0).max(-1)
    bad = layout.held_LVD[layer, new_RK[:, :, None], device_RC[:, None]] | ~possible_RC[:, None]
    bad |= (new_RK == layout.empty)[:, :, None]
    if problem.home_bound:
        bad |= ~problem.allowed_LVN[layer, new_RK[:, :, None], problem.node_D[device_RC][:, None]]
    after = np.where(bad, np.inf, after)
    k, c = np.unravel_index(after.reshape(len(rows), -1).argmin(1), after.shape[1:])
    limit_R = np.inf if at_any_price else busy_RD[index, top] * (1 - GAIN)
    helped: Bools = after[index, k, c] < limit_R
    good = np.flatnonzero(helped)
    chosen = c[good]
    layout.unit_LDK[rows[good], device_RC[good, chosen], slot_RC[good, chosen]] = new_RK[good, k[good]]
    layout.refresh(rows[good])
    return helped


def _cheap_slots(layout: Layout, rows: Ints, top: Ints) -> tuple[Ints, Ints, Bools]:
    """Slots that are empty or hold a copy that can be missed, on the least busy devices: device, slot, whether so."""
    problem = layout.problem
    unit_RDK = layout.unit_LDK[rows]
    layer, node = rows[:, None, None], problem.node_D[:, None]
    spare_RDK = _can_be_missed(layout, layer, unit_RDK, node) | (unit_RDK == layout.empty)
    spare_RDK &= np.arange(unit_RDK.shape[-1]) < problem.slots_D[:, None]
    if problem.stays_in_node:
        spare_RDK &= (problem.node_D == problem.node_D[top][:, None])[..., None]
    spare_RDK[np.arange(len(rows)), top] = False
    left_RDK = (layout.load_LD[rows][..., None] - layout.share_LV[layer, unit_RDK]) / problem.speed_D[:, None]
    key = np.where(spare_RDK, left_RDK, np.inf).reshape(len(rows), -1)
    count = min(SLOTS_TRIED, key.shape[1])
    chosen = np.argpartition(key, count - 1, axis=-1)[:, :count]
    device_RC, slot_RC = np.unravel_index(chosen, unit_RDK.shape[1:])
    return device_RC, slot_RC, np.take_along_axis(key, chosen, 1) < np.inf
