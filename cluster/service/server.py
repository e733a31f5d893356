"""The gRPC front: stateless, so any number of them may stand before one cluster."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from actors.errors import InvalidInput, LinkTimeout, MoeClusterError
from cluster.backend import Backend
from cluster.config import FrontConfig
from cluster.errors import PortInUse
from cluster.service import tls
from cluster.service.access import is_loopback
from cluster.service.auth import AuthInterceptor
from cluster.service.cluster import ClusterServicer
from cluster.service.health import HealthServicer
from cluster.service.inference import InferenceServicer
from cluster.service.interceptors import FrontInterceptor
from cluster.service.metrics.endpoint import MetricsEndpoint
from cluster.service.training import TrainingServicer
from protos.moecluster.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

logger = logging.getLogger(__name__)

SERVICES = tuple(
    service.full_name
    for module in (cluster_pb2, inference_pb2, training_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
)
ALIVE = "moecluster.alive"
"""Name in grpc.health.v1 that is SERVING while the front answers, whether or not the cluster is ready: to start it anew
would not make a cluster ready that returns to a checkpoint just now."""
MAX_METADATA_BYTES = 16 << 10
PROBE_HEADROOM = 16
"""Health and reflection calls that still get in when `max_concurrent_rpcs` calls of our own services run."""
HEALTH_TIMEOUT_S = 5.0

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Front:
    """Serves a backend on the host and port of `config`. One `start`, one `stop`."""

    def __init__(self, backend: Backend, config: FrontConfig | None = None, *, health_interval_s: float = 1.0) -> None:
        self._backend = backend
        self._config = config or FrontConfig()
        self._health_interval_s = health_interval_s
        self._health = HealthServicer()
        self._metrics = MetricsEndpoint(backend)
        self._interceptor = FrontInterceptor(
            max_concurrent=self._config.max_concurrent_rpcs, metrics=self._metrics.calls
        )
        self._server: grpc.aio.Server | None = None
        self._probed: grpc.aio.Server | None = None
        self._follower: asyncio.Task[None] | None = None
        self._ready: bool | None = None
        self._was_ready = asyncio.Event()
        self._port = self._health_port = self._metrics_port = 0

    @property
    def port(self) -> int:
        """The one listened on, known after `start`."""
        return self._port

    @property
    def target(self) -> str:
        return _address(self._config.host, self._port)

    @property
    def health_target(self) -> str:
        """Where `front.health_port` is served, known after `start`."""
        return _address(self._config.host, self._health_port)

    @property
    def metrics_port(self) -> int:
        """Where `front.metrics_port` is served, known after `start`."""
        return self._metrics_port

    async def start(self) -> None:
        """Listens when it returns; health tells when the backend is ready. `PortInUse` if the port is taken,
        `InvalidInput` if a file of tokens or TLS cannot be used."""
        server = grpc.aio.server(
            # The outermost first: it logs and translates what the inner one refuses.
            interceptors=(self._interceptor, *_guards(self._config)),
            options=_options(self._config),
            maximum_concurrent_rpcs=self._config.max_concurrent_rpcs + PROBE_HEADROOM,
        )
        self._add_servicers(server)
        credentials = tls.server_credentials(self._config.tls)
        self._port = _bind(server, self._config.host, self._config.port, credentials)
        self._probed = self._bound_for_probes()
        _warn_of_strangers(self._config)
        await self._set_health(ready=False)
        await self._health.set(ALIVE, _SERVING)
        if self._config.metrics_port is not None:
            self._metrics_port = self._metrics.start(self._config.host, self._config.metrics_port)
        await server.start()
        if self._probed is not None:
            await self._probed.start()
        self._server = server
        self._follower = asyncio.create_task(self._follow_backend(), name="front-health")
        logger.info("front listens on %s", self.target)

    async def stop(self, grace_s: float | None = None) -> None:
        """NOT_SERVING first, then no new calls; running ones may end within the grace (default: of the config)."""
        server, self._server = self._server, None
        if server is None:
            return
        await self._health.enter_graceful_shutdown()
        if self._follower is not None:
            self._follower.cancel()
            with suppress(asyncio.CancelledError):
                await self._follower
        self._interceptor.drain()
        grace_s = self._config.shutdown_grace_s if grace_s is None else grace_s
        await asyncio.gather(*(each.stop(grace_s) for each in (server, self._probed) if each is not None))
        await self._metrics.stop()
        logger.info("front on %s has stopped", self.target)

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns when health has said SERVING; `LinkTimeout` if it has not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._was_ready.wait()
        except TimeoutError:
            raise LinkTimeout(f"the cluster was not ready within {timeout_s:.3g} s", peer=self.target) from None

    async def wait(self) -> None:
        """Returns after `stop`."""
        if self._server is not None:
            await self._server.wait_for_termination()

    def _bound_for_probes(self) -> grpc.aio.Server | None:
        if self._config.health_port is None:
            return None
        server = grpc.aio.server(
            interceptors=(self._interceptor,),
            options=_options(self._config),
            maximum_concurrent_rpcs=PROBE_HEADROOM,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._health_port = _bind(server, self._config.host, self._config.health_port, None, "front.health_port")
        return server

    def _add_servicers(self, server: grpc.aio.Server) -> None:
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(ClusterServicer(self._backend), server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(self._backend, self._metrics.calls), server
        )
        training_pb2_grpc.add_TrainingServiceServicer_to_server(TrainingServicer(self._backend), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if not _is_reflected(self._config):
            return
        names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflector = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]  # newer than the stubs
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflector, server)

    async def _follow_backend(self) -> None:
        while True:
            await self._set_health(ready=await self._is_ready())
            await asyncio.sleep(self._health_interval_s)

    async def _is_ready(self) -> bool:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                return (await self._backend.status(timeout_s=HEALTH_TIMEOUT_S)).ready
        except (MoeClusterError, TimeoutError) as error:
            if self._ready:
                logger.warning("the cluster does not answer: %s", error)
        except Exception:  # the loop must survive whatever a backend does, or health would stay as it was
            logger.exception("the cluster's status failed")
        return False

    async def _set_health(self, *, ready: bool) -> None:
        if ready == self._ready:
            return
        self._ready = ready
        logger.info("health is %s", "SERVING" if ready else "NOT_SERVING")
        for service in ("", *SERVICES):
            await self._health.set(service, _SERVING if ready else _NOT_SERVING)
        if ready:
            self._was_ready.set()


def _options(config: FrontConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_receive_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        # With it, a second front on the same port would silently share the calls of the first.
        ("grpc.so_reuseport", 0),
        # Finds dead callers, and lets callers ping as often while they wait for a slow generation.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]


def _bind(
    server: grpc.aio.Server,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None,
    field: str = "front.port",
) -> int:
    try:
        bound: int = (
            server.add_insecure_port(_address(host, port))
            if credentials is None
            else server.add_secure_port(_address(host, port), credentials)
        )
    except RuntimeError as error:
        check_port(host, port, field)
        raise _taken(host, port, field) from error
    return bound


def check_front(config: FrontConfig) -> None:
    """Raises what `Front.start` would raise now."""
    check_port(config.host, config.port)
    if config.health_port is not None:
        check_port(config.host, config.health_port, "front.health_port")
    if config.metrics_port is not None:
        check_port(config.host, config.metrics_port, "front.metrics_port")
    tls.server_credentials(config.tls)
    _guards(config)


def _guards(config: FrontConfig) -> Sequence[AuthInterceptor]:
    return [AuthInterceptor(Path(config.auth.tokens_file))] if config.auth.tokens_file else []


def _is_reflected(config: FrontConfig) -> bool:
    return config.reflection == "on" or (config.reflection == "auto" and not config.auth.tokens_file)


def _warn_of_strangers(config: FrontConfig) -> None:
    if is_loopback(config.host):
        return
    address = _address(config.host, config.port)
    if not (config.auth.tokens_file or config.tls.client_ca):
        logger.warning("whoever reaches %s may do everything; set front.auth.tokens_file or front.tls", address)
    elif not config.tls.certificate:
        logger.warning("tokens travel to %s in clear text; set front.tls.certificate and front.tls.key", address)


def check_port(host: str, port: int, field: str = "front.port") -> None:
    """`PortInUse` or `InvalidInput` if nobody could listen there now; gRPC itself does not say why it could not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _taken(host, port, field) from error
        remedy = "give an address of this machine and a free port above 1023"
        raise InvalidInput(
            f"cannot be listened on: {error}", field="front", value=(host, port), remedy=remedy
        ) from None


def _taken(host: str, port: int, field: str) -> PortInUse:
    return PortInUse(
        f"{_address(host, port)} is taken by another process; end it, or set {field} to another (0: any free one)"
    )


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
