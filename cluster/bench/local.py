"""The small model that benchmarks of learning train, with its router and expert hosts in this process: local links, no
Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from actors.compress.settings import CompressionSettings
from actors.expert.host import ExpertHost
from actors.moe.settings import BalanceSettings, GateSettings
from actors.optim import OptimizerSettings
from actors.router.roster import Peer, Roster
from actors.router.router import Router
from actors.transport.contract import Link
from actors.transport.local import LocalLink
from actors.transport.message import Message
from actors.trunk.model import ModelSource
from actors.values import Address, Placement, StepReport
from cluster.config import BatchConfig, EvalConfig, JobConfig, OptimizerConfig, ScheduleConfig
from cluster.jobs.batches import MicroBatch
from cluster.jobs.tokenizer import ByteTokenizer

Metrics = dict[str, float]
Load = list[list[int]]

MODEL = {
    "model_type": "deepseek_v3",
    "vocab_size": 260,
    "bos_token_id": ByteTokenizer.bos_id,
    "eos_token_id": ByteTokenizer.eos_id,
    "pad_token_id": ByteTokenizer.pad_id,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 128,
    "initializer_range": 0.04,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
}
GATE = GateSettings(kind="deepseek")
"""Sigmoid scores, no group limit."""
NUM_HOSTS, GROUP_SIZE = 2, 8

JOB = JobConfig(
    batch=BatchConfig(sequences=8, sequence_length=64),
    optimizer=OptimizerConfig(lr=3e-3),
    schedule=ScheduleConfig(warmup_steps=20),
    eval=EvalConfig(batches=48),
)


@dataclass(frozen=True)
class LocalCluster:
    source: ModelSource
    hosts: Sequence[ExpertHost]
    peers: Mapping[str, Peer]
    router: Router


class CopyMeter:
    """Counts what the hosts send each other: gradients of groups with copies."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._hosts: dict[str, ExpertHost] = {}

    def open(self, name: str, address: Address) -> Link:
        return LocalLink(name, lambda peer, question: self._counted(self._hosts[name], peer, question))

    def watch(self, hosts: Sequence[ExpertHost]) -> None:
        self._hosts = {host.name: host for host in hosts}

    def _counted(self, host: ExpertHost, peer: str, question: Message) -> Message:
        self.num_bytes += question.num_bytes
        return host.exchange.handle(peer, question)


@contextmanager
def local_cluster(seed: int, copies: CopyMeter | None = None) -> Iterator[LocalCluster]:
    """With `copies` every group is on all hosts, each of which owns one."""
    source = ModelSource(values=MODEL, seed=seed)
    names = [f"expert-{i}" for i in range(NUM_HOSTS)]
    held = [tuple(names[i:] + names[:i]) if copies else (names[i],) for i in range(NUM_HOSTS)]
    placement = Placement(1, tuple(held), GROUP_SIZE)
    meter = copies or CopyMeter()
    hosts = [ExpertHost(n, source, placement.held_by(n), group_size=GROUP_SIZE, open_peer=meter.open) for n in names]
    meter.watch(hosts)
    peers = {host.name: Peer(_opener(host), Address("", host.name, "")) for host in hosts}
    router = Router(source, Roster(placement, peers), gate=GATE)
    try:
        yield LocalCluster(source, hosts, peers, router)
    finally:
        router.close()
        for host in hosts:
            host.close()


def _opener(host: ExpertHost) -> Callable[[], Link]:
    return lambda: LocalLink(host.name, host.handle)


class LocalRouter:
    """What a job asks of a router."""

    def __init__(self, router: Router, before_evaluation: Callable[[], None] = lambda: None) -> None:
        self._router, self._before_evaluation = router, before_evaluation

    def begin_run(self, optimizer: OptimizerConfig, balance: BalanceSettings, compression: CompressionSettings) -> None:
        values = asdict(optimizer)
        settings = OptimizerSettings(**{name: values[name] for name in OptimizerSettings().to_dict()})
        self._router.begin_run(settings, balance, compression)

    def train_step(
        self, microbatches: Sequence[MicroBatch], *, lr: float, clip_norm: float, bias_speed: float
    ) -> StepReport:
        tensors = [torch.from_numpy(ids_BS) for ids_BS in microbatches]
        return self._router.train_step(tensors, lr=lr, clip_norm=clip_norm, bias_speed=bias_speed)

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        self._before_evaluation()
        return self._router.serving.evaluate([torch.from_numpy(ids_BS) for ids_BS in batches])


class Evaluated(Protocol):
    heldout_loss: float


@dataclass(frozen=True)
class Recorder:
    """What a job reports: the held-out loss goes to the run, steps to the function."""

    run: Evaluated
    note: Callable[[int, Metrics, Load], None]

    def step_committed(self, step: int, metrics: Metrics, load_LE: Load) -> None:
        self.note(step, metrics, load_LE)

    def evaluated(self, step: int, metrics: Metrics) -> None:
        self.run.heldout_loss = metrics["heldout_loss"]
