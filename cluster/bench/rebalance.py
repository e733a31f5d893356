"""What `rebalance` with copies does for training when some experts are hot: a job on the real cluster, moved while it
runs, against the same job before the move and against the same job unmoved.

`zipf_throughput`: tokens a second after the rebalance and before it, medians of rounds of steps of one job.
`predicted_gain`: that ratio, and the one that the plan's loads predict (`predicted_gain`).
`zipf_load`: how far the load is from Zipf's law, as the part of it that lies elsewhere; the peer is an even load.
`actor_balance`: average over maximum load of the actors, by the plan, after and before.
`switch_stall`: the longest time that a step waited for a switch, against the median step; `switch_stall_share`: the
same in percent, against the limit. `moving_step`: the longest step while groups travelled, against the median step.
`loss_difference`: the largest relative difference of a step's loss from the unmoved job's; the peer is the most that
training changed the loss.

    S steps   A actors   E experts
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cluster.backend import Backend, JobEvent, Rebalance
from cluster.bench.result import Report, Row, rate_row
from cluster.bench.zipf import distance, save_zipf_model, zipf_share
from cluster.config import (
    BatchConfig,
    ClusterConfig,
    DataConfig,
    EvalConfig,
    JobConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from cluster.errors import Unavailable
from cluster.fabric.launch import launched
from cluster.jobs.tokenizer import ByteTokenizer

MODEL = {
    "model_type": "deepseek_v3",
    "vocab_size": 260,
    "bos_token_id": ByteTokenizer.bos_id,
    "eos_token_id": ByteTokenizer.eos_id,
    "pad_token_id": ByteTokenizer.pad_id,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 256,
    "initializer_range": 0.04,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 64,
    "n_shared_experts": 0,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "n_group": 1,
    "topk_group": 1,
}
NUM_ACTORS, NUM_NODES, GROUP_SIZE = 4, 2, 4
JOB = JobConfig(
    batch=BatchConfig(sequences=16, sequence_length=256, gradient_accumulation=2),
    optimizer=OptimizerConfig(lr=1e-5),
    schedule=ScheduleConfig(kind="constant"),
    data=DataConfig(heldout_every=0),
    eval=EvalConfig(every_steps=0),
)
STEPS_A_ROUND = 2
WARMUP_STEPS = 2
MOVING_STEPS = 10
"""Steps that the job has for the rebalance beside those that are timed."""
MAX_CALLS = 5
"""Of `rebalance`, until it finds nothing more to move."""
TIMEOUT_S = 120.0
STALL_LIMIT_PERCENT = 10.0

AfterStep = Callable[[str], None]
"""Told after each step which part of the bench it was of."""


@dataclass(frozen=True)
class Step:
    number: int
    ended_s: float
    """Unix time of its commit."""
    seconds: float
    tokens: float
    loss: float
    """Nats a token."""


@dataclass
class Course:
    """A job as it went, and the rebalance in the middle of it."""

    steps: list[Step] = field(default_factory=list)
    began_s: float = float("inf")
    ended_s: float = float("inf")
    """Unix times of the rebalance; infinite: there was none."""
    rebalances: list[Rebalance] = field(default_factory=list)
    """Those that moved something."""
    cpu_before: Mapping[str, float] = field(default_factory=dict)
    cpu_after: Mapping[str, float] = field(default_factory=dict)
    """CPU seconds a step of each actor."""
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


def rounds_of(steps: Sequence[Step]) -> list[float]:
    """Seconds of each STEPS_A_ROUND steps; a rest is left out."""
    whole = len(steps) // STEPS_A_ROUND
    return [sum(step.seconds for step in steps[i * STEPS_A_ROUND : (i + 1) * STEPS_A_ROUND]) for i in range(whole)]


def predicted_gain(step_s: float, experts_cpu_s: float, cores: int, share_before: float, share_after: float) -> float:
    """Step time before over after, if only the experts' part of it changes.

    `step_s`: median step before. `experts_cpu_s`: CPU seconds a step of all expert actors, one thread each, so that
    their part takes as long as the busiest one's share, or as the cores need for all of it. `share_*`: of all load that
    the busiest actor has by the plan.
    """
    before_s, after_s = (experts_cpu_s * max(share, 1 / cores) for share in (share_before, share_after))
    return step_s / (step_s - before_s + after_s)


def loss_difference(steps: Sequence[Step], unmoved: Sequence[Step]) -> float:
    """Largest relative one of steps of the same number."""
    loss_S = {step.number: step.loss for step in unmoved}
    return max(abs(step.loss - loss_S[step.number]) / abs(loss_S[step.number]) for step in steps)


def report_of(moved: Course, unmoved: Course, *, rounds: int, cores: int) -> Report:
    before_s, after_s = rounds_of(moved.before)[:rounds], rounds_of(moved.after)[:rounds]
    rounds = min(len(before_s), len(after_s))
    if not rounds:
        raise Unavailable("the rebalance took the whole job: no step after it was left to time")
    step_s = statistics.median(before_s) / STEPS_A_ROUND
    tokens = STEPS_A_ROUND * moved.steps[0].tokens
    gain = rate_row("zipf_throughput", "tokens/s", tokens, after_s[:rounds], "before", before_s[:rounds])
    first, last = moved.rebalances[0], moved.rebalances[-1]
    share_before, share_after = (1 / (NUM_ACTORS * b) for b in (first.balance_before, last.balance_after))
    experts_cpu_s = sum(moved.cpu_before.values())
    predicted = predicted_gain(step_s, experts_cpu_s, cores, share_before, share_after)
    stall_s = max(result.stall_s for result in moved.rebalances)
    slowest_s = max((step.seconds for step in moved.moving), default=step_s)
    zipf_E = zipf_share(len(moved.load_E))
    off, even_off = distance(moved.load_E, zipf_E), distance(np.ones_like(zipf_E), zipf_E)
    difference = loss_difference(moved.steps, unmoved.steps)
    learned = max(abs(step.loss / moved.steps[0].loss - 1) for step in moved.steps)
    return Report(
        "rebalance",
        [
            gain,
            Row("predicted_gain", gain.ratio, "after/before", f"predicted: busiest actor {share_before:.2f} to {share_after:.2f} of the load, {cores} cores, experts {experts_cpu_s:.2f} CPU s of a step of {step_s:.2f} s", predicted, gain.ratio / predicted, rounds),
            Row("zipf_load", off, "of the load", "even load", even_off, even_off / off, 1),
            Row("actor_balance", last.balance_after, "average/maximum", "before", first.balance_before, last.balance_after / first.balance_before, 1),
            _time_row("switch_stall", stall_s, step_s, len(moved.rebalances)),
            Row("switch_stall_share", 100 * stall_s / step_s, "% of a step", "limit", STALL_LIMIT_PERCENT, 0.0, 1),
            _time_row("moving_step", slowest_s, step_s, len(moved.moving)),
            Row("loss_difference", difference, "relative", "change by training", learned, learned / difference if difference else float("inf"), len(moved.steps)),
        ],
    )


def _time_row(case: str, seconds: float, step_s: float, count: int) -> Row:
    return Row(case, 1e3 * seconds, "ms", "median step before", 1e3 * step_s, step_s / seconds if seconds else float("inf"), count)


# --- The two jobs ------------------------------------------------------------------------------------------------


def num_steps(rounds: int) -> int:
    return 2 * (WARMUP_STEPS + rounds * STEPS_A_ROUND) + MOVING_STEPS


def bench_rebalance(config: ClusterConfig, *, rounds: int, after_step: AfterStep = lambda part: None) -> Report:
    job = replace(JOB, steps=num_steps(rounds))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        save_zipf_model(path, MODEL, job)
        with launched(_cluster(config, path)) as running:
            unmoved, moved = asyncio.run(_jobs(running.backend, job, path, rounds, after_step))
    return report_of(moved, unmoved, rounds=rounds, cores=len(os.sched_getaffinity(0)))


def _cluster(config: ClusterConfig, path: Path) -> ClusterConfig:
    return replace(
        config,
        model=replace(config.model, path=str(path), values={}, tokenizer="bytes"),
        ray=replace(config.ray, nodes=NUM_NODES),
        experts=replace(config.experts, actors=NUM_ACTORS, group_size=GROUP_SIZE, threads=1, redundancy=1),
        storage=replace(config.storage, root=str(path.parent)),
    )


async def _jobs(
    backend: Backend, job: JobConfig, path: Path, rounds: int, after_step: AfterStep
) -> tuple[Course, Course]:
    """The same weights, batches and placement at the start of both."""
    unmoved = await _Watch(backend, job, "unmoved", after_step).run()
    await backend.import_model(str(path), timeout_s=TIMEOUT_S)
    watch = _Watch(backend, job, "before", after_step)
    move_after = WARMUP_STEPS + rounds * STEPS_A_ROUND
    moved = await watch.run(move_after)
    return unmoved, moved


class _Watch:
    """Runs one job and follows it."""

    def __init__(self, backend: Backend, job: JobConfig, name: str, after_step: AfterStep) -> None:
        self._backend, self._job, self._part, self._after_step = backend, job, name, after_step
        self._course = Course()

    async def run(self, move_after: int | None = None) -> Course:
        """With a rebalance after so many steps, that goes on beside those that follow."""
        course = self._course
        job = await self._backend.submit_job(self._job, request_id=self._part, timeout_s=TIMEOUT_S)
        clock = _Clock(await _pids(self._backend))
        move: asyncio.Task[None] | None = None
        last = 0
        while not job.state.is_final:
            events, job = await self._backend.job_events(job.id, after=last, max_events=100, wait_s=1.0)
            for event in events:
                last = event.number
                if event.kind == "step":
                    course.steps.append(step_of(event))
                    self._after_step(self._part)
            done = len(course.steps)
            if move_after is None:
                continue
            if done >= WARMUP_STEPS and not clock.began:
                clock.begin(done)
            if done >= move_after and move is None:
                course.cpu_before = clock.end(done)
                move = asyncio.create_task(self._move())
            if move is not None and move.done():
                if self._part == "after" and not clock.began and len(course.after) >= 1:
                    clock.begin(done)
                if clock.began and len(course.after) >= move_after - WARMUP_STEPS and not job.state.is_final:
                    course.cpu_after = clock.end(done)
        if move is not None:
            await move
            course.load_E = np.sum((await self._backend.load_report(timeout_s=TIMEOUT_S)).load_LE, axis=0).tolist()
        if job.error:
            raise Unavailable(f"the job of the bench failed: {job.error}")
        return course

    async def _move(self) -> None:
        course = self._course
        self._part = "moving"
        course.began_s = time.time()
        for _ in range(MAX_CALLS):
            result = await self._backend.rebalance(dry_run=False, timeout_s=TIMEOUT_S)
            print(result.moves, result.stall_s, result.balance_before, result.balance_after, result.message, time.time()-course.began_s)
            if not result.done:
                break
            course.rebalances.append(result)
        course.ended_s = time.time()
        self._part = "after"


class _Clock:
    """CPU seconds a step of processes."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        self._start: dict[str, float] = {}
        self._step = 0

    @property
    def began(self) -> bool:
        return bool(self._start)

    def begin(self, step: int) -> None:
        self._start, self._step = self._now(), step

    def end(self, step: int) -> dict[str, float]:
        now, before = self._now(), self._start
        self._start = {}
        return {name: (now[name] - before[name]) / max(1, step - self._step) for name in now}

    def _now(self) -> dict[str, float]:
        times = {name: psutil.Process(pid).cpu_times() for name, pid in self._pids.items()}
        return {name: t.user + t.system for name, t in times.items()}


async def _pids(backend: Backend) -> dict[str, int]:
    status = await backend.status(timeout_s=TIMEOUT_S)
    return {actor.id: actor.pid for actor in status.actors}


def step_of(event: JobEvent) -> Step:
    metrics = event.metrics
    seconds = metrics["tokens"] / metrics["tokens_per_s"]
    return Step(event.step, event.time_s, seconds, metrics["tokens"], metrics["loss"])
