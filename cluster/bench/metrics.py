"""What metrics cost a training job, when Prometheus reads them every second: fifteen times as often as k8s/ has it.

`metrics_cpu`: CPU time of the processes that answer a scrape, beyond what they take without, as a share of the CPU time
of the whole cluster. Where all cores are busy that is the share of tokens/s that is lost. Nothing but the front and the
coordinator answers: actors tell their state with their heartbeats, scraped or not. `metrics_cost`: the same by the
clock, of which a machine's noise is a larger part. Both are medians over pairs of phases that follow each other, with
and without scrapes, in turn; with each the interval that holds the true median with 95 % confidence.

`metrics_cpu_15_s` is the first at the rate of k8s/, as what is done between scrapes is nothing. `scrape_time` and
`scrape_cpu` are of one scrape, `noted_token` is what counting and timing a token of a stream adds.
"""

from __future__ import annotations

import asyncio
import math
import socket
import statistics
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace

import psutil
from prometheus_client import CollectorRegistry

from actors.errors import MoeClusterError
from cluster.backend import Backend, GenerateChunk, JobEvent
from cluster.bench.result import Report, Row
from cluster.config import OWN_FRONT, BatchConfig, ClusterConfig, DataConfig, EvalConfig, FrontConfig, JobConfig
from cluster.serve import fronted, served
from cluster.service.client import Client
from cluster.service.metrics.calls import CallMetrics

SCRAPE_EVERY_S = 1.0
DEPLOYED_EVERY_S = 15.0
"""As k8s/monitoring has it."""
SCRAPE_TIMEOUT_S = 10.0
PHASE_S = 3.0
"""Long enough for several scrapes, short enough that the machine is the same in both phases of a pair."""
NUM_NOTED_TOKENS = 20_000
CONFIDENCE = 0.95
COORDINATOR_PROCESS = "ray::ControlWorker"
BATCH = BatchConfig(sequences=8, sequence_length=256)
TOKENS_A_STEP = BATCH.sequences * (BATCH.sequence_length - 1)
JOB = JobConfig(steps=10**6, batch=BATCH, data=DataConfig(heldout_every=0), eval=EvalConfig(every_steps=0))


@dataclass(frozen=True)
class CostRow(Row):
    cost_ratio: float
    """Share that is lost: the median over pairs of phases. Below 0 if that is how the noise fell."""
    low_ratio: float
    high_ratio: float
    """The median lies between with a confidence of `CONFIDENCE`."""


@dataclass(frozen=True)
class Phase:
    """What was measured while nothing was switched."""

    seconds: float
    steps: int
    answering_s: float
    """CPU time of the processes that answer scrapes."""
    all_s: float
    """CPU time of every process of the cluster, and of this one."""
    scrapes: int

    @property
    def tokens_per_s(self) -> float:
        return self.steps * TOKENS_A_STEP / self.seconds


@dataclass(frozen=True)
class Pair:
    scraped: Phase
    quiet: Phase

    @property
    def extra_cpu(self) -> float:
        """CPU seconds a second."""
        return self.scraped.answering_s / self.scraped.seconds - self.quiet.answering_s / self.quiet.seconds

    @property
    def cpu_cost_ratio(self) -> float:
        return self.extra_cpu * self.quiet.seconds / self.quiet.all_s

    @property
    def clock_cost_ratio(self) -> float:
        return 1.0 - self.scraped.tokens_per_s / self.quiet.tokens_per_s


def bench_metrics(config: ClusterConfig, *, rounds: int) -> Report:
    scrapes_s: list[float] = []
    with (
        served(replace(config, front=OWN_FRONT)) as service,
        Client(service.target) as client,
        endpoint(service.cluster.backend, config.ray.start_timeout_s) as port,
    ):
        job = client.submit_job(JOB)
        with closing(client.watch_job(job.id)) as events:
            pairs = _pairs(_steps(events), Cpu(), port, rounds, scrapes_s)
        client.cancel_job(job.id)
    return Report("metrics", [*rows_of(pairs, scrapes_s), _noted_token(rounds)])


def rows_of(pairs: Sequence[Pair], scrapes_s: Sequence[float]) -> list[Row]:
    scraped, quiet = [pair.scraped for pair in pairs], [pair.quiet for pair in pairs]
    share = [statistics.median(phase.answering_s / phase.all_s for phase in phases) for phases in (scraped, quiet)]
    costs, rarer = [pair.cpu_cost_ratio for pair in pairs], SCRAPE_EVERY_S / DEPLOYED_EVERY_S
    rarely = [share[1] + (share[0] - share[1]) * rarer, share[1]]
    rates = [statistics.median(phase.tokens_per_s for phase in phases) for phases in (scraped, quiet)]
    a_scrape_s = statistics.median(pair.extra_cpu * pair.scraped.seconds / pair.scraped.scrapes for pair in pairs)
    return [
        _cost("metrics_cpu", share, "of CPU", costs),
        _cost("metrics_cpu_15_s", rarely, "of CPU", [cost * rarer for cost in costs]),
        _cost("metrics_cost", rates, "tokens/s", [pair.clock_cost_ratio for pair in pairs]),
        Row("scrape_time", statistics.median(scrapes_s) * 1e3, "ms", "", 0.0, 0.0, len(scrapes_s)),
        Row("scrape_cpu", a_scrape_s * 1e3, "ms", "", 0.0, 0.0, sum(phase.scrapes for phase in scraped)),
    ]


def _cost(case: str, values: Sequence[float], unit: str, costs: Sequence[float]) -> CostRow:
    cost, (low, high) = statistics.median(costs), median_interval(costs)
    return CostRow(case, values[0], unit, "without metrics", values[1], 1.0 - cost, len(costs), cost, low, high)


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Of the values the two, as close as may be, between which the median of what they are drawn from lies with that
    confidence, whatever its distribution: how many of n values lie below it is binomial. Few values: all of them."""
    ordered, count = sorted(values), len(values)
    outside, below = 0, 0.0
    while outside < count // 2:
        below += math.comb(count, outside) / 2.0**count
        if 2.0 * below > 1.0 - confidence:
            break
        outside += 1
    first = max(0, outside - 1)
    return ordered[first], ordered[count - 1 - first]


class Cpu:
    """CPU time since processes were first seen; each call of `read` sees those of now."""

    def __init__(self) -> None:
        self._last: dict[int, float] = {}
        self._all_s = self._answering_s = 0.0

    def read(self) -> tuple[float, float]:
        """-> of all processes below this one and itself; of those that answer scrapes. Of a process that has ended
        what it took since the last call is lost."""
        own, found = psutil.Process(), False
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                now_s = times.user + times.system
                taken_s = now_s - self._last.get(process.pid, now_s)
                self._last[process.pid] = now_s
                self._all_s += taken_s
                is_coordinator = " ".join(process.cmdline()).startswith(COORDINATOR_PROCESS)
                found = found or is_coordinator
                if process == own or is_coordinator:
                    self._answering_s += taken_s
        if not found:
            raise MoeClusterError(
                "the coordinator's process is not below this one: use a config with ray.mode embedded"
            )
        return self._all_s, self._answering_s


def _pairs(steps: Iterator[JobEvent], cpu: Cpu, port: int, rounds: int, scrapes_s: list[float]) -> list[Pair]:
    now_s = time.time()
    before = next(step for step in steps if step.time_s >= now_s)  # what was told while the cluster started
    cpu.read()
    pairs: list[Pair] = []
    for number in range(rounds + 1):  # the first warms up
        phases: dict[bool, Phase] = {}
        # Each comes first every other time, so that neither gains by a machine that gets faster or slower.
        for is_scraped in (True, False) if number % 2 else (False, True):
            scraping = _scraping(port, scrapes_s) if is_scraped else nullcontext()
            phases[is_scraped], before = _phase(steps, before, cpu, scraping, scrapes_s)
        if number:
            pairs.append(Pair(phases[True], phases[False]))
    return pairs


def _phase(
    steps: Iterator[JobEvent],
    before: JobEvent,
    cpu: Cpu,
    scraping: AbstractContextManager[None],
    scrapes_s: Sequence[float],
) -> tuple[Phase, JobEvent]:
    """The steps after `before` until `PHASE_S` have passed. -> with the last of them."""
    num_scrapes, (all_s, answering_s) = len(scrapes_s), cpu.read()
    last, count = before, 0
    with scraping:
        while last.time_s - before.time_s < PHASE_S:
            last, count = next(steps), count + 1
    now_all_s, now_answering_s = cpu.read()  # the last scrape has been answered
    scrapes = len(scrapes_s) - num_scrapes
    phase = Phase(last.time_s - before.time_s, count, now_answering_s - answering_s, now_all_s - all_s, scrapes)
    return phase, last


def _steps(events: Iterator[JobEvent]) -> Iterator[JobEvent]:
    """Without end; `MoeClusterError` if the job ends all the same."""
    yield from (event for event in events if event.kind == "step")
    raise MoeClusterError("the job ended before all was measured")


@contextmanager
def endpoint(backend: Backend, ready_timeout_s: float) -> Iterator[int]:
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


def _noted_token(rounds: int) -> Row:
    """CPU time of this thread alone, with the front's counters and without."""
    calls = CallMetrics(CollectorRegistry())
    extra_s = []
    for _ in range(rounds):
        noted_s = asyncio.run(_cpu_of(calls.timed(_chunks())))
        extra_s.append((noted_s - asyncio.run(_cpu_of(_chunks()))) / NUM_NOTED_TOKENS)
    return Row("noted_token", statistics.median(extra_s) * 1e6, "us", "", 0.0, 0.0, rounds)


async def _chunks() -> AsyncIterator[GenerateChunk]:
    chunk = GenerateChunk(text="a", token_ids=(1,), version=0)
    for _ in range(NUM_NOTED_TOKENS):
        yield chunk


async def _cpu_of(chunks: AsyncIterator[GenerateChunk]) -> float:
    started = time.thread_time()
    async for _ in chunks:
        pass
    return time.thread_time() - started
