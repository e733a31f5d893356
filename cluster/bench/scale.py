"""Expert actors come and go under a training job and streams: what steps and streams notice of it.

Each row is a way, e.g. 2 -> 3 actors: longest wait of a step for a switch of placement, longest time between two tokens
of any stream while it lasts beside the same while nothing changes, time to prepare in the background.

More actors on the same cores make a token slower for as long as they are there. So nothing changes once before and once
after each way, and the longer of the two times is what the way is compared with. The streams share their forwards, as
they would where so many are expected, unless the config says how many do.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

from actors.errors import MoeClusterError
from cluster.backend import Operation, OperationState, SamplingParams
from cluster.bench.result import Report, Row
from cluster.config import OWN_FRONT, BatchConfig, ClusterConfig, DataConfig, EvalConfig, JobConfig
from cluster.serve import served
from cluster.service.client import Client

WAYS = ((2, (3, 2)), (4, (8, 6)))
NUM_STREAMS = 16
PROMPT, SAMPLING = "def main(", SamplingParams(max_tokens=16)
REQUEST_TIMEOUT_S = 120.0
"""Streams share the cores with the job and with actors that start: a token may take seconds, none may fail."""
QUIET_S = 10.0
SETTLED_S = 2.0
"""After a change: what streams still notice of it."""
START_TIMEOUT_S = 300.0
"""Four processes that import torch beside a training job take minutes on two cores."""
JOB = JobConfig(
    steps=10**6,
    batch=BatchConfig(sequences=4, sequence_length=64),
    data=DataConfig(heldout_every=0),
    eval=EvalConfig(every_steps=0),
)


@dataclass(frozen=True)
class Seen:
    """What the streams saw while something lasted."""

    gaps_s: list[float]
    """Longest time between two tokens, of each stream; the time since its last token counts."""
    ended: int
    failed: int


class Streams:
    """Tokens of several streams, as they come. Thread-safe."""

    def __init__(self, count: int, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._lock = now, threading.Lock()
        self._last_S = [now()] * count
        self._longest_S = [0.0] * count
        self._ended = self._failed = 0

    def token(self, stream: int) -> None:
        with self._lock:
            now = self._now()
            self._longest_S[stream] = max(self._longest_S[stream], now - self._last_S[stream])
            self._last_S[stream] = now

    def end(self, *, failed: bool) -> None:
        """Of a request; its stream asks again at once."""
        with self._lock:
            self._ended += not failed
            self._failed += failed

    def take(self) -> Seen:
        """Since the last time."""
        with self._lock:
            now = self._now()
            gaps = [max(longest, now - last) for longest, last in zip(self._longest_S, self._last_S, strict=True)]
            seen = Seen(gaps, self._ended, self._failed)
            self._longest_S, self._ended, self._failed = [0.0] * len(gaps), 0, 0
            return seen


def bench_scale(config: ClusterConfig, *, rounds: int, progress: Callable[[str], None] = lambda text: None) -> Report:
    rows = []
    for first, targets in WAYS:
        most = max(first, *targets)
        experts = replace(config.experts, actors=first, max_actors=most, min_actors=1, group_size=1)
        progress(f"starting {first} expert actors")
        with served(replace(for_streams(config), experts=experts)) as service:
            rows += _ways(service.target, counts_of(first, targets, rounds), progress)
    return Report("scale", rows)


def for_streams(config: ClusterConfig) -> ClusterConfig:
    """For all of them at once."""
    return replace(
        config,
        ray=replace(config.ray, start_timeout_s=START_TIMEOUT_S),
        router=replace(config.router, decode_batch=config.router.decode_batch or NUM_STREAMS),
        front=OWN_FRONT,
    )


def counts_of(first: int, targets: Sequence[int], rounds: int) -> list[int]:
    """Of expert actors, one after the other: each another than the one before."""
    return [count for count, _ in itertools.groupby([first, *targets] * rounds)]


def _ways(target: str, counts: list[int], progress: Callable[[str], None]) -> list[Row]:
    rows = []
    with Client(target) as client:
        job = client.submit_job(JOB)
        with _streaming(target) as streams:
            quiet = _unchanged(streams)
            for before, after in itertools.pairwise(counts):
                progress(f"{before} -> {after} expert actors")
                operation, seen = _change(client, after, streams)
                quiet_before, quiet = quiet, _unchanged(streams)
                rows += rows_of(before, after, operation, seen, (quiet_before, quiet))
        client.cancel_job(job.id)
    return rows


def _unchanged(streams: Streams) -> Seen:
    streams.take()
    time.sleep(QUIET_S)
    return streams.take()


def _change(client: Client, target: int, streams: Streams) -> tuple[Operation, Seen]:
    streams.take()
    *_, operation = client.watch_operation(client.scale(target).id)
    if operation.state is not OperationState.SUCCEEDED:
        raise MoeClusterError(f"to {target} expert actors: {operation.error}")
    time.sleep(SETTLED_S)
    return operation, streams.take()


def rows_of(before: int, after: int, operation: Operation, seen: Seen, quiet: tuple[Seen, Seen]) -> list[Row]:
    """`quiet`: while nothing changed, before it and after it. Requests that failed after it count for it too."""
    way = f"{before}_to_{after}"
    usual_s = max(median(each.gaps_s) for each in quiet)
    worst_s, worst_quiet_s = max(seen.gaps_s), max(max(each.gaps_s) for each in quiet)
    failed, ended = seen.failed + quiet[1].failed, seen.ended + quiet[1].ended
    direction = "up" if after > before else "down"
    return [
        _row(f"{direction}_stall_{way}", operation.stall_s * 1e3, "ms", "", 0.0),
        _row(f"{direction}_prepare_{way}", operation.prepare_s, "s", "", 0.0),
        _row(f"stream_gap_{way}", worst_s * 1e3, "ms", "the same without a change", worst_quiet_s * 1e3),
        _row(f"stream_gap_median_{way}", median(seen.gaps_s) * 1e3, "ms", "without a change", usual_s * 1e3),
        _row(f"failed_requests_{way}", failed, f"of {ended + failed}", "", 0.0),
    ]


def _row(case: str, value: float, unit: str, peer: str, peer_value: float) -> Row:
    return Row(case, value, unit, peer, peer_value, peer_value / value if value else 0.0, 1)


@contextmanager
def _streaming(target: str) -> Iterator[Streams]:
    streams, stop = Streams(NUM_STREAMS), threading.Event()
    threads = [
        threading.Thread(target=_stream, args=(target, number, streams, stop), daemon=True)
        for number in range(NUM_STREAMS)
    ]
    for thread in threads:
        thread.start()
    try:
        yield streams
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def _stream(target: str, number: int, streams: Streams, stop: threading.Event) -> None:
    with Client(target) as client:
        while not stop.is_set():
            try:
                for _ in client.generate(PROMPT, SAMPLING, timeout_s=REQUEST_TIMEOUT_S):
                    streams.token(number)
            except MoeClusterError:
                streams.end(failed=True)
            else:
                streams.end(failed=False)
