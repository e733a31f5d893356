"""Who may call what on the front. Where there is a tokens file, a method that is not in the table is for nobody.

A call that is refused ends before its message is read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc

from actors.errors import MoeClusterError
from cluster.errors import PermissionDenied, Unauthenticated
from cluster.service import call as calls
from cluster.service.reload import Reloaded
from cluster.service.tokens import Caller, Role, TokenTable, read_tokens

KEY, SCHEME = "authorization", "bearer"

OPEN = frozenset(f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch", "List"))
"""For everybody: probes have no token."""


def _methods(service: str, *names: str) -> list[str]:
    return [f"/moecluster.v1.{service}/{name}" for name in names]


ROLES: Mapping[str, Role] = {
    **dict.fromkeys(_methods("InferenceService", "Generate", "Score", "Embed"), Role.INFER),
    **dict.fromkeys(_methods("ClusterService", "GetStatus"), Role.INFER),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.INFER,
    **dict.fromkeys(
        _methods("TrainingService", "SubmitJob", "GetJob", "ListJobs", "CancelJob", "WatchJob"), Role.TRAIN
    ),
    **dict.fromkeys(_methods("ClusterService", "GetLoad", "WatchLoad", "GetLedger", "ListCheckpoints"), Role.TRAIN),
    **dict.fromkeys(_methods("ClusterService", "GetOperation", "ListOperations", "WatchOperation"), Role.TRAIN),
    **dict.fromkeys(
        _methods(
            "ClusterService", "Rebalance", "ScaleExperts", "ScaleRouters", "DrainNode", "GrowModel", "CancelOperation"
        ),
        Role.ADMIN,
    ),
    **dict.fromkeys(_methods("ClusterService", "SaveCheckpoint", "ExportModel", "ImportModel"), Role.ADMIN),
}
"""The role that a method needs."""


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Inside of the one that translates errors and writes the log. Running calls are not looked at again."""

    def __init__(self, tokens_file: Path) -> None:
        """`InvalidInput` if the file cannot be used. What it says later holds for the calls from then on."""
        self._tokens: Reloaded[TokenTable] = Reloaded([tokens_file], lambda: read_tokens(tokens_file))

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        method = handler_call_details.method
        if method in OPEN:
            return await continuation(handler_call_details)
        try:
            caller = authenticated(self._tokens.current(), handler_call_details.invocation_metadata or ())
            calls.identify(caller.name)
            handler = await continuation(handler_call_details)
            if handler is not None:  # a method that does not exist is not forbidden
                authorize(caller, method)
        except (Unauthenticated, PermissionDenied) as error:
            return _refusing(error)
        return handler


def authenticated(tokens: TokenTable, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
    """Whose token the metadata of a call carries. `Unauthenticated` if none, or one that is not known."""
    given = [value for key, value in metadata if key == KEY]
    if not given:
        raise Unauthenticated(
            "this front wants a token: send `authorization: Bearer TOKEN`; with moe-cluster, give --token-file FILE "
            "or set MOE_CLUSTER_TOKEN"
        )
    scheme, _, token = str(given[0]).partition(" ")
    if len(given) > 1 or scheme.lower() != SCHEME or not token.strip():
        raise Unauthenticated("the metadata `authorization` must be one value: Bearer, a space and the token")
    caller = tokens.caller(token.strip())
    if caller is None:
        raise Unauthenticated(
            "this token is not known here, or not any more; ask who runs the cluster for a line in its tokens file"
        )
    return caller


def authorize(caller: Caller, method: str) -> None:
    """`PermissionDenied` unless the caller's role is that of the method or above it."""
    needed = ROLES.get(method)
    if needed is None:
        raise PermissionDenied(f"nobody may call {method}: it has no role")
    if caller.role < needed:
        raise PermissionDenied(
            f"{caller.name} may not call {method}: its role is {caller.role}, and {needed} is needed; "
            f"use a token with that role"
        )


def _refusing(error: MoeClusterError) -> grpc.RpcMethodHandler:
    """A handler for any kind of method, as none reads or writes a message."""

    async def refuse(requests: Any, context: Any) -> None:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)
