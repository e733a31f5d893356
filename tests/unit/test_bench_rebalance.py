"""The pure parts of `bench rebalance`: the fitted gates, the phases of a job, what is predicted, its rows."""

from __future__ import annotations

import math

import pytest
import torch

from actors.moe.balance import expert_load
from cluster.backend import GroupMove, JobEvent, JobState, Rebalance
from cluster.bench.rebalance import WARMUP_STEPS, Course, Step, cpu_of, predicted_gain, report_of, step_of
from cluster.bench.zipf import distance, fit_bias, zipf_share
from cluster.errors import Unavailable


@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 2), (64, 4)])
def test_fitted_biases_give_a_zipf_load(num_experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    score_TE, unseen_TE = torch.randn(2, 8192, num_experts).mul(0.6).sigmoid()
    share_E = zipf_share(num_experts)
    bias_E = fit_bias(score_TE, share_E, top_k)

    def off(score_TE: torch.Tensor) -> float:
        return distance(expert_load((score_TE + bias_E).topk(top_k).indices, num_experts), share_E)

    assert off(score_TE) < 0.01
    assert off(unseen_TE) < 0.03


def test_distance_is_the_part_of_the_load_that_lies_elsewhere() -> None:
    share_E = zipf_share(2)
    assert share_E.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert distance([20, 10], share_E) == pytest.approx(0)
    assert distance([0, 30], share_E) == pytest.approx(2 / 3)


def test_the_predicted_gain_is_bound_by_the_cores_and_by_the_rest_of_the_step() -> None:
    assert predicted_gain(1.0, 1.0, 4, 1.0, 0.25) == pytest.approx(4)
    assert predicted_gain(1.0, 1.0, 2, 1.0, 0.25) == pytest.approx(2)
    assert predicted_gain(2.0, 1.0, 2, 1.0, 0.25) == pytest.approx(2 / 1.5)
    assert predicted_gain(1.0, 1.0, 1, 0.7, 0.25) == 1


def test_a_job_falls_into_steps_before_during_and_after_the_rebalance() -> None:
    course = _course([1.0] * 12)
    course.began_s, course.ended_s = 5.5, 7.5
    assert [step.number for step in course.before] == [3, 4, 5]
    # The step that was under way when the rebalance ended belongs to it.
    assert [step.number for step in course.moving] == [6, 7, 8]
    assert [step.number for step in course.after] == [11, 12]
    assert len(_course([1.0] * 5).before) == 5 - WARMUP_STEPS
    assert _course([1.0] * 5).after == []


def test_rows() -> None:
    moved = _course([1.0] * 6 + [2.0] * 2 + [0.5] * 6)
    moved.began_s, moved.ended_s = 6.5, 9.5
    moved.rebalances = [_rebalance(0.25, 0.5, stall_s=0.02), _rebalance(0.5, 1.0, stall_s=0.05)]
    moved.load_E = (20, 10)
    unmoved = _course([1.0] * 14, loss=2.02)
    rows = {row.case: row for row in report_of(moved, unmoved, rounds=3, cores=2).rows}
    gain = rows["zipf_throughput"]
    assert (gain.value, gain.peer_value, gain.ratio, gain.rounds) == (200, 100, 2, 3)
    # 0.1 CPU seconds a step, all of it on one actor, then on as many as there are cores.
    assert rows["predicted_gain"].peer_value == pytest.approx(1 / 0.95)
    assert rows["predicted_gain"].ratio == pytest.approx(2 * 0.95)
    assert (rows["actor_balance"].value, rows["actor_balance"].ratio) == (1, 4)
    assert rows["expert_cpu"].ratio == pytest.approx(1)
    assert rows["zipf_load"].value == pytest.approx(0)
    stall = rows["switch_stall"]
    assert (stall.value, stall.peer_value, stall.ratio) == (pytest.approx(50), 1000, pytest.approx(20))
    assert rows["switch_stall_share"].value == pytest.approx(5)
    assert (rows["moving_step"].value, rows["moving_step"].ratio) == (2000, 0.5)
    assert rows["loss_difference"].value == pytest.approx(0.02 / 2.02)


def test_a_rebalance_that_leaves_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(Unavailable, match="nothing to compare"):
        report_of(_course([1.0] * 9), _course([1.0] * 9), rounds=3, cores=2)


def test_a_step_as_its_event_tells_it() -> None:
    event = JobEvent(9, 50.0, "step", JobState.RUNNING, 7, {"tokens": 100.0, "tokens_per_s": 40.0, "loss": 2.5})
    assert step_of(event, 3.0) == Step(7, 50.0, 2.5, 100.0, 2.5, 3.0)
    assert math.isclose(cpu_of([step_of(event, 3.0), step_of(event, 5.0), step_of(event, 7.0)]), 2.0)


def _course(seconds: list[float], loss: float = 2.0) -> Course:
    """Steps that follow each other from time 0, of 100 tokens and 0.1 CPU seconds."""
    return Course(
        [Step(i + 1, sum(seconds[: i + 1]), each, 100.0, loss, 0.1 * (i + 1)) for i, each in enumerate(seconds)]
    )


def _rebalance(before: float, after: float, stall_s: float) -> Rebalance:
    return Rebalance((GroupMove(0, "a", "b", 1),), before, after, 2, True, stall_s=stall_s)
