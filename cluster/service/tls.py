"""TLS of the front, from mounted files that may be exchanged while it runs."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from actors.errors import InvalidInput
from cluster.config import TlsConfig
from cluster.service.reload import Reloaded, read_bytes


def server_credentials(config: TlsConfig) -> grpc.ServerCredentials | None:
    """None without a certificate. `InvalidInput` that names the field if a file cannot be used.

    Every new connection is made with the files as they are then. Those that do not fit together, as while they are
    being exchanged, are not taken: the ones before stay in use.
    """
    if not config.certificate:
        return None
    files = [Path(name) for name in (config.certificate, config.key, config.client_ca) if name]
    reloaded = Reloaded(files, lambda: _read(config))
    given = first = reloaded.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC for each connection, from threads of its own. None: nothing new."""
        nonlocal given
        now = reloaded.current()
        if now is given:
            return None
        given = now
        return now

    wants_clients = bool(config.client_ca)
    return grpc.dynamic_ssl_server_credentials(first, changed, wants_clients)  # type: ignore[arg-type]  # None is fine


def _read(config: TlsConfig) -> grpc.ServerCertificateConfiguration:
    certificate = read_bytes(Path(config.certificate), "front.tls.certificate")
    key = read_bytes(Path(config.key), "front.tls.key")
    client_ca = read_bytes(Path(config.client_ca), "front.tls.client_ca") if config.client_ca else None
    _check(config)
    return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)


def _check(config: TlsConfig) -> None:
    """gRPC itself says of bad files no more than that a handshake failed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # The empty password: OpenSSL would ask the terminal for that of an encrypted key.
        context.load_cert_chain(config.certificate, config.key, password="")
    except (ssl.SSLError, OSError) as error:
        remedy = f"they must be PEM, belong together, and the key {config.key} be without a password"
        raise InvalidInput(
            f"cannot be used with front.tls.key: {_reason(error)}",
            field="front.tls.certificate",
            value=config.certificate,
            remedy=remedy,
        ) from None
    if not config.client_ca:
        return
    try:
        context.load_verify_locations(config.client_ca)
    except (ssl.SSLError, OSError) as error:
        raise InvalidInput(
            f"cannot be used: {_reason(error)}",
            field="front.tls.client_ca",
            value=config.client_ca,
            remedy="give the PEM certificates of who signs the clients'",
        ) from None


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", "") or error.strerror or "no PEM in it")
