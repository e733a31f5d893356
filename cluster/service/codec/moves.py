"""Moves of expert groups between actors."""

from __future__ import annotations

from cluster.backend import GroupMove, Rebalance
from cluster.service.codec import enums
from protos.moecluster.v1 import cluster_pb2 as pb

_KINDS = pb.MoveKind.DESCRIPTOR


def rebalance_to_message(rebalance: Rebalance) -> pb.RebalanceResponse:
    return pb.RebalanceResponse(
        moves=[_move_to_message(move) for move in rebalance.moves],
        balance_before=rebalance.balance_before,
        balance_after=rebalance.balance_after,
        placement_epoch=rebalance.placement_epoch,
        done=rebalance.done,
        message=rebalance.message,
        unmet=rebalance.unmet,
        stall_s=rebalance.stall_s,
    )


def rebalance_from_message(message: pb.RebalanceResponse) -> Rebalance:
    return Rebalance(
        moves=tuple(_move_from_message(move) for move in message.moves),
        balance_before=message.balance_before,
        balance_after=message.balance_after,
        placement_epoch=message.placement_epoch,
        done=message.done,
        message=message.message,
        unmet=tuple(message.unmet),
        stall_s=message.stall_s,
    )


def _move_to_message(move: GroupMove) -> pb.GroupMove:
    return pb.GroupMove(
        group=move.group,
        source=move.source,
        target=move.target,
        num_bytes=move.num_bytes,
        kind=enums.to_number(_KINDS, move.kind),
    )


def _move_from_message(message: pb.GroupMove) -> GroupMove:
    kind = enums.to_name(_KINDS, message.kind)
    return GroupMove(message.group, message.source, message.target, message.num_bytes, kind)
