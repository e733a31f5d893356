"""Calls and streams of one front, counted as they come. Units are in the names; times in seconds."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.backend import GenerateChunk

LATENCIES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class CallMetrics:
    """Of the calls on our own services."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._running = Gauge("moe_cluster_rpcs_running", "Calls that are being answered.", registry=registry)
        self._calls = Counter(
            "moe_cluster_rpcs", "Calls answered, by status code.", ["method", "code"], registry=registry
        )
        self._seconds = _histogram("moe_cluster_rpc_seconds", "Time to answer a call.", registry, "method")
        self._tokens = Counter("moe_cluster_generated_tokens", "Tokens sent to callers of Generate.", registry=registry)
        self._first = _histogram("moe_cluster_first_token_seconds", "From the call to its first token.", registry)
        self._next = _histogram("moe_cluster_next_token_seconds", "From one token of a stream to the next.", registry)

    def begun(self) -> None:
        self._running.inc()

    def ended(self, method: str, code: str, seconds: float) -> None:
        """`method`: the full name; the service's package is left out of the label."""
        label = method.rpartition(".")[2]
        self._running.dec()
        self._calls.labels(label, code).inc()
        self._seconds.labels(label).observe(seconds)

    async def timed(self, chunks: AsyncIterator[GenerateChunk]) -> AsyncIterator[GenerateChunk]:
        """The same chunks, their tokens counted and the waits for them measured."""
        before, histogram = time.monotonic(), self._first
        async for chunk in chunks:
            now = time.monotonic()
            if chunk.token_ids:
                histogram.observe(now - before)
                self._tokens.inc(len(chunk.token_ids))
                before, histogram = now, self._next
            yield chunk


def _histogram(name: str, text: str, registry: CollectorRegistry, *labels: str) -> Histogram:
    return Histogram(name, text, labels, registry=registry, buckets=LATENCIES_S)
