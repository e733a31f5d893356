"""The border between the exception tree and gRPC: one table, read in both directions.

An error leaves as `google.rpc.Status` with an `ErrorInfo` (class name as reason), a `BadRequest` where a field is to
blame, a `RetryInfo` where trying again is right, and a `RequestInfo` to find the log line by.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from actors import errors as actor_errors
from actors.errors import InvalidInput, LinkTimeout, MoeClusterError, RemoteError
from cluster import errors as cluster_errors
from cluster.errors import NotFound, ResourceExhausted, Unavailable

logger = logging.getLogger(__name__)

DOMAIN = "moecluster.v1"
MAX_TEXT_BYTES = 1000
"""Details travel in HTTP/2 trailers, of which peers take 8 KiB."""

Code = grpc.StatusCode
Detail = TypeVar("Detail", bound=Message)


@dataclass(frozen=True)
class Rule:
    code: grpc.StatusCode
    public: str | None = None
    """Text for the caller; None: the error's own, which was written for the caller."""
    retry_after_s: float | None = None
    """When trying the same call again is right; None: never."""


_INTERNAL = Rule(Code.INTERNAL, "internal error; the log of the front has it under this request id")
_EXPERT_AWAY = Rule(Code.UNAVAILABLE, "an expert actor did not answer; try again", retry_after_s=1.0)

TABLE: Mapping[type[MoeClusterError], Rule] = {
    actor_errors.MoeClusterError: _INTERNAL,
    actor_errors.InvalidInput: Rule(Code.INVALID_ARGUMENT),
    actor_errors.CheckpointError: Rule(Code.INVALID_ARGUMENT),
    actor_errors.CacheFull: Rule(Code.RESOURCE_EXHAUSTED),
    actor_errors.LinkError: _EXPERT_AWAY,
    actor_errors.PeerLost: _EXPERT_AWAY,
    actor_errors.LinkTimeout: _EXPERT_AWAY,
    actor_errors.ProtocolError: _INTERNAL,
    actor_errors.RemoteError: _INTERNAL,
    actor_errors.StepAborted: Rule(Code.ABORTED, retry_after_s=1.0),
    actor_errors.NonFinite: Rule(Code.FAILED_PRECONDITION),
    cluster_errors.ConfigError: Rule(Code.INVALID_ARGUMENT),
    cluster_errors.NotFound: Rule(Code.NOT_FOUND),
    cluster_errors.AlreadyExists: Rule(Code.ALREADY_EXISTS),
    cluster_errors.FailedPrecondition: Rule(Code.FAILED_PRECONDITION),
    cluster_errors.ResourceExhausted: Rule(Code.RESOURCE_EXHAUSTED, retry_after_s=1.0),
    cluster_errors.StorageFull: Rule(Code.RESOURCE_EXHAUSTED, retry_after_s=1.0),
    cluster_errors.Unavailable: Rule(Code.UNAVAILABLE, retry_after_s=1.0),
    cluster_errors.Unauthenticated: Rule(Code.UNAUTHENTICATED),
    cluster_errors.PermissionDenied: Rule(Code.PERMISSION_DENIED),
    cluster_errors.PortInUse: Rule(Code.FAILED_PRECONDITION),
    cluster_errors.StartupError: Rule(Code.FAILED_PRECONDITION),
}


def to_status(error: Exception, request_id: str) -> status_pb2.Status:
    """What the caller is told. Errors outside of the tree, or whose text is not for callers, do not show."""
    rule = rule_of(error)
    text = _shortened(str(error) if rule.public is None else rule.public)
    status = status_pb2.Status(code=rule.code.value[0], message=text)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=_reason(error, rule), domain=DOMAIN, metadata=_metadata(error)),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if isinstance(error, InvalidInput) and error.field:
        # A ConfigError says `SOURCE: path`; here the source is a field of the request.
        field = _shortened(error.field.replace(": ", "."), 200)
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if rule.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(int(rule.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def rule_of(error: Exception) -> Rule:
    """The entry of the error's class, or of the nearest class above it."""
    return next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), _INTERNAL)


def deadline_status(timeout_s: float, request_id: str) -> status_pb2.Status:
    text = f"not done within the {timeout_s:.3g} s that this call may take; give it a longer deadline"
    status = status_pb2.Status(code=Code.DEADLINE_EXCEEDED.value[0], message=text)
    for detail in (
        error_details_pb2.ErrorInfo(reason="DEADLINE_EXCEEDED", domain=DOMAIN),
        error_details_pb2.RequestInfo(request_id=request_id),
    ):
        status.details.add().Pack(detail)
    return status


def from_rpc_error(error: grpc.RpcError, target: str) -> MoeClusterError:
    """The error of our tree that the front at `target`, or gRPC on the way to it, reported."""
    code, text = error.code(), error.details() or ""
    info = _detail(error, error_details_pb2.ErrorInfo)
    if info is not None and info.domain == DOMAIN and info.reason in _BY_REASON:
        rebuilt = _BY_REASON[info.reason](text)
        if isinstance(rebuilt, InvalidInput):
            bad = _detail(error, error_details_pb2.BadRequest)
            rebuilt.field = bad.field_violations[0].field if bad is not None else ""
            rebuilt.remedy = info.metadata.get("remedy", "")
        return rebuilt
    if code is Code.DEADLINE_EXCEEDED:
        return LinkTimeout(text or "not done within the deadline", peer=target)
    if code in _BY_CODE:
        return _BY_CODE[code](text)
    if code in (Code.UNAVAILABLE, Code.CANCELLED):
        return Unavailable(_unreachable(text, target, from_front=info is not None))
    return RemoteError(f"{code.name}: {text}", peer=target)


def retry_after_s(error: grpc.RpcError) -> float | None:
    """The delay that the front asks for before the same call is tried again, if it does."""
    retry = _detail(error, error_details_pb2.RetryInfo)
    return retry.retry_delay.ToMilliseconds() / 1000 if retry is not None else None


def _unreachable(text: str, target: str, *, from_front: bool) -> str:
    if from_front:
        return text
    if "handshake failed" in text or "erification" in text:
        return f"the front at {target} could not be trusted; check --ca, --cert, --key and --server-name ({text})"
    return (
        f"no answer from a front at {target}; start one with `moe-cluster up`, or name another with --target; "
        f"one with TLS wants --ca, and may want --cert and --key ({text})"
    )


def _reason(error: Exception, rule: Rule) -> str:
    name = type(error).__name__ if rule is not _INTERNAL else "InternalError"
    return _reason_of(name)


def _reason_of(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()


def _metadata(error: Exception) -> dict[str, str]:
    return {"remedy": _shortened(error.remedy, 300)} if isinstance(error, InvalidInput) and error.remedy else {}


def _shortened(text: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Valid UTF-8 of at most `max_bytes`; file names in messages may hold bytes that are no text."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    return encoded[: max_bytes - 3].decode("utf-8", "ignore") + "..."


def _detail(error: Any, cls: type[Detail]) -> Detail | None:
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # a proxy rewrote the code or the text: the details are about something else
        return None
    for packed in status.details if status is not None else ():
        if packed.Is(cls.DESCRIPTOR):
            detail = cls()
            packed.Unpack(detail)
            return detail
    return None


# Classes that a message alone rebuilds. The others describe the inside of a cluster and reach callers by code.
_BY_REASON: Mapping[str, type[MoeClusterError]] = {
    _reason_of(cls.__name__): cls
    for cls, rule in TABLE.items()
    if rule.public is None and cls is not actor_errors.NonFinite
}
_BY_CODE: Mapping[grpc.StatusCode, type[MoeClusterError]] = {
    Code.INVALID_ARGUMENT: InvalidInput,
    Code.OUT_OF_RANGE: InvalidInput,
    Code.NOT_FOUND: NotFound,
    Code.ALREADY_EXISTS: cluster_errors.AlreadyExists,
    Code.FAILED_PRECONDITION: cluster_errors.FailedPrecondition,
    Code.RESOURCE_EXHAUSTED: ResourceExhausted,
    Code.ABORTED: actor_errors.StepAborted,
    Code.UNAUTHENTICATED: cluster_errors.Unauthenticated,
    Code.PERMISSION_DENIED: cluster_errors.PermissionDenied,
}
