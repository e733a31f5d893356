"""From observed load to the expert groups that should change their actor. Pure: the edge carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cluster.backend import GroupMove, Rebalance
from cluster.control.load import LoadLE, group_load
from cluster.errors import FailedPrecondition
from cluster.placement.moves import Copy, moves
from cluster.placement.placement import Placement
from cluster.placement.planner import Plan, plan
from cluster.placement.request import Device

MOVE_COST = 0.01
"""Of the average load of an actor: what a move must gain. Load over a window of steps varies by as much by itself."""


def propose(placement: Placement, load_LE: LoadLE, node_of: Mapping[str, str], group_bytes: int) -> Rebalance:
    """Every actor keeps its number of groups, so moves come in exchanges. `FailedPrecondition` without any load."""
    load_G = group_load(load_LE, placement)
    if not sum(load_G):
        raise FailedPrecondition("there is no load to balance yet; run training steps first")
    actors = placement.actors
    devices = tuple(Device(a, node_of.get(a, ""), slots=len(placement.groups_of(a))) for a in actors)
    old = Plan(devices, (tuple((actors.index(owner),) for owner in placement.owners),))
    new = plan([load_G], devices, previous=old, move_cost=MOVE_COST)
    steps = [step for step in moves(old, new, group_bytes) if isinstance(step, Copy)]
    return Rebalance(
        moves=tuple(GroupMove(s.unit, str(s.source), s.target, s.size_bytes) for s in steps),
        balance_before=old.mean_balance([load_G]),
        balance_after=new.mean_balance([load_G]),
        placement_epoch=placement.epoch,
        done=False,
        message="" if steps else "no exchange of groups would make the load more even by what it costs",
    )


def moved(placement: Placement, move: GroupMove) -> Placement:
    """The next epoch."""
    owners = [move.target if g == move.group else owner for g, owner in enumerate(placement.owners)]
    return replace(placement, epoch=placement.epoch + 1, owners=tuple(owners))
