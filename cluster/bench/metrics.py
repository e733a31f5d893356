"""`metrics_cost`: training tokens a second of a job while Prometheus' endpoint is there and is scraped every second,
against the same job without either. `scrape_time`: how long a scrape takes beside it.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

from actors.errors import MoeClusterError
from cluster.backend import Backend, JobEvent
from cluster.bench.result import Report, Row, rate_row
from cluster.config import OWN_FRONT, BatchConfig, ClusterConfig, DataConfig, EvalConfig, FrontConfig, JobConfig
from cluster.serve import fronted, served
from cluster.service.client import Client

SCRAPE_EVERY_S = 1.0
SCRAPE_TIMEOUT_S = 10.0
STEPS_A_ROUND = 10
"""Long enough for several scrapes."""
BATCH = BatchConfig(sequences=8, sequence_length=256)
JOB = JobConfig(steps=10**6, batch=BATCH, data=DataConfig(heldout_every=0), eval=EvalConfig(every_steps=0))


def bench_metrics(config: ClusterConfig, *, rounds: int) -> Report:
    scrapes_s: list[float] = []
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with served(replace(config, front=OWN_FRONT)) as service, Client(service.target) as client:
        job = client.submit_job(JOB)
        with closing(client.watch_job(job.id)) as events:
            steps = (event for event in events if event.kind == "step")
            for number in range(rounds + 1):  # the first warms up
                # Each comes first every other time, so that neither gains by a machine that gets faster or slower.
                for is_scraped in (True, False) if number % 2 else (False, True):
                    with ExitStack() as stack:
                        if is_scraped:
                            start_timeout_s = config.ray.start_timeout_s
                            port = stack.enter_context(_endpoint(service.cluster.backend, start_timeout_s))
                            stack.enter_context(_scraping(port, scrapes_s))
                        taken_s = _time_of(steps, STEPS_A_ROUND)
                    if number:
                        seconds[is_scraped].append(taken_s)
        client.cancel_job(job.id)
    tokens = STEPS_A_ROUND * BATCH.sequences * (BATCH.sequence_length - 1)
    scrape_ms = statistics.median(scrapes_s) * 1e3
    return Report(
        "metrics",
        [
            rate_row("metrics_cost", "tokens/s", tokens, seconds[True], "without metrics", seconds[False]),
            Row("scrape_time", scrape_ms, "ms", "", 0.0, 0.0, len(scrapes_s)),
        ],
    )


def _time_of(steps: Iterator[JobEvent], count: int) -> float:
    """Seconds from the end of the first step that begins after now to that of the `count`th after it."""
    now_s = time.time()
    next(step for step in steps if step.time_s >= now_s)  # it was under way
    times_s = [next(steps).time_s for _ in range(count + 1)]
    return times_s[-1] - times_s[0]


@contextmanager
def _endpoint(backend: Backend, ready_timeout_s: float) -> Iterator[int]:
    """A front with metrics; gives their port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    with fronted(backend, FrontConfig(port=0, metrics_port=port), ready_timeout_s):
        yield port


@contextmanager
def _scraping(port: int, scrapes_s: list[float]) -> Iterator[None]:
    """Inside, the endpoint is read every second, once at least; `MoeClusterError` afterwards if that failed."""
    stop, failures = threading.Event(), list[str]()

    def run() -> None:
        wait_s = 0.0
        while wait_s == 0.0 or not stop.wait(wait_s):
            started = time.monotonic()
            try:
                scrapes_s.append(_scrape(port))
            except (OSError, ValueError) as error:
                failures.append(str(error))
            wait_s = max(0.001, SCRAPE_EVERY_S - (time.monotonic() - started))

    thread = threading.Thread(target=run, name="scrapes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(SCRAPE_TIMEOUT_S)
    if failures:
        raise MoeClusterError(f"{len(failures)} scrapes failed, the first: {failures[0]}")


def _scrape(port: int) -> float:
    """-> seconds. `ValueError` if the cluster did not tell its metrics."""
    started = time.monotonic()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SCRAPE_TIMEOUT_S) as response:
        text = response.read().decode()
    if "moe_cluster_up 1.0" not in text:
        raise ValueError("the cluster tells no metrics")
    return time.monotonic() - started
