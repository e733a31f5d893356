"""What updates beside forwards cost in learning, what they save in time, and what sparse updates save.

`loss_s1_muon` and the other `loss_*`: held-out loss after the last step and all updates, of equal tokens, when every
update of the experts is made exactly so many steps late; the peer is the same optimizer without delay. Means over the
seeds; a round is a seed. `time_loss_*`: of training, when s = 0 has made half of its steps, with one actor four times
slower in its updates. Trunks are never late. `*_corrected`: with DC-ASGD's correction, in its adaptive form.

`sparse_update`: the optimizer phase of an actor (norm, update, gradients back to zero) where a quarter of 64 experts
has gradients, against a dense update of the same. Experts without tokens are left alone (`skip`), the same quarter at
each step; `_random`: another one each time; `_exact`: their steps are put off instead, and made before the next forward
that wants them, which is counted.

`straggler_*`, `retained_*`, `hidden_optimizer_share`: see `cluster.bench.stragglers`.

Everything runs in this process over local links, without Ray.

    S steps   E experts
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from cluster.bench.local import JOB, MODEL, Load, LocalRouter, Metrics, Recorder, local_cluster
from cluster.bench.result import Report, Row, time_row
from cluster.bench.stragglers import Shape, hidden_rows, straggler_rows
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
RECENT_STEPS = 20
"""That a loss of training is averaged over."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Of torch's in each operation, as an actor among others has: small ones wait for their threads otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def train_all(*, seeds: int, steps: int, after_step: Callable[[Run], None] = lambda run: None) -> list[Run]:
    runs = [Run(name, staleness, seed) for seed in range(seeds) for name, staleness in cases()]
    with one_thread():
        for run in runs:
            _train(run, steps, after_step)
    return runs


def loss_rows(runs: Sequence[Run]) -> Iterator[Row]:
    for name, staleness in cases():
        late, undelayed = _runs_of(runs, name, staleness), _runs_of(runs, name.removesuffix("_corrected"), 0)
        value, peer = (float(np.mean([run.heldout_loss for run in group])) for group in (late, undelayed))
        yield Row(f"loss_s{staleness}_{name}", value, "nats/token", "s = 0", peer, peer / value, len(late))


def time_rows(runs: Sequence[Run], speed: Mapping[int, float]) -> Iterator[Row]:
    """Training losses at the time at which half of the steps of s = 0 are made, where speeds are known."""
    half = len(runs[0].losses) / 2
    for name, staleness in cases():
        if staleness in speed:
            late, undelayed = _runs_of(runs, name, staleness), _runs_of(runs, name.removesuffix("_corrected"), 0)
            value = float(np.mean([run.loss_after(half * speed[staleness]) for run in late]))
            peer = float(np.mean([run.loss_after(half) for run in undelayed]))
            yield Row(f"time_loss_s{staleness}_{name}", value, "nats/token", "s = 0", peer, peer / value, len(late))


def _runs_of(runs: Sequence[Run], optimizer: str, staleness: int) -> list[Run]:
    return [run for run in runs if (run.optimizer, run.staleness) == (optimizer, staleness)]


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


def sparse_rows(*, rounds: int) -> Iterator[Row]:
    model = skeleton(ModelSource(values=SPARSE_MODEL))
    with one_thread():
        for case, (sparse, is_random) in SPARSE_CASES.items():
            ours, theirs = _Actor(model, sparse), _Actor(model, "none")
            seconds = [_interleaved(ours, theirs, number, is_random) for number in range(-WARMUPS, rounds)][WARMUPS:]
            yield time_row(case, "ms", 1e3, [s for s, _ in seconds], "dense", [s for _, s in seconds])


WARMUPS = 4
"""Enough for the random choice to have experts that are some steps behind."""


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
        """Seconds of a step's optimizer phase, with what was put off for the forward before it."""
        holdings, stack = self._holdings, self._holdings.stacks[0]
        counts_E = [int(e in touched) for e in range(stack.num_experts)]
        started = time.perf_counter()
        holdings.catch_up(0, counts_E)
        caught_up_s = time.perf_counter() - started
        draw = torch.Generator().manual_seed(1000 + seed)
        for name in stack.names:
            gradient = stack.gradient(name)
            for expert in touched:
                gradient[expert].normal_(0.0, 1e-3, generator=draw)
        stack.touched.update(touched)
        started = time.perf_counter()
        holdings.square_sum(holdings.groups)
        holdings.update(1e-3, 0.9)
        return caught_up_s + time.perf_counter() - started


# --- All of it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    steps: int
    """Of each training."""
    seeds: int
    rounds: int
    """Of what is timed."""
    shape: Shape


WHOLE = Extent(steps=100, seeds=3, rounds=5, shape=Shape())
QUICK = Extent(steps=30, seeds=1, rounds=1, shape=Shape(warmups=5, steps=6, pause_s=1.0, window_s=2.0))


def bench_async(
    extent: Extent, after_step: Callable[[Run], None] = lambda run: None
) -> tuple[Report, list[Run], Mapping[int, float]]:
    """-> the report, what it was made of, and tokens a second by staleness against those of s = 0."""
    rows = [
        *sparse_rows(rounds=extent.rounds),
        *hidden_rows(rounds=extent.rounds, shape=extent.shape),
        *straggler_rows(rounds=extent.rounds, shape=extent.shape),
    ]
    speed = {0: 1.0} | {s: row.ratio for row in rows for s in STALENESS if row.case == f"straggler_4x_s{s}"}
    runs = train_all(seeds=extent.seeds, steps=extent.steps, after_step=after_step)
    return Report("async", [*loss_rows(runs), *time_rows(runs, speed), *rows]), runs, speed
