"""What `rebalance` with copies does for training where some experts are hot: a job on the real cluster, rebalanced
while it runs, against its own steps before, and against the same job unmoved. A round is a step.

`zipf_throughput`: tokens a second after and before. `predicted_gain`: their ratio, and what the plan's loads predict.
`actor_balance`: average over maximum load of the actors by the plan, after and before. `expert_cpu`: CPU seconds a step
of all expert actors, after and before; copies cost some. `zipf_load`: the part of the load that Zipf's law has on other
experts, against that of an even load. `switch_stall`: the longest time that a step waited for a switch, against the
median step before; `switch_stall_share`: the same in percent, against the limit. `moving_step`: the longest step while
groups travelled. `loss_difference`: the largest relative difference of a step's loss from the unmoved job's, against
how far training moved the loss; where copies add up gradients in another order, a token at the border between two
experts may choose the other one.

The model's experts are most of its work, and the learning rate is low: routing is to stay as it was fitted.
"""

from __future__ import annotations

import asyncio
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from cluster.backend import Backend, JobEvent, Rebalance
from cluster.bench.local import MODEL as SMALL
from cluster.bench.result import Report, Row, rate_row
from cluster.bench.zipf import distance, save_zipf_model, zipf_share
from cluster.config import (
    BatchConfig,
    ClusterConfig,
    DataConfig,
    EvalConfig,
    JobConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from cluster.errors import Unavailable
from cluster.fabric.launch import launched

MODEL = {
    **SMALL,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "n_routed_experts": 64,
    "n_shared_experts": 0,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
}
NUM_ACTORS, NUM_NODES, GROUP_SIZE = 4, 2, 4
JOB = JobConfig(
    batch=BatchConfig(sequences=16, sequence_length=256, gradient_accumulation=2),
    optimizer=OptimizerConfig(lr=1e-6),
    schedule=ScheduleConfig(kind="constant"),
    data=DataConfig(heldout_every=0),
    eval=EvalConfig(every_steps=0),
)
WARMUP_STEPS = 2
MOVING_STEPS = 8
"""Steps that a job has for the rebalance, beside those that are timed."""
MAX_CALLS = 5
"""Of `rebalance`, until it finds nothing more to move."""
TIMEOUT_S = 120.0
STALL_LIMIT_PERCENT = 10.0

AfterStep = Callable[[str], None]
"""Told after each step what is being done."""


@dataclass(frozen=True)
class Step:
    number: int
    ended_s: float
    """Unix time of its commit."""
    seconds: float
    tokens: float
    loss: float
    """Nats a token."""
    cpu_s: float
    """CPU seconds of all expert actors from their start to the end of the step."""


@dataclass
class Course:
    """A job as it went, and the rebalance in the middle of it."""

    steps: list[Step] = field(default_factory=list)
    began_s: float = math.inf
    ended_s: float = math.inf
    """Unix times of the rebalance; infinite: there was none, or it did not end."""
    rebalances: list[Rebalance] = field(default_factory=list)
    """Those that changed something."""
    load_E: Sequence[int] = ()
    """Pairs of each expert number over the load window."""

    @property
    def before(self) -> list[Step]:
        return [step for step in self.steps if step.ended_s < self.began_s][WARMUP_STEPS:]

    @property
    def moving(self) -> list[Step]:
        return [step for step in self.steps if step.ended_s >= self.began_s and not self._is_after(step)]

    @property
    def after(self) -> list[Step]:
        return [step for step in self.steps if self._is_after(step)][WARMUP_STEPS:]

    def _is_after(self, step: Step) -> bool:
        return step.ended_s - step.seconds > self.ended_s


# --- What it comes to --------------------------------------------------------------------------------------------


def report_of(moved: Course, unmoved: Course, *, rounds: int, cores: int) -> Report:
    before, after = moved.before[-rounds:], moved.after[:rounds]
    rounds = min(len(before), len(after))
    if rounds < 2 or not moved.rebalances:
        raise Unavailable("the rebalance took the whole job, or moved nothing: there is nothing to compare")
    before, after = before[:rounds], after[:rounds]
    gain = rate_row("zipf_throughput", "tokens/s", before[0].tokens, _seconds(after), "before", _seconds(before))
    step_s = statistics.median(_seconds(before))
    return Report(
        "rebalance",
        [
            gain,
            _prediction(moved.rebalances, gain.ratio, step_s, cpu_of(before), cores, rounds),
            *_plan_rows(moved, cpu_of(before), cpu_of(after), rounds),
            *_stall_rows(moved, step_s),
            _loss_row(moved.steps, unmoved.steps),
        ],
    )


def _seconds(steps: Sequence[Step]) -> list[float]:
    return [step.seconds for step in steps]


def cpu_of(steps: Sequence[Step]) -> float:
    """CPU seconds of all expert actors a step; of consecutive steps."""
    return (steps[-1].cpu_s - steps[0].cpu_s) / (len(steps) - 1)


def predicted_gain(step_s: float, cpu_s: float, cores: int, share_before: float, share_after: float) -> float:
    """Step time before over after, if only the experts' part of a step changes.

    `cpu_s` a step of all expert actors, of one thread each: their part takes as long as the busiest one's share of it,
    or as the cores need for all of it. `share_*`: of the load, that the busiest actor has by the plan.
    """
    before_s, after_s = (cpu_s * max(share, 1 / cores) for share in (share_before, share_after))
    return step_s / (step_s - before_s + after_s)


def _prediction(
    rebalances: Sequence[Rebalance], gain: float, step_s: float, cpu_s: float, cores: int, rounds: int
) -> Row:
    balances = rebalances[0].balance_before, rebalances[-1].balance_after
    share_before, share_after = (1 / (NUM_ACTORS * balance) for balance in balances)
    predicted = predicted_gain(step_s, cpu_s, cores, share_before, share_after)
    peer = (
        f"predicted: the busiest actor has {share_before:.2f} of the load, then {share_after:.2f}; {cores} cores; "
        f"experts take {cpu_s:.2f} CPU seconds of a step of {step_s:.2f} s"
    )
    return Row("predicted_gain", gain, "after/before", peer, predicted, gain / predicted, rounds)


def _plan_rows(moved: Course, cpu_before: float, cpu_after: float, rounds: int) -> Iterator[Row]:
    before, after = moved.rebalances[0].balance_before, moved.rebalances[-1].balance_after
    yield Row("actor_balance", after, "average/maximum", "before", before, after / before, 1)
    yield Row("expert_cpu", cpu_after, "s/step", "before", cpu_before, cpu_before / cpu_after, rounds)
    zipf_E = zipf_share(len(moved.load_E))
    off, even_off = distance(moved.load_E, zipf_E), distance([1] * len(zipf_E), zipf_E)
    yield Row("zipf_load", off, "of the load", "even load", even_off, _over(even_off, off), 1)


def _stall_rows(moved: Course, step_s: float) -> Iterator[Row]:
    stall_s = max(rebalance.stall_s for rebalance in moved.rebalances)
    longest_s = max(_seconds(moved.moving), default=step_s)
    percent, count = 100 * stall_s / step_s, len(moved.rebalances)
    peer = "median step before"
    yield Row("switch_stall", stall_s * 1e3, "ms", peer, step_s * 1e3, _over(step_s, stall_s), count)
    ratio = _over(STALL_LIMIT_PERCENT, percent)
    yield Row("switch_stall_share", percent, "% of a step", "limit", STALL_LIMIT_PERCENT, ratio, count)
    yield Row("moving_step", longest_s * 1e3, "ms", peer, step_s * 1e3, step_s / longest_s, len(moved.moving))


def _loss_row(steps: Sequence[Step], unmoved: Sequence[Step]) -> Row:
    difference, learned = loss_difference(steps, unmoved), abs(steps[-1].loss / steps[0].loss - 1)
    ratio = _over(learned, difference)
    return Row("loss_difference", difference, "relative", "change by training", learned, ratio, len(steps))


def loss_difference(steps: Sequence[Step], unmoved: Sequence[Step]) -> float:
    """Largest relative one of steps of the same number."""
    loss_of = {step.number: step.loss for step in unmoved}
    return max(abs(step.loss / loss_of[step.number] - 1) for step in steps)


def _over(value: float, by: float) -> float:
    return value / by if by else math.inf


# --- The two jobs ------------------------------------------------------------------------------------------------


def num_steps(rounds: int) -> int:
    """Of each of the two jobs."""
    return 2 * (WARMUP_STEPS + rounds) + MOVING_STEPS


def bench_rebalance(config: ClusterConfig, *, rounds: int, after_step: AfterStep = lambda doing: None) -> Report:
    job = replace(JOB, steps=num_steps(rounds))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        save_zipf_model(path, MODEL, job)
        with launched(_cluster(config, path)) as running:
            unmoved, moved = asyncio.run(_two_jobs(running.backend, job, path, rounds, after_step))
    return report_of(moved, unmoved, rounds=rounds, cores=len(os.sched_getaffinity(0)))


def _cluster(config: ClusterConfig, path: Path) -> ClusterConfig:
    return replace(
        config,
        model=ModelConfig(path=str(path), tokenizer="bytes"),
        ray=replace(config.ray, nodes=NUM_NODES),
        experts=replace(config.experts, actors=NUM_ACTORS, group_size=GROUP_SIZE, threads=1, redundancy=1),
        router=replace(config.router, dtype="float32"),
        storage=replace(config.storage, root=str(path.parent)),
    )


async def _two_jobs(
    backend: Backend, job: JobConfig, path: Path, rounds: int, after_step: AfterStep
) -> tuple[Course, Course]:
    """Both begin with the same weights and placement, and see the same batches."""
    unmoved = await _Watch(backend, after_step, "training unmoved").run(job)
    await backend.import_model(str(path), timeout_s=TIMEOUT_S)
    moved = await _Watch(backend, after_step, "training, to be rebalanced").run(job, move_after=WARMUP_STEPS + rounds)
    return unmoved, moved


class _Watch:
    """Runs one job and notes how it goes."""

    def __init__(self, backend: Backend, after_step: AfterStep, doing: str) -> None:
        self._backend, self._after_step, self._doing = backend, after_step, doing
        self._course = Course()
        self._experts: list[psutil.Process] = []

    async def run(self, config: JobConfig, *, move_after: int | None = None) -> Course:
        """`move_after`: the rebalance begins when so many steps are done, and goes on beside those that follow."""
        status = await self._backend.status(timeout_s=TIMEOUT_S)
        self._experts = [psutil.Process(actor.pid) for actor in status.actors if actor.role == "expert"]
        job = await self._backend.submit_job(config, request_id=self._doing, timeout_s=TIMEOUT_S)
        move: asyncio.Task[None] | None = None
        last_event = 0
        while not job.state.is_final:
            events, job = await self._backend.job_events(job.id, after=last_event, max_events=100, wait_s=1.0)
            for event in events:
                last_event = event.number
                if event.kind == "step":
                    self._course.steps.append(step_of(event, self._cpu_s()))
                    self._after_step(self._doing)
            if move is None and move_after is not None and len(self._course.steps) >= move_after:
                move = asyncio.create_task(self._move())
        if move is not None:
            await move
        if job.error:
            raise Unavailable(f"the job of the bench failed: {job.error}")
        load_LE = (await self._backend.load_report(timeout_s=TIMEOUT_S)).load_LE
        self._course.load_E = [sum(load_L) for load_L in zip(*load_LE, strict=True)]
        return self._course

    async def _move(self) -> None:
        self._doing = "training while groups move"
        self._course.began_s = time.time()
        for _ in range(MAX_CALLS):
            result = await self._backend.rebalance(dry_run=False, timeout_s=TIMEOUT_S)
            if not result.done:
                break
            self._course.rebalances.append(result)
        self._course.ended_s = time.time()
        self._doing = "training after the rebalance"

    def _cpu_s(self) -> float:
        times = [process.cpu_times() for process in self._experts]
        return sum(time.user + time.system for time in times)


def step_of(event: JobEvent, cpu_s: float) -> Step:
    tokens = event.metrics["tokens"]
    seconds = tokens / event.metrics["tokens_per_s"]
    return Step(event.step, event.time_s, seconds, tokens, event.metrics["loss"], cpu_s)
