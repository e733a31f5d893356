"""Long-running operations on the cluster."""

from __future__ import annotations

from cluster.backend import Operation, OperationState
from cluster.service.codec import checks, enums, times
from cluster.service.codec.checks import MAX_INT32, Range
from protos.moecluster.v1 import cluster_pb2 as pb

_KINDS = pb.OperationKind.DESCRIPTOR
_STATES = pb.OperationState.DESCRIPTOR


def check_scale(actors: int, request_id: str, field: str = "actors") -> None:
    checks.number(field, actors, Range(1, MAX_INT32))
    checks.identifier("request_id", request_id)


def operation_to_message(operation: Operation) -> pb.Operation:
    message = pb.Operation(
        id=operation.id,
        request_id=operation.request_id,
        kind=enums.to_number(_KINDS, operation.kind),
        state=enums.to_number(_STATES, operation.state.value),
        target=operation.target,
        progress=operation.progress,
        message=operation.message,
        create_time=times.to_message(operation.created_s),
        error=operation.error,
        prepare_s=operation.prepare_s,
        stall_s=operation.stall_s,
    )
    if operation.ended_s is not None:
        message.end_time.CopyFrom(times.to_message(operation.ended_s))
    return message


def operation_from_message(message: pb.Operation) -> Operation:
    return Operation(
        id=message.id,
        request_id=message.request_id,
        kind=enums.to_name(_KINDS, message.kind),
        state=OperationState(enums.to_name(_STATES, message.state)),
        target=message.target,
        progress=message.progress,
        message=message.message,
        created_s=times.from_message(message.create_time),
        ended_s=times.from_message(message.end_time) if message.HasField("end_time") else None,
        error=message.error,
        prepare_s=message.prepare_s,
        stall_s=message.stall_s,
    )
