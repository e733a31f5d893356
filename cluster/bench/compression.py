"""What compression of gradients saves on the link between two routers, and on that between the copies of expert groups,
and what it costs in loss.

A leader and a replica train `bench balance`'s small model on its task `text`, in this process, each on half of every
batch, once without compression and once with each setting: same seed, same data, same division of every batch. A round
is a seed. A row is a setting: `value` is what gradients took on the link in a step, there and back, as the link has
counted it; `ratio` how many times that is fewer than without; `link_ratio` the same for everything that crossed the
link, token ids and expert load included; `loss_difference` the held-out loss after the last step over that without
compression, less one.

With one seed INT8 and FP8 cost 0.2 % at most, PowerSGD at rank 8, with INT8 factors, 0.9 % for 16 times fewer bytes; at
rank 1 it is 114 times fewer, and 7 %. Top-k costs more at the same bytes, likely since AdamW divides each value by what
it has seen of it, which rare large values make large.

Rows `copies_...` are the same for one router and two expert hosts that have every group between them, where experts'
gradients travel from each host to the groups' owner and their sums back. The peer is that without compression. Each
expert sees few tokens a step, and its matrices are larger than the trunk's: rank 2 is 101 times fewer bytes for 0.7 %,
rank 1 201 times for 1.5 % (means of three seeds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from actors.compress.settings import CompressionSettings
from actors.router.division import Speeds
from actors.router.replica import Replica
from actors.router.router import Router
from actors.transport.local import LocalLink
from actors.transport.message import Message
from cluster.bench.balance import TASKS
from cluster.bench.local import GATE, JOB, CopyMeter, Load, LocalRouter, Metrics, Recorder, local_cluster
from cluster.bench.result import Report, Row
from cluster.config import DataConfig
from cluster.jobs.runner import run_job

STEPS = 300
THREADS = 1
"""So small a model gains nothing from more, and loses much where others use the cores too."""
UNCOMPRESSED = CompressionSettings()
SETTINGS: Sequence[CompressionSettings] = (
    UNCOMPRESSED,
    CompressionSettings("int8"),
    CompressionSettings("fp8"),
    CompressionSettings("powersgd", rank=16, quantised=True),
    CompressionSettings("powersgd", rank=8, quantised=True),
    CompressionSettings("powersgd", rank=4, quantised=True),
    CompressionSettings("powersgd", rank=2, quantised=True),
    CompressionSettings("powersgd", rank=1, quantised=True),
    CompressionSettings("topk", share=0.25, quantised=True),
    CompressionSettings("topk", share=0.1, quantised=True),
    CompressionSettings("topk", share=0.03, quantised=True),
    CompressionSettings("topk", share=0.01, quantised=True),
)


@dataclass
class Run:
    """One training under one setting."""

    settings: CompressionSettings
    seed: int
    steps: int = 0
    gradient_bytes: int = 0
    link_bytes: int = 0
    heldout_loss: float = float("nan")
    """Nats a token."""


@dataclass(frozen=True)
class CompressionRow(Row):
    heldout_loss: float
    """Nats a token, mean over the rounds."""
    loss_difference: float
    """To the same seeds without compression, relative; above 0 is worse."""
    link_ratio: float


AfterStep = Callable[[Run], None]
COPIES: Sequence[CompressionSettings] = (
    CompressionSettings(copies=True),
    *(
        replace(each, copies=True)
        for each in (
            CompressionSettings("int8"),
            CompressionSettings("fp8"),
            CompressionSettings("powersgd", rank=8, quantised=True),
            CompressionSettings("powersgd", rank=2, quantised=True),
            CompressionSettings("powersgd", rank=1, quantised=True),
            CompressionSettings("topk", share=0.05, quantised=True),
        )
    ),
)
"""For the copies of expert groups; the first is what the others are compared to."""


def bench_compression(
    *,
    rounds: int,
    steps: int = STEPS,
    settings: Sequence[CompressionSettings] = (*SETTINGS, *COPIES),
    after_step: AfterStep = lambda run: None,
) -> list[Run]:
    """Every setting with `rounds` seeds. Others are compared to the first for routers, or to the first for copies."""
    torch.set_num_threads(THREADS)
    runs = [Run(each, seed) for seed in range(rounds) for each in settings]
    for run in runs:
        _train(run, steps, after_step)
    return runs


def report_of(runs: Sequence[Run]) -> Report:
    rows = []
    for each in dict.fromkeys(run.settings for run in runs):
        alike = [run for run in runs if run.settings.copies == each.copies]
        rows.append(_row([run for run in alike if run.settings == each], alike))
    return Report("compression", rows)


def label(settings: CompressionSettings) -> str:
    """Such as `powersgd_rank_4_int8`."""
    detail = {"powersgd": f"_rank_{settings.rank}", "topk": f"_{settings.share:g}"}.get(settings.method, "")
    name = f"{settings.method}{detail}{'_int8' if detail and settings.quantised else ''}"
    return f"copies_{name}" if settings.copies else name


def _row(ours: Sequence[Run], runs: Sequence[Run]) -> CompressionRow:
    theirs = [run for run in runs if run.settings == runs[0].settings]
    bytes_a_step, link_bytes, loss = (_mean(ours, name) for name in ("gradient_bytes", "link_bytes", "heldout_loss"))
    peer_bytes, peer_link_bytes, peer_loss = (
        _mean(theirs, name) for name in ("gradient_bytes", "link_bytes", "heldout_loss")
    )
    return CompressionRow(
        case=label(ours[0].settings),
        value=bytes_a_step / ours[0].steps,
        unit="bytes/step",
        peer=label(runs[0].settings),
        peer_value=peer_bytes / theirs[0].steps,
        ratio=peer_bytes / bytes_a_step,
        rounds=len(ours),
        heldout_loss=loss,
        loss_difference=loss / peer_loss - 1,
        link_ratio=peer_link_bytes / link_bytes,
    )


def _mean(runs: Sequence[Run], name: str) -> float:
    return float(np.mean([getattr(run, name) for run in runs]))


# --- One training ----------------------------------------------------------------------------------------------------


def _train(run: Run, steps: int, after_step: AfterStep) -> None:
    data = DataConfig(seed=run.seed)
    job = replace(JOB, steps=steps, data=data, eval=replace(JOB.eval, every_steps=steps), compression=run.settings)

    def note(step: int, metrics: Metrics, load_LE: Load) -> None:
        run.steps = step
        after_step(run)

    if run.settings.copies:
        meter = CopyMeter()
        with local_cluster(run.seed, meter) as cluster:
            run_job(
                job, LocalRouter(cluster.router), TASKS["text"](data), Recorder(run, note), should_stop=lambda: False
            )
        run.link_bytes = run.gradient_bytes = meter.num_bytes
        return
    with _two_routers(run.seed) as (leader, link):
        joined_bytes = link.traffic.bytes_sent + link.traffic.bytes_received
        run_job(job, LocalRouter(leader), TASKS["text"](data), Recorder(run, note), should_stop=lambda: False)
        run.link_bytes = link.traffic.bytes_sent + link.traffic.bytes_received - joined_bytes
        run.gradient_bytes = link.gradient_bytes


class _Meter(LocalLink):
    """Counts those bytes apart that are gradients."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica.name, self._counted)
        self.gradient_bytes = 0
        self._replica = replica

    def _counted(self, peer: str, question: Message) -> Message:
        answer = self._replica.handle(peer, question)
        match question.op:
            case "prepare":
                gradients = question.tensors[2:]  # load and presence come first
            case "gradients" | "sum":
                gradients = question.tensors + answer.tensors
            case _:
                gradients = ()
        self.gradient_bytes += sum(t.numel() * t.element_size() for t in gradients)
        return answer


class _Even(Speeds):
    """Knows no speed: parts of a batch are equal, whatever else the machine does."""

    def note(self, name: str, num_tokens: int, seconds: float) -> None:
        return


@contextmanager
def _two_routers(seed: int) -> Iterator[tuple[Router, _Meter]]:
    """The one that leads, and its link to the other."""
    with local_cluster(seed) as cluster:
        leader, other = cluster.router, Router(cluster.source, None, gate=GATE)
        leader.replicas.speeds = _Even()
        try:
            link = _Meter(Replica("replica", other, lambda name, contact: cluster.peers[name]))
            leader.join("replica", link)
            yield leader, link
        finally:
            other.close()
