"""How old experts may be and were: the arithmetic, the bounds, and where people see it."""

from __future__ import annotations

import re

import pytest
import torch

from actors.errors import InvalidInput
from actors.expert.holdings import LayerStep
from actors.expert.updates import merged
from actors.staleness import MAX_STALENESS, Spread, check_staleness
from actors.values import StepReport
from cluster.backend import JobEvent, JobState
from cluster.config import ExpertsConfig, JobConfig, OptimizerConfig
from cluster.configcheck import validate_job, validate_job_on
from cluster.errors import ConfigError
from cluster.jobs.runner import metrics_of
from cluster.service.metrics.snapshot import _training


def test_the_spread_of_all_actors_together() -> None:
    first, second = Spread(merged=1), Spread()
    first.note(2, 3)
    first.note(0, 1)
    second.note(4, 4)
    second.note(9, 0)  # no expert was used
    both = Spread.of([first.fields(), second.fields(), {"square_sum": 1.0}])
    assert (both.num_experts, both.max, both.merged) == (8, 4, 1)
    assert both.mean == (2 * 3 + 4 * 4) / 8
    assert Spread().mean == 0.0


@pytest.mark.parametrize("value", [0, 1, MAX_STALENESS])
def test_bounds_that_a_job_may_have(value: int) -> None:
    assert check_staleness(value) == value


@pytest.mark.parametrize("value", [-1, MAX_STALENESS + 1, 10**12, 1.0, True, None, "4"])
def test_other_bounds_are_refused_by_value(value: object) -> None:
    given = "" if value is None else rf" \(got {re.escape(repr(value))}\)"
    text = rf"optimizer\.staleness: is no number of steps that experts may be behind{given}; use 0 to {MAX_STALENESS}"
    with pytest.raises(InvalidInput, match=text):
        check_staleness(value)


def test_several_steps_become_one() -> None:
    """The mean of the scaled gradients, the sum of the rates, and as many updates."""
    first, second = ([torch.tensor([float(n), 2.0 * n])] for n in (1, 4))
    step = merged([LayerStep(first, 0.1, 0.5), LayerStep(second, 0.3, 1.0, merged=2)])
    torch.testing.assert_close(list(step.gradients), [torch.tensor([2.25, 4.5])])
    assert (step.lr, step.scale, step.merged) == (0.4, 1.0, 3)
    alone = LayerStep(first, 0.1, 0.5)
    assert merged([alone]) is alone


@pytest.mark.parametrize("staleness", [-1, MAX_STALENESS + 1])
def test_a_job_with_another_bound_is_refused(staleness: int) -> None:
    text = rf"job: optimizer\.staleness: is outside 0 to {MAX_STALENESS} \(got {staleness}\); use a number from 0 to"
    with pytest.raises(ConfigError, match=text):
        validate_job(JobConfig(optimizer=OptimizerConfig(staleness=staleness)), "job")


def test_a_job_is_refused_where_experts_have_a_cache() -> None:
    job, cached = JobConfig(optimizer=OptimizerConfig(staleness=1)), ExpertsConfig(expert_cache_size=2)
    with pytest.raises(ConfigError, match=r"optimizer\.staleness.*experts\.expert_cache_size is 2"):
        validate_job_on(job, cached, "job")
    assert validate_job_on(job, ExpertsConfig(), "job") is job
    assert validate_job_on(JobConfig(), cached, "job") == JobConfig()


def test_a_step_tells_it() -> None:
    report = StepReport(3, 1.0, 1.0, 12, 0.1, 0, [[1, 1]], staleness_mean=1.5, staleness_max=2, merged_updates=1)
    metrics = metrics_of(report, 0.1, 1.0)
    assert (metrics["staleness_mean"], metrics["staleness_max"], metrics["merged_updates"]) == (1.5, 2.0, 1.0)
    event = JobEvent(1, 0.0, "step", JobState.RUNNING, 3, metrics)
    values = {family.name: family.samples[0].value for family in _training(event)}
    assert values["moe_cluster_train_staleness_mean_steps"] == 1.5
    assert values["moe_cluster_train_staleness_max_steps"] == 2.0
