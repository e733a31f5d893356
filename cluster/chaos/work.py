"""What the cluster does while it is disturbed: a training job that is watched, and streams of text, over gRPC."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import closing
from types import TracebackType

from actors.errors import MoeClusterError
from actors.values import VersionChoice
from cluster.backend import Job, JobEvent, SamplingParams
from cluster.chaos.record import Commit, Gap, Phase, Record, Request
from cluster.service.client import Client

logger = logging.getLogger(__name__)

MAX_TOKENS = 48
_PROMPTS = ("def main(", "import ", "class Node:\n", "# The ")
REQUESTS = tuple(
    (prompt, SamplingParams(MAX_TOKENS, temperature, top_p, seed))
    for prompt in _PROMPTS
    for temperature, top_p, seed in ((0.0, 1.0, 0), (0.8, 0.95, 7))
)
"""Greedy and seeded: both give the same tokens whenever the weights are the same."""
REQUEST_TIMEOUT_S = 60.0
HURRY_S = 5.0
AGAIN_S = 0.5
"""After a request that failed."""


class Watched:
    """A job whose committed steps go to the record."""

    def __init__(self, client: Client, job: Job, record: Record) -> None:
        self._client, self.job, self._record = client, job, record
        self._committed_s: dict[int, float] = {}
        """Step -> when it was committed last."""
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Cancels the job unless it has ended, which is a problem: nobody asked it to."""
        try:
            job = self._client.get_job(self.job.id)
            if job.state.is_final:
                self._record.problems.append(f"the job {job.state.value} after step {job.step}: {job.error}")
            else:
                self._client.cancel_job(self.job.id)
        except MoeClusterError as error:
            self._record.problems.append(f"the job could not be cancelled: {error}")
        self._thread.join(REQUEST_TIMEOUT_S)
        if self._thread.is_alive():
            self._record.problems.append(f"the job did not stop within {REQUEST_TIMEOUT_S:.0f} s of being cancelled")

    def _watch(self) -> None:
        try:
            with closing(self._client.watch_job(self.job.id)) as events:
                for event in events:
                    self._see(event)
        except MoeClusterError as error:
            self._record.problems.append(f"the job's events broke off: {error}")

    def _see(self, event: JobEvent) -> None:
        if event.kind == "step" and event.time_s > self._committed_s.get(event.step, 0.0):
            # A coordinator that comes back tells the last steps again, with the times at which the router had them.
            self._committed_s[event.step] = event.time_s
            m = event.metrics
            self._record.commits.append(
                Commit(
                    event.time_s,
                    event.step,
                    m["loss"],
                    int(m["tokens"]),
                    int(m.get("retries", 0)),
                    int(m.get("staleness_max", 0)),
                    int(m.get("merged_updates", 0)),
                )
            )


class Streams:
    """So many streams at a time, one request after the other, until it is left."""

    def __init__(self, client: Client, record: Record, phase: Phase, count: int) -> None:
        self._client, self._record, self._phase = client, record, phase
        self._choice = VersionChoice(max_behind=record.staleness)  # as training: nobody waits within the bound
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n, count), daemon=True) for n in range(count)]

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Every stream may come to its own end, unless the run has come to a bad one."""
        self._stop.set()
        deadline = time.monotonic() + (REQUEST_TIMEOUT_S if kind is None else HURRY_S)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, first: int, every: int) -> None:
        key = first
        while not self._stop.is_set():
            request = self._stream(first, key % len(REQUESTS))
            self._record.requests.append(request)
            if request.error:
                self._stop.wait(AGAIN_S)
            key += every

    def _stream(self, number: int, key: int) -> Request:
        started_s = last_s = time.time()
        tokens: list[int] = []
        reason, error = "", ""
        prompt, sampling = REQUESTS[key]
        try:
            with closing(self._client.generate(prompt, sampling, self._choice, timeout_s=REQUEST_TIMEOUT_S)) as chunks:
                for chunk in chunks:
                    now_s = time.time()
                    self._record.gaps.append(Gap(self._phase, last_s, now_s, number))
                    last_s = now_s
                    tokens += chunk.token_ids
                    reason = chunk.finish_reason
        except MoeClusterError as failure:
            error = f"{type(failure).__name__}: {failure}"
        now_s = time.time()
        if error:
            self._record.gaps.append(Gap(self._phase, last_s, now_s, number))
        elif not reason or (reason == "length" and len(tokens) != MAX_TOKENS):
            error = f"it ended after {len(tokens)} of {MAX_TOKENS} tokens, finish reason {reason!r}"
        return Request(self._phase, key, started_s, now_s, tuple(tokens), error)


def expected_tokens(client: Client) -> dict[int, tuple[int, ...]]:
    """Request key -> tokens, one request at a time."""
    found = {}
    for key, (prompt, sampling) in enumerate(REQUESTS):
        chunks = client.generate(prompt, sampling, timeout_s=REQUEST_TIMEOUT_S)
        found[key] = tuple(token for chunk in chunks for token in chunk.token_ids)
    return found
