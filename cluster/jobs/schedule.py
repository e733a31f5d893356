"""Learning rate of a step: linear warm-up, then cosine decay or a constant."""

from __future__ import annotations

import math

from cluster.config import OptimizerConfig, ScheduleConfig


def lr_at(step: int, steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of `step`, counted from 1 to `steps`.

    Warm-up rises linearly and reaches `lr` at step `warmup_steps`. Cosine then falls from `lr` to
    `lr * min_lr_ratio`, which the last step uses; steps beyond the last stay there.
    """
    if step < 1:
        raise ValueError(f"steps are counted from 1, got {step}")
    if step <= schedule.warmup_steps:
        return optimizer.lr * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return optimizer.lr
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return optimizer.lr * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * cosine)
