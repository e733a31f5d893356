"""Moves of expert groups between actors."""

from __future__ import annotations

from cluster.backend import GroupMove, Rebalance
from protos.moecluster.v1 import cluster_pb2 as pb


def rebalance_to_message(rebalance: Rebalance) -> pb.RebalanceResponse:
    return pb.RebalanceResponse(
        moves=[_move_to_message(move) for move in rebalance.moves],
        balance_before=rebalance.balance_before,
        balance_after=rebalance.balance_after,
        placement_epoch=rebalance.placement_epoch,
        done=rebalance.done,
        message=rebalance.message,
    )


def rebalance_from_message(message: pb.RebalanceResponse) -> Rebalance:
    return Rebalance(
        moves=tuple(_move_from_message(move) for move in message.moves),
        balance_before=message.balance_before,
        balance_after=message.balance_after,
        placement_epoch=message.placement_epoch,
        done=message.done,
        message=message.message,
    )


def _move_to_message(move: GroupMove) -> pb.GroupMove:
    return pb.GroupMove(group=move.group, source=move.source, target=move.target, num_bytes=move.num_bytes)


def _move_from_message(message: pb.GroupMove) -> GroupMove:
    return GroupMove(message.group, message.source, message.target, message.num_bytes)
