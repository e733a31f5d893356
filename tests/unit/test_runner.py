"""The course of a job, over a router that only writes down what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from actors.compress.settings import CompressionSettings
from actors.moe.settings import BalanceSettings
from actors.values import StepReport
from cluster.config import BatchConfig, EvalConfig, JobConfig, OptimizerConfig, ScheduleConfig
from cluster.jobs.batches import MicroBatch
from cluster.jobs.runner import Documents, JobStopped, run_job

JOB = JobConfig(
    steps=6,
    batch=BatchConfig(sequences=2, sequence_length=4, gradient_accumulation=2),
    schedule=ScheduleConfig(warmup_steps=2),
    eval=EvalConfig(every_steps=3, batches=1),
)


class Written:
    """Router and reporter."""

    def __init__(self) -> None:
        self.begun = 0
        self.steps: dict[int, tuple[list[list[list[int]]], float]] = {}
        self.evaluated_at: list[int] = []
        self._step = 0

    def begin_run(self, optimizer: OptimizerConfig, balance: BalanceSettings, compression: CompressionSettings) -> None:
        self.begun += 1

    def train_step(
        self, microbatches: Sequence[MicroBatch], *, lr: float, clip_norm: float, bias_speed: float
    ) -> StepReport:
        self._last = ([batch.tolist() for batch in microbatches], lr)
        return StepReport(0, 1.0, 1.0, 12, 0.1, 0, [[1, 1]])

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        return 1.0, 6

    def step_committed(self, step: int, metrics: dict[str, float], load_LE: list[list[int]]) -> None:
        self.steps[step] = self._last

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.evaluated_at.append(step)


def documents(opened: list[str] | None = None) -> Documents:
    """`opened`: is told which are opened, in turn."""
    opened = [] if opened is None else opened

    def heldout() -> Iterator[list[int]]:
        opened.append("heldout")
        yield list(range(40))

    def train() -> Iterator[list[int]]:
        opened.append("train")
        rng = np.random.default_rng(0)
        while True:
            yield rng.integers(0, 100, 30).tolist()

    return Documents(train, heldout, eos_id=0)


def run(start_step: int = 0, stop: Callable[[], bool] = lambda: False) -> tuple[Written, list[int]]:
    written, between = Written(), list[int]()
    run_job(JOB, written, documents(), written, stop, start_step=start_step, after_step=between.append)
    return written, between


def test_between_all_steps_the_caller_has_its_turn() -> None:
    written, between = run()
    assert list(written.steps) == [1, 2, 3, 4, 5, 6]
    assert between == [0, 1, 2, 3, 4, 5, 6]
    assert written.evaluated_at == [0, 3, 6]


@pytest.mark.parametrize("done", [1, 3, 5, 6])
def test_a_job_that_goes_on_sees_the_batches_and_rates_that_it_would_have_seen(done: int) -> None:
    whole, _ = run()
    rest, between = run(start_step=done)
    assert rest.steps == {step: seen for step, seen in whole.steps.items() if step > done}
    assert rest.begun == 1
    assert rest.evaluated_at == [step for step in (3, 6) if step > done]
    assert between == list(range(done + 1, 7))


def test_it_stops_between_steps() -> None:
    answers = iter([False, False, True])
    with pytest.raises(JobStopped):
        run(stop=lambda: next(answers))


def test_only_a_job_that_begins_waits_for_heldout_documents_before_its_first_step() -> None:
    opened = {0: list[str](), 4: list[str]()}
    for start_step, names in opened.items():
        written = Written()
        run_job(JOB, written, documents(names), written, lambda: False, start_step=start_step)
        assert written.evaluated_at[-1] == 6
    assert opened == {0: ["heldout", "train"], 4: ["train", "heldout"]}
