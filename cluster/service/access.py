"""The client's side of TLS and tokens: how it knows the front, and shows who it is."""

from __future__ import annotations

import ipaddress
import logging
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from actors.errors import InvalidInput
from cluster.service.auth import KEY
from cluster.service.reload import Reloaded, read_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """Empty: a front without TLS and tokens. File names are PEM files but `token_file`, which holds one line."""

    token: str = field(default="", repr=False)
    token_file: str = ""
    """Read again when it changes."""
    ca: str = ""
    """Who signs the front's certificate; with it the connection is TLS."""
    certificate: str = ""
    """With `key`: for a front that lets in only clients with one."""
    key: str = ""
    server_name: str = ""
    """Name in the front's certificate, where it is reached under another."""

    def __post_init__(self) -> None:
        _check(not (self.token and self.token_file), "token_file", "there is a token already", "give one of them")
        _check(bool(self.certificate) == bool(self.key), "certificate", "and key go together", "give both or neither")
        _check(bool(self.ca) or not self.certificate, "certificate", "is for TLS", "give the ca as well")
        _check(bool(self.ca) or not self.server_name, "server_name", "is for TLS", "give the ca as well")


def open_channel(target: str, access: Access, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
    """`InvalidInput` if a file cannot be used."""
    channel = _secure(target, access, options) if access.ca else grpc.insecure_channel(target, options=options)
    token = _token(access)
    if token is None:
        return channel
    if not access.ca and not is_loopback(target.rpartition(":")[0].strip("[]")):
        logger.warning("the token travels to %s in clear text; with TLS on the front, give --ca", target)
    return grpc.intercept_channel(channel, _Bearer(token))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "unix")


def _secure(target: str, access: Access, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(
        read_bytes(Path(access.ca), "ca"),
        read_bytes(Path(access.key), "key") if access.key else None,
        read_bytes(Path(access.certificate), "certificate") if access.certificate else None,
    )
    named = [("grpc.ssl_target_name_override", access.server_name)] if access.server_name else []
    return grpc.secure_channel(target, credentials, options=[*options, *named])


def _token(access: Access) -> Callable[[], str] | None:
    if access.token:
        return lambda: access.token
    if not access.token_file:
        return None
    file = Path(access.token_file)
    return Reloaded([file], lambda: _read_token(file)).current


def _read_token(file: Path) -> str:
    words = read_bytes(file, "token_file").decode(errors="replace").split()
    _check(len(words) == 1 and words[0].isascii(), "token_file", f"{file} holds no single token", "write one line")
    return words[0]


class _Details(  # type: ignore[misc]
    namedtuple("_Details", ("method", "timeout", "metadata", "credentials", "wait_for_ready", "compression")),
    grpc.ClientCallDetails,
):
    """gRPC gives an interceptor no way to make one of its own."""


class _Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the token to every call. gRPC's own call credentials work over TLS alone."""

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_token(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_token(details), request)

    def _with_token(self, details: Any) -> _Details:
        metadata = [*(details.metadata or ()), (KEY, f"Bearer {self._token()}")]
        return _Details(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready, details.compression
        )


def _check(condition: bool, field_name: str, message: str, remedy: str) -> None:
    if not condition:
        raise InvalidInput(message, field=field_name, remedy=remedy)
