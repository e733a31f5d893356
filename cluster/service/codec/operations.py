"""Long-running operations on the cluster."""

from __future__ import annotations

from dataclasses import replace

from actors.errors import InvalidInput
from actors.values import Growth
from cluster.backend import Operation, OperationState
from cluster.service.codec import checks, enums, times
from cluster.service.codec.checks import MAX_INT32, MAX_INT64, Range
from protos.moecluster.v1 import cluster_pb2 as pb

_KINDS = pb.OperationKind.DESCRIPTOR
_STATES = pb.OperationState.DESCRIPTOR
_MODES = pb.GrowthMode.DESCRIPTOR

DEFAULT_DEADLINE_S = 300.0
MAX_DEADLINE_S = 86_400.0


def check_scale(actors: int, request_id: str, field: str = "actors") -> None:
    checks.number(field, actors, Range(1, MAX_INT32))
    checks.identifier("request_id", request_id)


def drain_to_message(node: str, deadline_s: float, request_id: str) -> pb.DrainNodeRequest:
    request = pb.DrainNodeRequest(node=node, deadline_s=deadline_s, request_id=request_id)
    drain_from_message(request)
    return request


def drain_from_message(request: pb.DrainNodeRequest) -> tuple[str, float]:
    """-> name of the node, seconds until it must be empty."""
    checks.text("node", request.node, checks.MAX_ID_CHARS)
    deadline_s = request.deadline_s if request.HasField("deadline_s") else DEFAULT_DEADLINE_S
    checks.number("deadline_s", deadline_s, Range(0, MAX_DEADLINE_S, open_low=True))
    checks.identifier("request_id", request.request_id)
    return request.node, deadline_s


def growth_to_message(growth: Growth, request_id: str) -> pb.GrowModelRequest:
    """`InvalidInput` for what can be seen to be wrong without the model."""
    message = pb.GrowModelRequest(
        num_experts=_checked("num_experts", growth.num_experts, Range(1, MAX_INT32)),
        mode=enums.to_number(_MODES, growth.mode),
        perturbation=growth.perturbation,
        seed=_checked("seed", growth.seed, Range(0, MAX_INT64)),
        open_steps=_checked("open_steps", growth.open_steps, Range(1, MAX_INT32)),
        request_id=request_id,
    )
    if not message.mode:
        raise InvalidInput("no such mode", field="mode", value=growth.mode, remedy="use copy or fresh")
    growth_from_message(message)
    return message


def growth_from_message(message: pb.GrowModelRequest) -> Growth:
    checks.identifier("request_id", message.request_id)
    plain = Growth(_checked("num_experts", message.num_experts, Range(1, MAX_INT32)))
    perturbation = message.perturbation if message.HasField("perturbation") else plain.perturbation
    checks.number("perturbation", perturbation, Range(0, 1, open_high=True))
    return replace(
        plain,
        mode=enums.name_from_caller("mode", _MODES, message.mode) or plain.mode,
        perturbation=perturbation,
        seed=_checked("seed", message.seed, Range(0, MAX_INT64)),
        open_steps=_checked("open_steps", message.open_steps, Range(0, MAX_INT32)) or plain.open_steps,
    )


def _checked(field: str, value: int, allowed: Range) -> int:
    checks.number(field, value, allowed)
    return value


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
        node=operation.node,
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
        node=message.node,
    )
