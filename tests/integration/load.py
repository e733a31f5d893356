"""Work that goes on while a test changes the cluster below it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from cluster.service.client import Client
from tests.integration.test_copies import JOB, STREAM_S, text

DRAIN_S = 90
"""The share of a pod's grace period in which its groups have to move away, in the overlay that has least of it."""
LONG_JOB = replace(JOB, steps=100_000)
"""Lasts until it is cancelled."""


@contextmanager
def streams(client: Client, count: int) -> Iterator[list[str]]:
    """Texts of streams, `count` at any time, without end; a failure of one is raised after the last."""
    texts: list[str] = []
    errors: list[Exception] = []
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                texts.append(text(client))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield texts
    finally:
        stop.set()
        for thread in threads:
            thread.join(STREAM_S)
    assert not errors
    assert len(texts) >= count
