"""The Ray edge of the plain classes: an expert actor, a router actor. Nothing is decided here.

torch and transformers take seconds to import, so only the actors themselves do it, all at the same time: whoever starts
them imports this module without.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.moe.settings import BalanceSettings
from actors.values import Address, Sampling, StepReport, TokenEvent
from cluster.config import ClusterConfig, OptimizerConfig
from cluster.control.coordinator import ModelFacts
from cluster.fabric.options import CONTROL, ROUTER, SERVE, TRAIN
from cluster.jobs.batches import MicroBatch

if TYPE_CHECKING:
    from torch import Tensor

    from actors.transport.contract import Link
    from actors.transport.message import Message


@dataclass(frozen=True)
class ExpertContact:
    """How to reach an expert actor on the data plane, and what it owns."""

    name: str
    node_id: str
    pid: int
    address: Address
    groups: tuple[int, ...]
    experts: tuple[int, ...]


class ExpertWorker:
    """Holds an `ExpertHost` and serves its links from a thread of its own; Ray calls only look after it."""

    def __init__(self, name: str, config: ClusterConfig, bind_host: str) -> None:
        _import_torch(config.experts.threads)
        self._name, self._config, self._bind_host = name, config, bind_host

    def load(self, groups: Sequence[int]) -> ExpertContact:
        """Takes the weights of its groups and begins to serve."""
        from actors.expert import ExpertHost
        from actors.transport.socket import SocketServer
        from cluster.fabric.model import model_source

        self._host = ExpertHost(
            self._name,
            model_source(self._config),
            groups,
            group_size=self._config.experts.group_size,
            device=self._config.experts.device,
        )
        self._server = SocketServer(
            self._name,
            self._host.handle,
            host=self._bind_host,
            max_bytes=self._config.links.max_message_bytes,
            idle=self._host.idle,
        )
        self._server.start()
        return ExpertContact(
            self._name,
            ray.get_runtime_context().get_node_id(),
            os.getpid(),
            self._server.address,
            self._host.groups,
            tuple(self._host.experts),
        )

    def handle(self, question: Message) -> Message:
        """The data plane's question as a Ray call: what the links are measured against."""
        return self._host.handle("ray", question)

    def vitals(self) -> dict[str, Any]:
        return self._host.status()

    def wait_until_death(self) -> None:
        """Never returns: the caller's reference fails the moment this process is gone."""
        threading.Event().wait()


class RouterWorker:
    """Holds a `Router`. Training, serving and control calls run in concurrency groups of their own."""

    def __init__(self, config: ClusterConfig) -> None:
        _import_torch(config.router.threads)
        self._config = config
        self._sessions: set[str] = set()

    @ray.method(concurrency_group=CONTROL)
    def facts(self) -> ModelFacts:
        """What there is to know of the model before anything is loaded."""
        from cluster.fabric.model import model_facts

        return model_facts(self._config)

    @ray.method(concurrency_group=CONTROL)
    def load(self, experts: Sequence[ExpertContact]) -> tuple[str, int]:
        """Takes the trunk's weights and opens links to the experts. Returns its node and process id."""
        from actors.router import Router
        from cluster.fabric.model import model_source

        self._names = [expert.name for expert in experts]
        self._router = Router(
            model_source(self._config),
            [self._opener(expert) for expert in experts],
            [expert.experts for expert in experts],
            gate=self._config.model.gate,
            device=self._config.router.device,
            timeout_s=self._config.router.request_timeout_s,
            max_step_retries=self._config.router.max_step_retries,
            max_sessions=self._config.router.max_sessions,
        )
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def _opener(self, expert: ExpertContact) -> Any:
        from actors.transport.socket import SocketLink

        def open_link() -> Link:
            return SocketLink(
                expert.name,
                expert.address,
                name=ROUTER,
                max_bytes=self._config.links.max_message_bytes,
                timeout_s=self._config.router.request_timeout_s,
            )

        return open_link

    @ray.method(concurrency_group=CONTROL)
    def wait_until_death(self) -> None:
        threading.Event().wait()

    @ray.method(concurrency_group=TRAIN)
    def begin_run(self, optimizer: OptimizerConfig, balance: BalanceSettings) -> None:
        from actors.optim import OptimizerSettings

        values = asdict(optimizer)
        self._router.begin_run(OptimizerSettings(**{k: values[k] for k in OptimizerSettings().to_dict()}), balance)

    @ray.method(concurrency_group=TRAIN)
    def train_step(
        self, microbatches: Sequence[MicroBatch], lr: float, clip_norm: float, bias_speed: float
    ) -> StepReport:
        return self._router.train_step(_tensors(microbatches), lr=lr, clip_norm=clip_norm, bias_speed=bias_speed)

    @ray.method(concurrency_group=TRAIN)
    def move_group(self, group: int, source: str, target: str) -> None:
        """Between two steps: it takes its turn with them."""
        self._router.move_group(group, self._names.index(source), self._names.index(target))

    @ray.method(concurrency_group=TRAIN)
    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        return self._router.evaluate(_tensors(batches))

    @ray.method(concurrency_group=SERVE, num_returns="streaming")
    def generate(
        self, session: str, prompt: Sequence[int], sampling: Sampling, timeout_s: float
    ) -> Iterator[TokenEvent]:
        self._sessions.add(session)
        try:
            for event in self._router.generate(prompt, sampling, timeout_s=timeout_s):
                if session not in self._sessions:
                    return
                yield event
        finally:
            self._sessions.discard(session)

    @ray.method(concurrency_group=CONTROL)
    def end_session(self, session: str) -> None:
        """Its stream ends before the next token. A session that has ended is no error."""
        self._sessions.discard(session)

    @ray.method(concurrency_group=SERVE)
    def score(self, ids: Sequence[int]) -> tuple[list[float], int]:
        return self._router.score(ids)

    @ray.method(concurrency_group=SERVE)
    def embed(self, ids: Sequence[int]) -> tuple[list[float], int]:
        return self._router.embed(ids)

    @ray.method(concurrency_group=CONTROL)
    def vitals(self) -> dict[str, Any]:
        return self._router.vitals()

    @ray.method(concurrency_group=SERVE)
    def logits(self, ids: MicroBatch) -> Any:
        return self._router.logits(*_tensors([ids])).cpu()

    @ray.method(concurrency_group=CONTROL)
    def export(self, directory: str) -> list[str]:
        return self._router.export(Path(directory))

    @ray.method(concurrency_group=CONTROL)
    def check_same_architecture(self, directory: str) -> None:
        from cluster.fabric.model import check_same_architecture

        check_same_architecture(self._config, directory)

    @ray.method(concurrency_group=TRAIN)
    def replace_weights(self, path: str) -> None:
        self._router.replace_weights(path)


def _import_torch(threads: int) -> None:
    import torch
    import transformers.modeling_utils  # noqa: F401 - the slow part of it, now rather than in `load`

    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _tensors(batches: Sequence[MicroBatch]) -> list[Tensor]:
    import torch

    return [torch.tensor(batch) for batch in batches]
