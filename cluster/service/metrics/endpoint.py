"""The HTTP endpoint that Prometheus scrapes, beside the gRPC port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from actors.errors import MoeClusterError
from cluster.backend import Backend, Job, JobEvent, JobState
from cluster.errors import PortInUse
from cluster.service.metrics.calls import CallMetrics
from cluster.service.metrics.snapshot import Snapshot, families

logger = logging.getLogger(__name__)

SCRAPE_TIMEOUT_S = 5.0
RECENT_EVENTS = 20
"""Newest events of a job, among which its last step is looked for."""


class MetricsEndpoint:
    """`calls` is for the front to note its calls; `start` and `stop` belong to the front's event loop."""

    def __init__(self, backend: Backend) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self.calls = CallMetrics(self._registry)
        self._collector = ClusterCollector(backend)
        self._http: tuple[WSGIServer, Thread] | None = None

    def start(self, host: str, port: int) -> int:
        """-> the port; 0 takes a free one. `PortInUse` if it is taken."""
        self._collector.loop = asyncio.get_running_loop()
        self._registry.register(self._collector)
        try:
            self._http = start_http_server(port, host, self._registry)
        except OSError as error:
            raise PortInUse(
                f"{host}:{port} cannot be listened on ({error}); set front.metrics_port to another"
            ) from error
        bound: int = self._http[0].server_address[1]
        logger.info("metrics are at http://%s:%d/metrics", host, bound)
        return bound

    async def stop(self) -> None:
        if self._http is not None:
            server, thread = self._http
            self._http = None
            self._collector.loop = None
            # A scrape that is under way waits for this loop, which must therefore go on.
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            await asyncio.to_thread(thread.join, SCRAPE_TIMEOUT_S)


class ClusterCollector(Collector):
    """Asks the cluster when it is scraped, so that nothing is done when it is not."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.loop: asyncio.AbstractEventLoop | None = None

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("moe_cluster_up", "Whether the cluster told its state.")
        try:
            found = list(families(self._snapshot()))
        except (MoeClusterError, TimeoutError) as error:
            logger.warning("the cluster tells no metrics: %s", error)
            found = []
        up.add_metric([], float(bool(found)))
        return [up, *found]

    def _snapshot(self) -> Snapshot:
        if self.loop is None:
            raise TimeoutError("the front is stopping")
        future = asyncio.run_coroutine_threadsafe(snapshot(self._backend, SCRAPE_TIMEOUT_S), self.loop)
        try:
            return future.result(SCRAPE_TIMEOUT_S)
        finally:
            future.cancel()


async def snapshot(backend: Backend, timeout_s: float) -> Snapshot:
    calls: list[Any] = [
        backend.status(timeout_s=timeout_s),
        backend.load_report(timeout_s=timeout_s),
        backend.ledger(0, timeout_s=timeout_s),
        backend.list_jobs(timeout_s=timeout_s),
    ]
    status, load, entries, jobs = await asyncio.gather(*calls)
    job = _running(jobs)
    return Snapshot(status, load, entries, job, await _last_step(backend, job) if job else None)


def _running(jobs: Sequence[Job]) -> Job | None:
    return next((job for job in jobs if job.state in (JobState.RUNNING, JobState.CANCELLING)), None)


async def _last_step(backend: Backend, job: Job) -> JobEvent | None:
    after = max(0, job.last_event - RECENT_EVENTS)
    events, _ = await backend.job_events(job.id, after=after, max_events=2 * RECENT_EVENTS, wait_s=0.0)
    return next((event for event in reversed(events) if event.kind == "step"), None)
