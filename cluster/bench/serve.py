"""What light streams cost a training job, beyond the computing that they need for themselves.

A round: steps alone; the same steps beside streams of the newest version; beside streams of a pinned one; the streams
alone for as long. The last tells what a token costs by itself: CPU time of the cluster's processes and of this one,
less what they take when nothing is asked of them. So much for every token, spread over all cores, is the streams' own
computing; the rate alone less that share is what training beside them is held against.

A light stream asks for a few tokens, waits, and asks again.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import psutil

from actors.values import NEWEST, VersionChoice
from cluster.backend import Backend, ClusterStatus, Prompt, SamplingParams
from cluster.bench.result import Report, Row, rate_row, time_row
from cluster.config import ClusterConfig, OptimizerConfig
from cluster.fabric.calls import call
from cluster.fabric.launch import CALL_TIMEOUT_S, RunningCluster, launched
from cluster.fabric.options import COORDINATOR

NUM_STREAMS = 4
PERIOD_S = 2.0
"""Of a stream: from one request to the next."""
PROMPT, SAMPLING = Prompt(text="def main("), SamplingParams(max_tokens=4)
SEQUENCES, LENGTH, STEPS_A_ROUND = 8, 256, 8
LR, CLIP_NORM = 1e-3, 1.0
QUIET_S = 4.0
PIN = "bench"


@dataclass
class Phase:
    """What was measured while something lasted."""

    seconds: float = 0.0
    tokens: int = 0
    """That the streams got."""
    gaps_s: Sequence[float] = ()
    """Between two tokens of a request."""
    cpu_s: float = 0.0
    """Of all processes."""


def own_share(beside: Phase, streams_alone: Phase, idle_cpu: float, cores: int) -> float:
    """Of all cores' time beside training, what the streams' tokens take by themselves.

    `idle_cpu`: CPU seconds a second when nothing is asked.
    """
    if not streams_alone.tokens:
        return 0.0
    cpu_a_token_s = max(0.0, streams_alone.cpu_s - idle_cpu * streams_alone.seconds) / streams_alone.tokens
    return beside.tokens * cpu_a_token_s / (cores * beside.seconds)


def bench_serve(config: ClusterConfig, *, rounds: int) -> Report:
    with launched(config) as running:
        status: ClusterStatus = call(COORDINATOR, running.control.status.remote(), CALL_TIMEOUT_S)
        cpu = _Cpu([actor.pid for actor in status.actors])
        train = _training(running, status.vocab_size)
        call(COORDINATOR, running.control.pin_version.remote(PIN, 0.0, CALL_TIMEOUT_S), CALL_TIMEOUT_S)
        train()
        idle = _measured(lambda: time.sleep(QUIET_S), cpu)
        runs = [_round(running.backend, train, cpu) for _ in range(rounds)]
    return Report("serve", list(_rows(runs, idle.cpu_s / idle.seconds, len(os.sched_getaffinity(0)))))


def _training(running: RunningCluster, vocab_size: int) -> Callable[[], None]:
    batches = np.random.default_rng(0).integers(0, vocab_size, (STEPS_A_ROUND, SEQUENCES, LENGTH))
    running.router.begin_run(OptimizerConfig(lr=LR))

    def train() -> None:
        for batch in batches:
            running.router.train_step([batch], lr=LR, clip_norm=CLIP_NORM)

    return train


Runs = dict[str, Phase]


def _round(backend: Backend, train: Callable[[], None], cpu: _Cpu) -> Runs:
    found = {"alone": _measured(train, cpu)}
    for name, choice in (("newest", NEWEST), ("pinned", VersionChoice(pin=PIN))):
        with _streaming(backend, choice) as streams:
            found[name] = _measured(train, cpu, streams)
    with _streaming(backend, NEWEST) as streams:
        found["streams"] = _measured(lambda: time.sleep(max(2 * PERIOD_S, found["newest"].seconds)), cpu, streams)
    return found


def _rows(runs: Sequence[Runs], idle_cpu: float, cores: int) -> Iterator[Row]:
    tokens = STEPS_A_ROUND * SEQUENCES * (LENGTH - 1)
    for name in ("newest", "pinned"):
        beside_s = [run[name].seconds for run in runs]
        shares = [own_share(run[name], run["streams"], idle_cpu, cores) for run in runs]
        fair_s = [run["alone"].seconds / (1 - share) for run, share in zip(runs, shares, strict=True)]
        alone_s = [run["alone"].seconds for run in runs]
        yield rate_row(f"training_{name}", "tokens/s", tokens, beside_s, "alone, less the streams' own", fair_s)
        yield rate_row(f"training_{name}_in_all", "tokens/s", tokens, beside_s, "alone", alone_s)
        share = 100 * statistics.median(shares)
        yield Row(f"streams_{name}_own", share, "% of the cores", "", 0.0, 0.0, len(runs))
        gaps = [statistics.median(run[name].gaps_s or [0.0]) for run in runs]
        quiet = [statistics.median(run["streams"].gaps_s or [0.0]) for run in runs]
        yield time_row(f"token_{name}", "ms", 1e3, gaps, "without training", quiet)


class _Cpu:
    """CPU time of the actors and of this process."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in [*pids, os.getpid()]]

    def seconds(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return float(sum(t.user + t.system for t in times))


def _measured(run: Callable[[], None], cpu: _Cpu, streams: _Streams | None = None) -> Phase:
    if streams is not None:
        streams.take()
    cpu_before, started = cpu.seconds(), time.perf_counter()
    run()
    phase = Phase(time.perf_counter() - started, cpu_s=cpu.seconds() - cpu_before)
    if streams is not None:
        phase.tokens, phase.gaps_s = streams.take()
    return phase


class _Streams:
    """Their own thread, with an event loop."""

    def __init__(self, backend: Backend, choice: VersionChoice) -> None:
        self._backend, self._choice = backend, choice
        self._lock = threading.Lock()
        self._tokens, self._gaps_s = 0, list[float]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(CALL_TIMEOUT_S)
        if self.failure is not None:
            raise self.failure

    def take(self) -> tuple[int, list[float]]:
        """Since the last time."""
        with self._lock:
            taken = self._tokens, self._gaps_s
            self._tokens, self._gaps_s = 0, []
            return taken

    async def _all(self) -> None:
        try:
            await asyncio.gather(*(self._stream(number) for number in range(NUM_STREAMS)))
        except BaseException as error:  # told by `stop`: this thread has nobody to tell
            self.failure = error

    async def _stream(self, number: int) -> None:
        await asyncio.sleep(number * PERIOD_S / NUM_STREAMS)
        while not self._stop.is_set():
            begun = last = time.monotonic()
            async for _ in self._backend.generate(PROMPT, SAMPLING, self._choice, timeout_s=CALL_TIMEOUT_S):
                now = time.monotonic()
                with self._lock:
                    self._tokens += 1
                    self._gaps_s.append(now - last)
                last = now
            await asyncio.sleep(max(0.0, begun + PERIOD_S - time.monotonic()))


@contextmanager
def _streaming(backend: Backend, choice: VersionChoice) -> Iterator[_Streams]:
    streams = _Streams(backend, choice)
    streams.start()
    try:
        yield streams
    finally:
        streams.stop()
