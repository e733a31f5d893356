"""The parts of `bench metrics`, before a cluster in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import yaml

from actors.errors import MoeClusterError
from cluster.backend import JobEvent, JobState
from cluster.bench.metrics import (
    DEPLOYED_EVERY_S,
    PHASE_S,
    TOKENS_A_STEP,
    CostRow,
    Cpu,
    Pair,
    Phase,
    _noted_token,
    _phase,
    _scraping,
    _steps,
    endpoint,
    median_interval,
    rows_of,
)
from cluster.bench.result import Report
from cluster.commands.bench import TABLES
from cluster.errors import Unavailable
from tests.contract.test_metrics import MONITORING
from tests.fakes.backend import MemoryBackend
from tests.fakes.front import WAIT_S


class Readings(Cpu):
    """Of a cluster that works all the time on two cores, and answers for a hundredth of it."""

    def read(self) -> tuple[float, float]:
        self._all_s += 10.0
        self._answering_s += 0.1
        return self._all_s, self._answering_s


def steps_at(*times_s: float) -> Iterator[JobEvent]:
    for number, time_s in enumerate(times_s):
        yield JobEvent(number, time_s, "step", JobState.RUNNING, number)


def test_a_phase_ends_with_the_step_at_which_its_time_is_over() -> None:
    steps = steps_at(0.0, 1.0, 2.0, PHASE_S + 1.0, 50.0)
    phase, last = _phase(steps, next(steps), Readings(), nullcontext(), [])
    assert (phase.seconds, phase.steps, last.step) == (PHASE_S + 1.0, 3, 3)
    assert (phase.all_s, phase.answering_s) == pytest.approx((10.0, 0.1))
    assert phase.tokens_per_s == 3 * TOKENS_A_STEP / phase.seconds


def test_a_job_that_ends_is_no_measurement() -> None:
    steps = _steps(steps_at(0.0, 1.0))
    with pytest.raises(MoeClusterError, match="the job ended"):
        _phase(steps, next(steps), Readings(), nullcontext(), [])


def pair(extra_s: float, slower: float = 1.0) -> Pair:
    """The cluster takes 4 CPU seconds in 2 s."""
    return Pair(Phase(2.0 * slower, 8, 0.1 * slower + extra_s, 4.0, 2), Phase(2.0, 8, 0.1, 4.0, 0))


def test_cost_is_what_answering_takes_beyond_what_it_takes_anyway() -> None:
    assert pair(0.02).cpu_cost_ratio == pytest.approx(0.005)
    assert pair(0.0).cpu_cost_ratio == 0.0
    assert pair(0.0, slower=1.25).clock_cost_ratio == pytest.approx(0.2)


def test_the_rows_are_medians_with_their_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [pair(extra_s) for extra_s in (0.02, 0.0, 0.02, 0.04, 0.02, 4.0, 0.02, 0.02, 0.02)]
    rows = {row.case: row for row in rows_of(pairs, [0.01, 0.02, 0.03])}
    cost = rows["metrics_cpu"]
    assert isinstance(cost, CostRow)
    assert (cost.cost_ratio, cost.low_ratio, cost.high_ratio) == pytest.approx((0.005, 0.005, 0.01))
    assert cost.ratio == pytest.approx(0.995)
    deployed = rows["metrics_cpu_15_s"]
    assert isinstance(deployed, CostRow)
    assert deployed.cost_ratio == pytest.approx(0.005 / 15)
    assert rows["scrape_cpu"].value == pytest.approx(10.0)
    assert rows["scrape_time"].value == pytest.approx(20.0)
    TABLES["metrics"](Report("metrics", list(rows.values())))
    assert "0.50 to 1.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "first"),
    [(3, 0), (5, 0), (6, 0), (8, 0), (9, 1), (20, 5)],  # as in tables of the sign test
)
def test_the_interval_of_a_median(count: int, first: int) -> None:
    values = [float(value) for value in reversed(range(count))]
    assert median_interval(values) == (first, count - 1 - first)


def test_prometheus_is_told_to_scrape_as_often_as_is_reckoned_with() -> None:
    monitor = yaml.safe_load((MONITORING / "podmonitor.yaml").read_text())
    (endpoint_of_front,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint_of_front["interval"] == f"{DEPLOYED_EVERY_S:.0f}s"


def test_the_coordinator_must_be_seen() -> None:
    with pytest.raises(MoeClusterError, match=r"ray\.mode embedded"):
        Cpu().read()


def test_every_token_is_noted() -> None:
    row = _noted_token(2)
    assert (row.case, row.unit, row.rounds) == ("noted_token", "us", 2)


def test_the_endpoint_is_scraped_while_it_is_there() -> None:
    scrapes_s: list[float] = []
    with endpoint(MemoryBackend(), WAIT_S) as port:
        with _scraping(port, scrapes_s):
            pass
        assert scrapes_s
        count = len(scrapes_s)
    with pytest.raises(MoeClusterError, match="scrapes failed"), _scraping(port, scrapes_s):
        pass
    assert len(scrapes_s) == count


def test_a_scrape_without_metrics_counts_for_nothing() -> None:
    backend, scrapes_s = MemoryBackend(), list[float]()
    with endpoint(backend, WAIT_S) as port:
        backend.failures["ledger"] = [Unavailable("not now")]
        with (
            pytest.raises(MoeClusterError, match="the first: the cluster tells no metrics"),
            _scraping(port, scrapes_s),
        ):
            pass
