"""Expert actors come and go under a training job and streams: what steps and streams notice of it.

Each row is a way, e.g. 2 -> 3 actors: longest wait of a step for a switch of placement, longest time between two tokens
of any stream while it lasts beside the same while nothing changes, time to prepare in the background.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median

from actors.errors import MoeClusterError
from cluster.backend import OperationState, SamplingParams
from cluster.bench.result import Report, Row
from cluster.config import OWN_FRONT, BatchConfig, ClusterConfig, DataConfig, EvalConfig, JobConfig
from cluster.serve import served
from cluster.service.client import Client

WAYS = ((2, (3, 2)), (4, (8, 6)))
NUM_STREAMS = 16
PROMPT, SAMPLING = "def main(", SamplingParams(max_tokens=64)
QUIET_S = 10.0
START_TIMEOUT_S = 300.0
"""Four processes that import torch beside a training job take minutes on two cores."""
JOB = JobConfig(
    steps=10**6,
    batch=BatchConfig(sequences=4, sequence_length=64),
    data=DataConfig(heldout_every=0),
    eval=EvalConfig(every_steps=0),
)


@dataclass
class Streams:
    """What the streams saw since the last `take`."""

    gaps_s: list[float] = field(default_factory=list)
    """Longest time between two tokens, of each stream."""
    ended: int = 0
    failed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> Streams:
        with self.lock:
            taken = Streams(self.gaps_s, self.ended, self.failed)
            self.gaps_s, self.ended, self.failed = [], 0, 0
            return taken


def bench_scale(config: ClusterConfig, *, rounds: int, progress: Callable[[str], None] = lambda text: None) -> Report:
    rows = []
    for first, targets in WAYS:
        most = max(first, *targets)
        experts = replace(config.experts, actors=first, max_actors=most, min_actors=1, group_size=1)
        progress(f"starting {first} expert actors")
        ray = replace(config.ray, start_timeout_s=START_TIMEOUT_S)
        with served(replace(config, ray=ray, experts=experts, front=OWN_FRONT)) as service:
            rows += _ways(service.target, [first, *targets] * rounds, progress)
    return Report("scale", rows)


def _ways(target: str, counts: list[int], progress: Callable[[str], None]) -> list[Row]:
    rows = []
    with Client(target) as client:
        job = client.submit_job(JOB)
        with _streaming(target) as streams:
            streams.take()
            time.sleep(QUIET_S)
            quiet = streams.take()
            for before, after in itertools.pairwise(counts):
                progress(f"{before} -> {after} expert actors")
                rows += _way(client, before, after, streams, quiet)
        client.cancel_job(job.id)
    return rows


def _way(client: Client, before: int, after: int, streams: Streams, quiet: Streams) -> list[Row]:
    *_, operation = client.watch_operation(client.scale(after).id)
    if operation.state is not OperationState.SUCCEEDED:
        raise MoeClusterError(f"{before} -> {after}: {operation.error}")
    seen = streams.take()
    way = f"{before}_to_{after}"
    usual_s = median(quiet.gaps_s or [0.0])
    worst_s, worst_quiet_s = max(seen.gaps_s, default=0.0), max(quiet.gaps_s, default=0.0)
    direction = "up" if after > before else "down"
    return [
        _row(f"{direction}_stall_{way}", operation.stall_s * 1e3, "ms", "", 0.0),
        _row(f"{direction}_prepare_{way}", operation.prepare_s, "s", "", 0.0),
        _row(f"stream_gap_{way}", worst_s * 1e3, "ms", "the same without a change", worst_quiet_s * 1e3),
        _row(f"stream_gap_median_{way}", median(seen.gaps_s or [0.0]) * 1e3, "ms", "without a change", usual_s * 1e3),
        _row(f"failed_requests_{way}", seen.failed, f"of {seen.ended + seen.failed}", "", 0.0),
    ]


def _row(case: str, value: float, unit: str, peer: str, peer_value: float) -> Row:
    return Row(case, value, unit, peer, peer_value, peer_value / value if value else 0.0, 1)


@contextmanager
def _streaming(target: str) -> Iterator[Streams]:
    streams, stop = Streams(), threading.Event()
    threads = [threading.Thread(target=_stream, args=(target, streams, stop), daemon=True) for _ in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    try:
        yield streams
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def _stream(target: str, streams: Streams, stop: threading.Event) -> None:
    with Client(target) as client:
        while not stop.is_set():
            longest, last = 0.0, time.monotonic()
            try:
                for _ in client.generate(PROMPT, SAMPLING):
                    longest, last = max(longest, time.monotonic() - last), time.monotonic()
            except MoeClusterError:
                with streams.lock:
                    streams.failed += 1
                continue
            with streams.lock:
                streams.gaps_s.append(longest)
                streams.ended += 1
