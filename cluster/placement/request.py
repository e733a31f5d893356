"""What is asked of the planner: the devices, what cannot be asked, and what was asked but could not be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.errors import InvalidInput
from cluster.placement.packing import Bools, Floats, Ints, Problem
from cluster.placement.zones import Zones


@dataclass(frozen=True)
class Device:
    actor: str
    node: str
    slots: int
    """Unit copies it can hold of each layer."""
    speed: float = 1.0
    """Work a second next to the others: a straggler has less."""
    zone: str = ""
    """Of its node; empty if it is not known."""


def check_request(
    load_LU: Floats, devices: Sequence[Device], group_U: Sequence[int] | None, redundancy: int, move_cost: float
) -> None:
    if load_LU.ndim != 2 or 0 in load_LU.shape:
        raise InvalidInput("is not one row of loads a layer", field="load_LU", value=load_LU.shape, remedy="use [L, U]")
    if not np.isfinite(load_LU).all() or (load_LU < 0).any():
        worst = float(load_LU[~np.isfinite(load_LU) | (load_LU < 0)][0])
        raise InvalidInput("has a load that is none", field="load_LU", value=worst, remedy="use finite loads from 0 up")
    num_units = load_LU.shape[1]
    if group_U is not None and len(group_U) != num_units:
        remedy = f"give one group number for each of the {num_units} units"
        raise InvalidInput("has another length than a row of loads", field="group_U", value=len(group_U), remedy=remedy)
    if redundancy < 1:
        raise InvalidInput("is below 1", field="redundancy", value=redundancy, remedy="use 1 or more")
    if not move_cost >= 0:
        raise InvalidInput("is below 0", field="move_cost", value=move_cost, remedy="use 0 or more")
    _check_devices(devices, num_units)


def _check_devices(devices: Sequence[Device], num_units: int) -> None:
    if not devices:
        raise InvalidInput("there is no device", field="devices", value=0, remedy="use 1 or more")
    actors = [device.actor for device in devices]
    if len(set(actors)) < len(actors):
        raise InvalidInput("an actor is named twice", field="devices", value=actors)
    for device in devices:
        if device.slots < 0:
            remedy = "use 0 or more"
            raise InvalidInput(f"{device.actor} has slots below 0", field="devices", value=device.slots, remedy=remedy)
        if not 0 < device.speed < float("inf"):
            remedy = "use a number above 0"
            raise InvalidInput(f"{device.actor} has no speed", field="devices", value=device.speed, remedy=remedy)
    slots = sum(device.slots for device in devices)
    if slots < num_units:
        remedy = f"add devices or slots for {num_units - slots} more units a layer"
        raise InvalidInput(f"less slots than the {num_units} units", field="devices", value=slots, remedy=remedy)


def unmet(hold_LUD: Bools, problem: Problem, group_U: Ints, devices: Sequence[Device]) -> tuple[str, ...]:
    """Read off the plan itself, whatever the way it was made."""
    node_DN = (problem.node_D[:, None] == np.arange(problem.num_nodes)).astype(np.float32)
    on_LUN = hold_LUD @ node_DN > 0
    sentences = []
    lacking_L = (on_LUN.sum(-1) < problem.redundancy).sum(-1)
    if lacking_L.any():
        sentences.append(_lacking_copies(lacking_L, hold_LUD.shape[1], problem))
    if problem.zones is not None:
        sentences += _gathered_copies(on_LUN, problem.zones)
    if problem.home_bound:
        names = list(dict.fromkeys(device.node for device in devices))
        sentences += _spanning_groups(on_LUN, group_U, names)
    return tuple(sentences)


def _lacking_copies(lacking_L: Ints, num_units: int, problem: Problem) -> str:
    wanted, slots = problem.redundancy, int(problem.slots_D.sum())
    if wanted > problem.num_nodes:
        reason = f"needs {wanted} nodes, {problem.num_nodes} are there"
    elif wanted * num_units > slots:
        reason = f"needs {wanted * num_units} slots, {slots} are there"
    else:
        reason = "does not fit the slots of the nodes"
    layers = np.count_nonzero(lacking_L)
    return (
        f"redundancy {wanted} {reason}: in {layers} of {len(lacking_L)} layers up to {lacking_L.max()} of {num_units} "
        "units are on fewer nodes"
    )


def _gathered_copies(on_LUN: Bools, zones: Zones) -> list[str]:
    """Units with copies in fewer zones than they could be in if there were more room."""
    lacking_L = zones.lacking(on_LUN)
    if not lacking_L.any():
        return []
    layers = np.count_nonzero(lacking_L)
    return [
        f"copies in {zones.wanted} zones do not fit the slots of the zones: in {layers} of {len(lacking_L)} layers up "
        f"to {lacking_L.max()} of {on_LUN.shape[1]} units are in fewer zones"
    ]


def _spanning_groups(on_LUN: Bools, group_U: Ints, nodes: list[str]) -> list[str]:
    """Groups that are whole in no node."""
    sentences = []
    for group in np.unique(group_U):
        on_LMN = on_LUN[:, group_U == group]
        layers = np.flatnonzero(~on_LMN.all(1).any(-1))
        if layers.size:
            first = int(layers[0])
            spans = [nodes[n] for n in np.flatnonzero(on_LMN[first].any(0))]
            sentences.append(
                f"group {group} spans {len(spans)} nodes in {layers.size} of {len(on_LMN)} layers "
                f"(layer {first}: {', '.join(spans)}): no node had room for its {on_LMN.shape[1]} units"
            )
    return sentences
