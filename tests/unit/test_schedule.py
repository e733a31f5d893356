from __future__ import annotations

import itertools
import math

import pytest
import torch

from cluster.config import OptimizerConfig, ScheduleConfig
from cluster.jobs.schedule import lr_at

OPTIMIZER = OptimizerConfig(lr=2.0)


def lrs(steps: int, schedule: ScheduleConfig) -> list[float]:
    return [lr_at(step, steps, OPTIMIZER, schedule) for step in range(1, steps + 1)]


def test_warmup_is_linear_and_reaches_lr() -> None:
    assert lrs(100, ScheduleConfig(warmup_steps=4))[:4] == [0.5, 1.0, 1.5, 2.0]


def test_cosine_falls_to_its_floor_at_the_last_step() -> None:
    values = lrs(24, ScheduleConfig(warmup_steps=4, min_lr_ratio=0.1))
    after = values[3:]
    assert all(a > b for a, b in itertools.pairwise(after))
    assert after[10] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half way
    assert values[-1] == pytest.approx(0.2)
    assert lr_at(1000, 24, OPTIMIZER, ScheduleConfig(min_lr_ratio=0.1)) == pytest.approx(0.2)


def test_cosine_is_that_of_torch() -> None:
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=OPTIMIZER.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=30, eta_min=OPTIMIZER.lr * 0.25)
    for ours in lrs(30, ScheduleConfig(min_lr_ratio=0.25)):
        theirs.step()
        scheduler.step()
        assert ours == pytest.approx(scheduler.get_last_lr()[0])


def test_constant_stays() -> None:
    assert lrs(6, ScheduleConfig(kind="constant", warmup_steps=2)) == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_warmup_over_the_whole_job() -> None:
    values = lrs(5, ScheduleConfig(warmup_steps=5))
    assert values[-1] == 2.0
    assert all(math.isfinite(value) for value in values)


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        lr_at(0, 10, OPTIMIZER, ScheduleConfig())
