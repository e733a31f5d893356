"""What updates beside forwards cost in learning, what they save in time, and what sparse updates save.

`loss_s1_muon` and the other `loss_*`: held-out loss after the last step and all updates, of equal tokens, when every
update of the experts is made exactly so many steps late; the peer is the same optimizer without delay, of the same
seeds. Means over the seeds, all of them for one step of delay and one for more; a round is a seed. `time_loss_*`: of
training, when s = 0 has made half of its steps, with one actor four times slower in its updates. Trunks are never late.
`*_corrected`: with DC-ASGD's correction, in its adaptive form.

`sparse_update`: the optimizer phase of an actor (norm, update, gradients back to zero) where a quarter of 64 experts
has gradients, against a dense update of the same; time of the processor. Experts without tokens are left alone
(`skip`), the same quarter at each step; `_random`: another one each time; `_exact`: their steps are put off instead,
and made before the next forward that wants them, which is counted. With another quarter each time that is 12 of the 16
experts, 4 steps behind on average; made one by one these 48 steps and the 16 of the update would be the 64 of the dense
one, with less memory to read. Made as few (`actors.moe.missed`) they are a pass over the 12 each, so that 16 / 64 of
the phase and 12 / 64 of its update alone are left: at most 2.9 times as fast, where the update is half of the phase.

`straggler_*`, `retained_*`: see `cluster.bench.stragglers`; `hidden_optimizer_share`: `cluster.bench.beside`.

But for the last everything runs in this process, without Ray.

    S steps   E experts
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from actors.expert.holdings import Holdings
from actors.expert.residency import Quarters
from actors.expert.updates import Brake
from actors.optim import OptimizerSettings, Sparse
from actors.trunk.model import ModelSource, Skeleton, skeleton
from cluster.bench.balance import TASKS
from cluster.bench.beside import hidden_rows
from cluster.bench.beside import num_rounds as num_beside
from cluster.bench.local import JOB, MODEL, Load, LocalRouter, Metrics, Recorder, local_cluster
from cluster.bench.result import Advance, Report, Row, time_row
from cluster.bench.steady import TrainingShape, torch_threads
from cluster.bench.stragglers import Shape, num_runs, straggler_rows
from cluster.config import DataConfig, EvalConfig, OptimizerConfig
from cluster.jobs.runner import run_job

TASK = "text"
STALENESS = (0, 1, 2, 4)
OPTIMIZERS: Mapping[str, OptimizerConfig] = {
    "adamw": JOB.optimizer,
    "adamw_corrected": replace(JOB.optimizer, delay_correction=200.0),
    "muon": replace(JOB.optimizer, experts="muon"),
    "muon_corrected": replace(JOB.optimizer, experts="muon", delay_correction=1.0),
}
"""Strengths of about 1, as the paper's, do little for AdamW here: the square of a mean over hundreds of tokens is that
much smaller than the mean of their squares, which stands for the curvature. Of 1, 20, 100, 200 and 600 for AdamW,
1, 5 and 20 for Muon, these left least (s = 4, one seed)."""
MAX_STALENESS_OF_ALL_SEEDS = 1
RECENT_STEPS = 20
"""That a loss of training is averaged over."""


# --- Learning ----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training under one optimizer, every update of the experts `staleness` steps late."""

    optimizer: str
    staleness: int
    seed: int
    losses: list[float] = field(default_factory=list, repr=False)
    """Of each step's batch, nats a token."""
    heldout_loss: float = float("nan")

    def loss_after(self, steps: float) -> float:
        """Mean of the steps up to this one."""
        last = max(1, min(round(steps), len(self.losses)))
        return float(np.mean(self.losses[max(0, last - RECENT_STEPS) : last]))


def cases() -> list[tuple[str, int]]:
    """(optimizer, staleness); without delay there is nothing to correct."""
    return [(name, s) for name, o in OPTIMIZERS.items() for s in STALENESS if s or not o.delay_correction]


def all_runs(seeds: int) -> list[Run]:
    """Not made yet. What the bars are about has every seed, the rest one."""
    return [
        Run(name, s, seed)
        for seed in range(seeds)
        for name, s in cases()
        if s <= MAX_STALENESS_OF_ALL_SEEDS or not seed
    ]


def train_all(*, seeds: int, steps: int, after_step: Callable[[Run], None] = lambda run: None) -> list[Run]:
    runs = all_runs(seeds)
    with torch_threads(1):
        for run in runs:
            _train(run, steps, after_step)
    return runs


def loss_rows(runs: Sequence[Run]) -> Iterator[Row]:
    for name, staleness in cases():
        late, undelayed = _compared(runs, name, staleness)
        value, peer = (float(np.mean([run.heldout_loss for run in group])) for group in (late, undelayed))
        yield Row(f"loss_s{staleness}_{name}", value, "nats/token", "s = 0", peer, peer / value, len(late))


def time_rows(runs: Sequence[Run], speed: Mapping[int, float]) -> Iterator[Row]:
    """Training losses at the time at which half of the steps of s = 0 are made, where speeds are known."""
    half = len(runs[0].losses) / 2
    for name, staleness in cases():
        if staleness in speed:
            late, undelayed = _compared(runs, name, staleness)
            value = float(np.mean([run.loss_after(half * speed[staleness]) for run in late]))
            peer = float(np.mean([run.loss_after(half) for run in undelayed]))
            yield Row(f"time_loss_s{staleness}_{name}", value, "nats/token", "s = 0", peer, peer / value, len(late))


def _compared(runs: Sequence[Run], optimizer: str, staleness: int) -> tuple[list[Run], list[Run]]:
    """Those, and the same seeds without delay."""
    late = [run for run in runs if (run.optimizer, run.staleness) == (optimizer, staleness)]
    plain, seeds = optimizer.removesuffix("_corrected"), {run.seed for run in late}
    return late, [run for run in runs if (run.optimizer, run.staleness) == (plain, 0) and run.seed in seeds]


def _train(run: Run, steps: int, after_step: Callable[[Run], None]) -> None:
    evaluation = EvalConfig(every_steps=steps, batches=24)
    optimizer = replace(OPTIMIZERS[run.optimizer], staleness=run.staleness)
    job = replace(JOB, steps=steps, optimizer=optimizer, data=DataConfig(seed=run.seed), eval=evaluation)

    def note(step: int, metrics: Metrics, load_LE: Load) -> None:
        run.losses.append(metrics["loss"])
        after_step(run)

    with local_cluster(run.seed) as cluster:
        for host in cluster.hosts:
            host.updates.brake = Brake(hold=run.staleness)

        def make_all_updates() -> None:
            cluster.router.status()  # waits for the commit
            for host in cluster.hosts:
                host.updates.drain()

        router = LocalRouter(cluster.router, make_all_updates)
        run_job(job, router, TASKS[TASK](job.data), Recorder(run, note), should_stop=lambda: False)


# --- Sparse updates ----------------------------------------------------------------------------------------------

SPARSE_EXPERTS, TOUCHED_EXPERTS = 64, 16
SPARSE_MODEL = MODEL | {
    "num_hidden_layers": 1,
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "n_routed_experts": SPARSE_EXPERTS,
}
"""12.6 M parameters in the experts."""
SPARSE_GROUP_SIZE = 8
SPARSE_CASES: Mapping[str, tuple[Sparse, bool]] = {
    "sparse_update": ("skip", False),
    "sparse_update_random": ("skip", True),
    "sparse_update_exact": ("exact", False),
    "sparse_update_exact_random": ("exact", True),
}
"""Mode, and whether it is another quarter of the experts at each step."""


def sparse_rows(*, rounds: int, advance: Advance = lambda doing: None) -> Iterator[Row]:
    model = skeleton(ModelSource(values=SPARSE_MODEL))
    with torch_threads(1):
        for case, (sparse, is_random) in SPARSE_CASES.items():
            ours, theirs = _Actor(model, sparse), _Actor(model, "none")
            seconds = [_interleaved(ours, theirs, number, is_random) for number in range(-WARMUPS, rounds)][WARMUPS:]
            advance(case)
            yield time_row(case, "ms", 1e3, [s for s, _ in seconds], "dense", [s for _, s in seconds])


WARMUPS = 60
"""Until every expert has had a gradient, and the random choice finds them as far behind as it ever will."""


def _interleaved(ours: _Actor, theirs: _Actor, number: int, is_random: bool) -> tuple[float, float]:
    choice = torch.randperm(
        SPARSE_EXPERTS, generator=torch.Generator().manual_seed(number + WARMUPS if is_random else 0)
    )
    touched = sorted(choice[:TOUCHED_EXPERTS].tolist())
    return ours.update(touched, number), theirs.update(touched, number)


class _Actor:
    """Holds all groups, and gets gradients without forwards."""

    def __init__(self, model: Skeleton, sparse: Sparse) -> None:
        groups = range(SPARSE_EXPERTS // SPARSE_GROUP_SIZE)

        def load(layer: int, groups: Sequence[int]) -> dict[str, Tensor]:
            draw = torch.Generator().manual_seed(0)
            count = len(groups) * SPARSE_GROUP_SIZE
            shapes = model.layers[layer].shapes().items()
            return {name: 0.02 * torch.randn(count, *shape, generator=draw) for name, shape in shapes}

        self._holdings = Holdings(Quarters(model, SPARSE_GROUP_SIZE, torch.device("cpu")), list(groups), load)
        self._holdings.begin_run(OptimizerSettings(sparse=sparse))

    def update(self, touched: Sequence[int], seed: int) -> float:
        """Seconds that a step's optimizer phase takes its thread, with what was put off for the forward before it."""
        holdings, stack = self._holdings, self._holdings.stacks[0]
        counts_E = [int(e in touched) for e in range(stack.num_experts)]
        started = time.thread_time()
        holdings.catch_up(0, counts_E)
        caught_up_s = time.thread_time() - started
        draw = torch.Generator().manual_seed(1000 + seed)
        for name in stack.names:
            gradient = stack.gradient(name)
            for expert in touched:
                gradient[expert].normal_(0.0, 1e-3, generator=draw)
        stack.touched.update(touched)
        started = time.thread_time()
        holdings.square_sum(holdings.groups)
        holdings.update(1e-3, 0.9)
        return caught_up_s + time.thread_time() - started


# --- All of it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    steps: int
    """Of each training."""
    seeds: int
    shape: Shape = field(default_factory=Shape)
    beside: TrainingShape = field(
        default_factory=lambda: TrainingShape(num_experts=12, vocabulary=16384, sequences=1, warmups=3, steps=8)
    )
    sparse_rounds: int = 15
    beside_rounds: int = 15
    straggler_rounds: int = 3

    def num_steps(self) -> int:
        """How often `bench_async` says what is being done."""
        timed = len(SPARSE_CASES) + num_beside(self.beside_rounds) + num_runs(self.straggler_rounds)
        return timed + len(all_runs(self.seeds)) * self.steps


WHOLE = Extent(steps=100, seeds=3)
"""Meant for less than ten minutes on two cores that have nothing else to do."""
QUICK = Extent(
    steps=30,
    seeds=1,
    shape=Shape(warmups=5, steps=6, pause_s=1.0, window_s=2.0),
    sparse_rounds=3,
    beside_rounds=1,
    straggler_rounds=1,
)


def bench_async(extent: Extent, advance: Advance = lambda doing: None) -> tuple[Report, list[Run], Mapping[int, float]]:
    """-> the report, what it was made of, and tokens a second by staleness against those of s = 0."""
    rows = [
        *sparse_rows(rounds=extent.sparse_rounds, advance=advance),
        *hidden_rows(rounds=extent.beside_rounds, shape=extent.beside, advance=advance),
        *straggler_rows(rounds=extent.straggler_rounds, shape=extent.shape, advance=advance),
    ]
    speed = {0: 1.0} | {s: row.ratio for row in rows for s in STALENESS if row.case == f"straggler_4x_s{s}"}
    runs = train_all(
        seeds=extent.seeds,
        steps=extent.steps,
        after_step=lambda run: advance(f"training {run.optimizer}, s = {run.staleness}, seed {run.seed}"),
    )
    return Report("async", [*loss_rows(runs), *time_rows(runs, speed), *rows]), runs, speed
