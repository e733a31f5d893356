"""The parts of `bench metrics`, before a cluster in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from actors.errors import MoeClusterError
from cluster.backend import JobEvent, JobState
from cluster.bench.metrics import _endpoint, _scraping, _time_of
from cluster.errors import Unavailable
from tests.fakes.backend import MemoryBackend
from tests.fakes.front import WAIT_S


def test_steps_that_were_done_or_under_way_are_not_timed() -> None:
    def steps() -> Iterator[JobEvent]:
        first_s = time.time()
        for number, after_s in enumerate((-9.0, -5.0, 100.0, 101.0, 102.0, 104.0, 107.0)):
            yield JobEvent(number, first_s + after_s, "step", JobState.RUNNING, number)

    assert _time_of(steps(), 3) == pytest.approx(6.0, abs=1e-3)


def test_the_endpoint_is_scraped_while_it_is_there() -> None:
    scrapes_s: list[float] = []
    with _endpoint(MemoryBackend(), WAIT_S) as port:
        with _scraping(port, scrapes_s):
            pass
        assert scrapes_s
        count = len(scrapes_s)
    with pytest.raises(MoeClusterError, match="scrapes failed"), _scraping(port, scrapes_s):
        pass
    assert len(scrapes_s) == count


def test_a_scrape_without_metrics_counts_for_nothing() -> None:
    backend, scrapes_s = MemoryBackend(), list[float]()
    with _endpoint(backend, WAIT_S) as port:
        backend.failures["ledger"] = [Unavailable("not now")]
        with (
            pytest.raises(MoeClusterError, match="the first: the cluster tells no metrics"),
            _scraping(port, scrapes_s),
        ):
            pass
