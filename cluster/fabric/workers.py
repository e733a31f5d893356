"""The Ray edge of the plain classes: an expert actor, a router actor. Nothing is decided here.

torch and transformers take seconds to import, so only the actors themselves do it, all at the same time: whoever starts
them imports this module without.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.moe.settings import BalanceSettings
from actors.values import Address, Course, Placement, Sampling, SnapshotTaken, StepReport, TokenEvent
from cluster.backend import Job
from cluster.config import ClusterConfig, OptimizerConfig
from cluster.control.coordinator import ModelFacts
from cluster.control.jobtable import job_of_dict
from cluster.control.orphans import Silence
from cluster.fabric.calls import call
from cluster.fabric.options import CONTROL, COORDINATOR, ROUTER, SERVE, TRAIN
from cluster.jobs.batches import MicroBatch

if TYPE_CHECKING:
    from torch import Tensor

    from actors.dispatcher import Roster
    from actors.transport.contract import Link
    from actors.transport.message import Message
    from actors.transport.socket import SocketServer
    from cluster.checkpoint.manifest import Shard
    from cluster.checkpoint.store import Draft, Found

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
MAX_REPORTS = 64
UNTOLD_S = 2.0
"""A step's report reaches those who watch its job within this time."""


@dataclass(frozen=True)
class ExpertContact:
    """How to reach an expert actor on the data plane."""

    name: str
    node_id: str
    pid: int
    address: Address
    """Where routers reach it."""
    exchange: Address
    """Where other expert actors reach it."""


@dataclass(frozen=True)
class ExpertStanding:
    """What an expert actor says of itself to a coordinator that is new to it."""

    contact: ExpertContact
    vitals: dict[str, Any]
    heard_s: float
    """When the coordinator asked the last time (Unix)."""


@dataclass(frozen=True)
class RouterStanding:
    """As of an expert actor, between two steps."""

    node_id: str
    pid: int
    placement: Placement
    """In use."""
    vitals: dict[str, Any]
    job: Job | None
    """The last one that began, or went on; as it was then."""
    course: Course
    """What its steps are counted from."""
    reports: tuple[tuple[float, StepReport], ...]
    """Of its last steps, with the time (Unix) of each: all that may not have been told any more."""
    heard_s: float
    """As of an expert actor."""


class Watch:
    """Lets one coordinator wait for the end of this process, the next one takes it over; without any it ends itself."""

    def __init__(self, config: ClusterConfig) -> None:
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.heard_s = time.time()
        self._silence = Silence(time.monotonic(), 2 * LOOK_EVERY_S)
        if config.ray.mode == "existing":  # an embedded cluster ends with its nodes
            threading.Thread(target=self._run, args=(config.ray.orphan_timeout_s,), name="watch", daemon=True).start()

    def vitals_asked(self) -> None:
        self.heard_s = time.time()
        self.pinged()

    def pinged(self) -> None:
        self._silence.heard()

    def wait(self) -> None:
        """Until somebody else waits. Each wait takes a thread of the actor, which has few."""
        with self._lock:
            self._over.set()
            over = self._over = threading.Event()
        over.wait()

    def _run(self, timeout_s: float) -> None:
        while (silent_s := self._silence.look(time.monotonic())) < timeout_s:
            time.sleep(LOOK_EVERY_S)
        logger.error("no coordinator has asked for %.0f s; this actor ends", silent_s)
        os._exit(1)


class ExpertWorker:
    """Holds an `ExpertHost` and serves its links from threads of their own; Ray calls only look after it."""

    def __init__(self, name: str, config: ClusterConfig) -> None:
        _import_torch(config.experts.threads)
        self._name, self._config = name, config
        self._watch = Watch(config)
        self._contact: ExpertContact | None = None
        self._bind_host = "127.0.0.1" if config.ray.mode == "embedded" else ray.util.get_node_ip_address()

    def node_id(self) -> str:
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def load(self, groups: Sequence[int]) -> ExpertContact:
        """Takes the weights of its groups and begins to serve. Without groups it is there for those that arrive."""
        from actors.expert import ExpertHost
        from cluster.fabric.model import model_source

        self._host = ExpertHost(
            self._name,
            model_source(self._config),
            groups,
            group_size=self._config.experts.group_size,
            device=self._config.experts.device,
            open_peer=self._open_peer,
            timeout_s=self._config.router.request_timeout_s,
        )
        self._server = self._serve(self._host.handle, self._host.idle)
        self._exchange = self._serve(self._host.exchange.handle)
        self._contact = ExpertContact(
            self._name, self.node_id(), os.getpid(), self._server.address, self._exchange.address
        )
        return self._contact

    def ping(self) -> None:
        """There is a coordinator."""
        self._watch.pinged()

    def standing(self) -> ExpertStanding | None:
        """None as long as it has not been loaded."""
        if self._contact is None:
            return None
        heard_s = self._watch.heard_s
        return ExpertStanding(self._contact, self.vitals(), heard_s)

    def _serve(self, handler: Any, idle: Callable[[], bool] = lambda: False) -> SocketServer:
        from actors.transport.socket import SocketServer

        server = SocketServer(
            self._name, handler, host=self._bind_host, max_bytes=self._config.links.max_message_bytes, idle=idle
        )
        server.start()
        return server

    def _open_peer(self, name: str, address: Address) -> Link:
        return _open_link(name, address, self._name, self._config)

    def arrive(self, group: int, owner: ExpertContact, timeout_s: float) -> int:
        """Brings a group here from its owner, which goes on meanwhile. -> bytes that came."""
        return self._host.arrive(group, owner.name, owner.exchange, self._exchange.address, timeout_s)

    def leave_off(self, groups: Sequence[int]) -> None:
        """Gives up groups that are on their way here."""
        for group in groups:
            self._host.leave_off(group)

    def write_snapshot(self, draft: Draft) -> Shard:
        """Beside steps. What was written is still in memory until `drop_snapshot`."""
        from cluster.checkpoint.state import write_experts

        return write_experts(draft, self._name, self._host.snapshot)

    def drop_snapshot(self) -> None:
        self._host.drop_snapshot()

    def restore(self, groups: Sequence[int], found: Found, run: int) -> None:
        """These groups as they were saved, and nothing else, from now on."""
        from cluster.checkpoint.state import read_experts

        self._host.restore(groups, read_experts(found), run)

    def cut(self, names: Sequence[str]) -> None:
        """Nothing is waited for from these actors any longer."""
        self._host.exchange.cut(names)

    def handle(self, question: Message) -> Message:
        """The data plane's question as a Ray call: what the links are measured against."""
        return self._host.handle("ray", question)

    def vitals(self) -> dict[str, Any]:
        self._watch.vitals_asked()
        return {**self._host.status(), "busy_s": self._server.busy_s}

    def wait_until_death(self) -> None:
        """Does not return: the caller's reference fails the moment this process is gone. Only when another coordinator
        waits here it ends."""
        self._watch.wait()


class RouterWorker:
    """Holds a `Router`. Training, serving and control calls run in concurrency groups of their own."""

    def __init__(self, config: ClusterConfig) -> None:
        _import_torch(config.router.threads)
        self._config = config
        self._sessions: set[str] = set()
        self._watch = Watch(config)
        self._is_loaded = False
        self._job: Job | None = None
        self._course = Course(0, 0)
        self._reports: deque[tuple[float, StepReport]] = deque(maxlen=MAX_REPORTS)

    @ray.method(concurrency_group=CONTROL)
    def facts(self) -> ModelFacts:
        """What there is to know of the model before anything is loaded."""
        from cluster.fabric.model import model_facts

        return model_facts(self._config)

    @ray.method(concurrency_group=CONTROL)
    def load(
        self, placement: Placement, experts: Sequence[ExpertContact], control: Any, found: Found | None, run: int
    ) -> tuple[str, int]:
        """Takes the trunk's weights, or the state of a checkpoint as this run, and opens links to the experts, who have
        theirs. Returns its node and process id.

        `control`: the coordinator, which is asked for another placement when expert actors are gone.
        """
        from actors.router import Router
        from cluster.fabric.model import model_source

        self._control = control
        self._node_id = ray.get_runtime_context().get_node_id()
        router = Router(
            model_source(self._config),
            self._roster(placement, experts),
            gate=self._config.model.gate,
            device=self._config.router.device,
            timeout_s=self._config.router.request_timeout_s,
            max_step_retries=self._config.router.max_step_retries,
            max_sessions=self._config.router.max_sessions,
            find_roster=self._find_roster,
        )
        if found is not None:
            from cluster.checkpoint.state import read_router

            router.restore(self._roster(placement, experts), read_router(found), run)
        self._router = router
        if found is not None:
            self._follow_saved(found)
        self._is_loaded = True
        return self._node_id, os.getpid()

    def _roster(self, placement: Placement, experts: Sequence[ExpertContact]) -> Roster:
        from actors.dispatcher import Peer, Roster

        def peer(expert: ExpertContact) -> Peer:
            return Peer(
                lambda: _open_link(expert.name, expert.address, ROUTER, self._config),
                expert.exchange,
                near=expert.node_id == self._node_id,
            )

        return Roster(placement, {expert.name: peer(expert) for expert in experts})

    def _find_roster(self, gone: Sequence[str]) -> Roster:
        ref = self._control.without.remote(list(gone))
        return self._roster(*call(COORDINATOR, ref, self._config.router.request_timeout_s))

    @ray.method(concurrency_group=CONTROL)
    def cut(self, names: Sequence[str]) -> None:
        """Nothing is waited for from these expert actors any longer."""
        self._router.cut(names)

    @ray.method(concurrency_group=TRAIN)
    def adopt(self, placement: Placement, experts: Sequence[ExpertContact]) -> float:
        """Another placement, between two steps: it takes its turn with them. -> seconds that they waited for it."""
        return self._router.adopt(self._roster(placement, experts))

    @ray.method(concurrency_group=CONTROL)
    def wait_until_death(self) -> None:
        """As of an expert actor."""
        self._watch.wait()

    @ray.method(concurrency_group=TRAIN)
    def standing(self) -> RouterStanding | None:
        """After the step at hand, and all else that the coordinator before had asked for. None: not loaded."""
        if not self._is_loaded:
            return None
        return RouterStanding(
            self._node_id,
            os.getpid(),
            self._router.placement,
            self._router.vitals(),
            self._job,
            self._course,
            tuple(self._reports),
            self._watch.heard_s,
        )

    @ray.method(concurrency_group=CONTROL)
    def ping(self) -> None:
        """Answers, whatever the step at hand takes."""
        self._watch.pinged()

    def _follow_saved(self, found: Found) -> None:
        values = found.manifest.job
        job = None if values is None else job_of_dict(values, found.url)
        self._follow(job, self._router.course, job.step if job else 0)

    def _follow(self, job: Job | None, course: Course, step: int) -> Course:
        """Whose steps come now: `course` is that after `step` of them."""
        self._job, self._course = job, replace(course, version=course.version - step)
        self._reports.clear()
        return course

    @ray.method(concurrency_group=TRAIN)
    def begin_run(self, optimizer: OptimizerConfig, balance: BalanceSettings, job: Job | None = None) -> Course:
        """`job`: whose run it is, for a coordinator that comes to know it from here."""
        from actors.optim import OptimizerSettings

        values = asdict(optimizer)
        settings = OptimizerSettings(**{k: values[k] for k in OptimizerSettings().to_dict()})
        return self._follow(job, self._router.begin_run(settings, balance), 0)

    @ray.method(concurrency_group=TRAIN)
    def continue_run(self, balance: BalanceSettings, job: Job) -> Course:
        """Of a job that goes on after the step that it has done."""
        return self._follow(job, self._router.continue_run(balance), job.step)

    @ray.method(concurrency_group=TRAIN)
    def take_snapshot(self) -> SnapshotTaken:
        return self._router.take_snapshot()

    @ray.method(concurrency_group=CONTROL)
    def write_snapshot(self, draft: Draft) -> Shard:
        """As of an expert actor."""
        from cluster.checkpoint.state import write_router

        return write_router(draft, ROUTER, self._router.snapshot)

    @ray.method(concurrency_group=CONTROL)
    def drop_snapshot(self) -> None:
        self._router.drop_snapshot()

    @ray.method(concurrency_group=TRAIN)
    def restore(self, placement: Placement, experts: Sequence[ExpertContact], found: Found, run: int) -> None:
        """After the expert actors of this placement."""
        from cluster.checkpoint.state import read_router

        self._router.restore(self._roster(placement, experts), read_router(found), run)
        self._follow_saved(found)

    @ray.method(concurrency_group=TRAIN)
    def train_step(
        self, microbatches: Sequence[MicroBatch], lr: float, clip_norm: float, bias_speed: float
    ) -> StepReport:
        report = self._router.train_step(_tensors(microbatches), lr=lr, clip_norm=clip_norm, bias_speed=bias_speed)
        self._remember(report)
        return report

    def _remember(self, report: StepReport) -> None:
        """A coordinator that dies may take the news of its last steps with it."""
        now = time.time()
        self._reports.append((now, report))
        while self._reports[0][0] < now - UNTOLD_S:
            self._reports.popleft()

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
        self._watch.vitals_asked()
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


def _open_link(peer: str, address: Address, name: str, config: ClusterConfig) -> Link:
    from actors.transport.socket import SocketLink

    return SocketLink(
        peer,
        address,
        name=name,
        max_bytes=config.links.max_message_bytes,
        timeout_s=config.router.request_timeout_s,
    )


def _tensors(batches: Sequence[MicroBatch]) -> list[Tensor]:
    import torch

    return [torch.tensor(batch) for batch in batches]
