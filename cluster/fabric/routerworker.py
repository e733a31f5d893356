"""The Ray edge of a router. Nothing is decided here."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.compress.settings import CompressionSettings
from actors.errors import StepAborted
from actors.moe.settings import BalanceSettings
from actors.values import (
    Address,
    Course,
    Grown,
    Growth,
    Pinned,
    Placement,
    Promotion,
    Sampling,
    SnapshotTaken,
    StepReport,
    TokenEvent,
    VersionChoice,
)
from cluster.backend import Job
from cluster.config import ClusterConfig, OptimizerConfig
from cluster.control.jobtable import job_of_dict
from cluster.control.model import ModelFacts
from cluster.fabric.calls import call
from cluster.fabric.contacts import ExpertContact, RouterContact
from cluster.fabric.measures import Measures
from cluster.fabric.options import CONTROL, COORDINATOR, FILES, ROUTER, SERVE, TRAIN
from cluster.fabric.sessions import Sessions
from cluster.fabric.standing import Following, RouterStanding, Watch
from cluster.fabric.workertools import (
    import_torch,
    import_transformers,
    of_version,
    open_link,
    payload_settings,
    way_of,
)
from cluster.jobs.batches import MicroBatch

if TYPE_CHECKING:
    from torch import Tensor

    from actors.router.replica import Replica
    from actors.router.roster import Peer, Relaying, Roster
    from actors.router.router import Router
    from actors.transport.contract import Link
    from actors.transport.curve import LinkKeys
    from actors.transport.message import Message
    from cluster.checkpoint.manifest import Shard
    from cluster.checkpoint.memory import Holder, KeptDraft, Told, Way
    from cluster.checkpoint.store import Draft, Found
MAX_REPORTS = 64
RELAYED_FROM_BYTES = 1 << 18
"""Of a layer's tokens that need not cross then, and as many of sums. With fewer the further hop takes longer than they
would, 0.3 to 0.5 ms: at 10 Gbit/s in the clear as well as with links.secure, where encryption takes the time."""
UNTOLD_S = 2.0
"""A step's report reaches those who watch its job within this time."""


class RouterWorker:
    """Holds a `Router`. Training, serving and control calls run in concurrency groups of their own."""

    def __init__(self, name: str, config: ClusterConfig) -> None:
        import_torch(config.router.threads)
        import_transformers()
        self._name, self._config = name, config
        self._measures = Measures(config.router.device)
        self._sessions = Sessions()
        self._watch = Watch(config)
        self._replica: Replica | None = None
        self._following = Following(None, Course(0, 0))
        self._reports: deque[tuple[float, StepReport]] = deque(maxlen=MAX_REPORTS)
        self._bind_host = "127.0.0.1" if config.ray.mode == "embedded" else ray.util.get_node_ip_address()
        self._node_id = ray.get_runtime_context().get_node_id()

    @ray.method(concurrency_group=CONTROL)
    def facts(self, num_experts: int) -> ModelFacts:
        """What there is to know of the model before anything is loaded; `num_experts` as for expert actors."""
        from cluster.fabric.model import model_facts

        return model_facts(self._config, num_experts)

    @ray.method(concurrency_group=CONTROL)
    def layout(self, num_experts: int) -> str | None:
        """What expert actors have to know of the model, as JSON; None if they have to see for themselves."""
        from actors.trunk.layout import layout_of
        from actors.trunk.model import skeleton
        from cluster.fabric.source import model_source

        layout = layout_of(skeleton(model_source(self._config, num_experts)))
        return None if layout is None else layout.to_json()

    @ray.method(concurrency_group=CONTROL)
    def load(
        self,
        placement: Placement,
        experts: Sequence[ExpertContact],
        control: Any,
        num_experts: int,
        found: Found | None,
        run: int,
        keys: LinkKeys | None,
    ) -> RouterContact:
        """Takes the trunk's weights, or the state of a checkpoint as this run, and opens links to the experts, who have
        theirs. It leads from then on.

        `control`: the coordinator, which is asked for another placement when expert actors are gone.
        `num_experts`, `keys`: as of an expert actor; a model that has grown is in a checkpoint.
        """
        self._control, self._keys = control, keys
        router = self._new_router(self._roster(placement, experts), num_experts)
        if found is not None:
            self._restore(router, placement, experts, found, run)
        return self._serve(router, leads=True)

    @ray.method(concurrency_group=CONTROL)
    def load_replica(self, control: Any, num_experts: int, keys: LinkKeys | None) -> RouterContact:
        """A trunk that gets what it is to be from the router that leads, once that one lets it `join`."""
        self._control, self._keys = control, keys
        return self._serve(self._new_router(None, num_experts), leads=False)

    def _new_router(self, roster: Roster | None, num_experts: int) -> Router:
        from actors.router.pieces import PIECE_BYTES
        from actors.router.router import Router
        from cluster.fabric.source import model_source

        return Router(
            model_source(self._config, num_experts),
            roster,
            gate=self._config.model.gate,
            device=self._config.router.device,
            timeout_s=self._config.router.request_timeout_s,
            max_step_retries=self._config.router.max_step_retries,
            max_sessions=self._config.router.max_sessions,
            decode_batch=self._config.router.decode_batch,
            captured=self._config.router.captured,
            prompt_chunk=self._config.router.prompt_chunk,
            find_roster=self._find_roster,
            piece_bytes=min(PIECE_BYTES, self._config.links.max_message_bytes // 2),
            payload=self._config.links.dispatch,
            in_flight=self._config.router.in_flight,
        )

    def _serve(self, router: Router, *, leads: bool) -> RouterContact:
        from actors.peer_snapshots import OPS as KEEPING
        from actors.router.replica import Replica
        from actors.transport.socket import SocketServer

        self._router = router
        replica = Replica(self._name, router, self._find_peer, leads=leads)

        def answer(peer: str, question: Message) -> Message:
            """It keeps snapshots of others, too, where there is no other node for them."""
            return (router.keeper if question.op in KEEPING else replica).handle(peer, question)

        self._server = SocketServer(
            self._name,
            answer,
            host=self._bind_host,
            max_bytes=self._config.links.max_message_bytes,
            keys=self._keys,
            payload=payload_settings(self._config),
        )
        self._server.start()
        self._contact = RouterContact(self._name, self._node_id, os.getpid(), self._server.address)
        self._replica = replica
        return self._contact

    @ray.method(concurrency_group=TRAIN)
    def join(self, replica: RouterContact) -> None:
        """Between two steps, which wait until it has the trunk."""
        self._router.join(replica.name, self._open_replica(replica))

    @ray.method(concurrency_group=TRAIN)
    def part(self, name: str) -> None:
        """A replica that is to be ended."""
        self._router.part(name)

    @ray.method(concurrency_group=TRAIN)
    def promote(self, others: Sequence[RouterContact], term: int) -> Promotion:
        """The router that led is dead: this one does from now on."""
        assert self._replica is not None  # only those that were loaded are asked
        openers = {other.name: (lambda other=other: self._open_replica(other)) for other in others}
        promotion = self._replica.promote(openers, term)
        self._reports.clear()
        if promotion.report is not None:
            self._remember(promotion.report)
        return promotion

    def _open_replica(self, replica: RouterContact) -> Link:
        link = open_link(replica.name, replica.address, self._name, self._config, self._keys)
        return self._measures.opened(link)

    def _find_peer(self, name: str, contact: Mapping[str, Any]) -> Peer:
        addresses = {key: Address(**contact[key]) for key in ("address", "exchange", "relay") if contact[key]}
        return self._peer(ExpertContact(name, str(contact["node_id"]), int(contact["pid"]), **addresses))

    def _peer(self, expert: ExpertContact) -> Peer:
        from actors.router.roster import Peer

        return Peer(
            lambda: self._open_expert(expert, expert.address),
            expert.exchange,
            near=expert.node_id == self._node_id,
            contact=asdict(expert),
            relaying=self._relaying(expert),
        )

    def _relaying(self, expert: ExpertContact) -> Relaying | None:
        from actors.router.roster import Relaying
        from actors.transport.socket.zeromq import host_id

        relay, mode = expert.relay, self._config.links.relay
        if relay is None or (mode == "auto" and relay.host_id == host_id()):
            return None
        return Relaying(
            f"{expert.node_id} of {expert.address.host_id}",
            expert.address,
            lambda: self._open_expert(expert, relay),
            0 if mode == "on" else RELAYED_FROM_BYTES,
        )

    def _open_expert(self, expert: ExpertContact, address: Address) -> Link:
        device = self._config.router.device
        link = open_link(expert.name, address, self._name, self._config, self._keys, device)
        return self._measures.opened(link)

    def _roster(self, placement: Placement, experts: Sequence[ExpertContact]) -> Roster:
        from actors.router.roster import Roster

        return Roster(placement, {expert.name: self._peer(expert) for expert in experts})

    def _find_roster(self, gone: Sequence[str]) -> Roster:
        ref = self._control.without.remote(list(gone), self._router.placement)
        return self._roster(*call(COORDINATOR, ref, self._config.router.request_timeout_s))

    @ray.method(concurrency_group=CONTROL)
    def cut(self, names: Sequence[str]) -> None:
        """Nothing is waited for from these actors any longer, expert actors or routers."""
        self._router.cut(names)

    @ray.method(concurrency_group=TRAIN)
    def adopt(self, placement: Placement, experts: Sequence[ExpertContact]) -> tuple[Placement, float]:
        """Another placement, between two steps: it takes its turn with them. -> that in use then, which is another if a
        newer one was; seconds that they waited for it."""
        waited_s = self._router.placing.adopt(self._roster(placement, experts))
        return self._router.placement, waited_s

    @ray.method(concurrency_group=TRAIN)
    def in_use(self) -> Placement:
        """The placement, between two steps."""
        return self._router.placement

    @ray.method(concurrency_group=CONTROL)
    def prepare_growth(self, growth: Growth) -> None:
        """`InvalidInput` if the model cannot grow so."""
        self._router.prepare_growth(growth)

    @ray.method(concurrency_group=TRAIN)
    def grow(self, growth: Growth) -> Grown:
        """Between two steps: it takes its turn with them."""
        return self._router.grow(growth)

    @ray.method(concurrency_group=TRAIN)
    def pin(self, name: str, ttl_s: float) -> Pinned:
        """Between two steps: it takes its turn with them."""
        return self._router.pin(name, ttl_s)

    @ray.method(concurrency_group=TRAIN)
    def keep_pins(self, names: Sequence[str]) -> None:
        """These and no others, here and at all actors that this router leads."""
        self._router.keep_pins(names)

    @ray.method(concurrency_group=CONTROL)
    def forget_pin(self, name: str, created_s: float) -> None:
        """At once, on this router alone: what requests ask for is gone."""
        self._router.serving.pins.forget(name, created_s)

    @ray.method(concurrency_group=CONTROL)
    def wait_until_death(self) -> None:
        """As of an expert actor."""
        self._watch.wait()

    @ray.method(concurrency_group=TRAIN)
    def standing(self) -> RouterStanding | None:
        """After the step at hand, and all else that the coordinator before had asked for. None: it has no trunk yet."""
        if self._replica is None or not self._replica.has_joined:
            return None
        return RouterStanding(
            self._contact,
            self._replica.leads,
            self._replica.term,
            tuple(self._router.replicas.names) if self._replica.leads else (),
            self._router.placement,
            self._router.vitals(),
            self._following,
            tuple(self._reports),
            self._watch.heard_s,
        )

    @ray.method(concurrency_group=CONTROL)
    def ping(self) -> None:
        """Answers, whatever the step at hand takes."""
        self._watch.pinged()

    @ray.method(concurrency_group=CONTROL)
    def link_keys(self) -> LinkKeys | None:
        """As it was given them: for a coordinator that is new to it."""
        return self._keys

    @ray.method(concurrency_group=CONTROL)
    def following(self) -> Following:
        return self._following

    @ray.method(concurrency_group=CONTROL)
    def follow(self, following: Following) -> None:
        """Whose steps the router that leads does from now on, for the case that this one is to lead. News of an earlier
        run are late."""
        if following.course.run >= self._following.course.run:
            self._following = following

    def _follow_saved(self, found: Found, course: Course) -> None:
        values = found.manifest.job
        job = None if values is None else job_of_dict(values, found.url)
        self._follow(job, course, job.step if job else 0)

    def _follow(self, job: Job | None, course: Course, step: int) -> Course:
        """Whose steps come now: `course` is that after `step` of them."""
        self._following = Following(job, replace(course, version=course.version - step))
        self._reports.clear()
        return course

    @ray.method(concurrency_group=TRAIN)
    def begin_run(
        self,
        optimizer: OptimizerConfig,
        balance: BalanceSettings,
        compression: CompressionSettings,
        job: Job | None = None,
    ) -> Course:
        """`job`: whose run it is, for a coordinator that comes to know it from here."""
        from actors.optim import OptimizerSettings

        values = asdict(optimizer)
        settings = OptimizerSettings(**{k: values[k] for k in OptimizerSettings().to_dict()})
        return self._follow(job, self._router.begin_run(settings, balance, compression), 0)

    @ray.method(concurrency_group=TRAIN)
    def continue_run(self, balance: BalanceSettings, compression: CompressionSettings, job: Job) -> Course:
        """Of a job that goes on after the step that it has done."""
        return self._follow(job, self._router.continue_run(balance, compression), job.step)

    @ray.method(concurrency_group=TRAIN)
    def take_snapshot(self, for_peers: bool = False) -> SnapshotTaken:
        return self._router.take_snapshot(for_peers=for_peers)

    @ray.method(concurrency_group=FILES)
    def keep_snapshot(self, draft: KeptDraft, peer: Holder | None) -> Shard:
        """As of an expert actor."""
        from cluster.checkpoint.memory import keep_part
        from cluster.checkpoint.state import router_shard

        snapshot, self._router.saving.for_peers = self._router.saving.for_peers, None
        content = router_shard(of_version(snapshot, draft))
        return keep_part(draft, ROUTER, content, self._router.keeper, peer, self._way())

    @ray.method(concurrency_group=CONTROL)
    def drop_kept(self, snapshots: Sequence[str]) -> None:
        self._router.keeper.drop(snapshots)

    @ray.method(concurrency_group=CONTROL)
    def remember_kept(self, told: Told) -> None:
        """The last complete one, for the next coordinator."""
        from cluster.checkpoint.memory import later

        self._router.keeper.complete = later(self._router.keeper.complete, told)

    @ray.method(concurrency_group=CONTROL)
    def last_kept(self) -> Told | None:
        told: Told | None = self._router.keeper.complete
        return told

    def _way(self) -> Way:
        return way_of(lambda name, at: open_link(name, at, self._name, self._config, self._keys), self._config)

    @ray.method(concurrency_group=FILES)
    def write_snapshot(self, draft: Draft) -> Shard:
        """As of an expert actor."""
        from actors.snapshots import taken_over
        from cluster.checkpoint.state import write_router

        return write_router(draft, ROUTER, taken_over(self._router.saving, draft.version))

    @ray.method(concurrency_group=TRAIN)
    def restore(self, placement: Placement, experts: Sequence[ExpertContact], found: Found, run: int) -> None:
        """After the expert actors of this placement."""
        self._restore(self._router, placement, experts, found, run)

    def _restore(
        self, router: Router, placement: Placement, experts: Sequence[ExpertContact], found: Found, run: int
    ) -> None:
        from cluster.checkpoint.memory import saved_router

        with saved_router(found, router.keeper, self._way()) as saved:
            router.restore(self._roster(placement, experts), saved, run)
        self._follow_saved(found, router.course)

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
        return self._router.serving.evaluate(_tensors(batches))

    @ray.method(concurrency_group=SERVE, num_returns="streaming")
    def generate(
        self, session: str, prompt: Sequence[int], sampling: Sampling, choice: VersionChoice, timeout_s: float
    ) -> Iterator[TokenEvent]:
        if not self._sessions.begin(session):
            return
        is_wanted = partial(self._sessions.is_wanted, session)
        events = self._router.serving.generate(
            prompt, sampling, timeout_s=timeout_s, choice=choice, is_wanted=is_wanted
        )
        try:
            for event in events:
                if not is_wanted():
                    return
                yield event
        except StepAborted:  # of a session that was ended in the middle of its prompt, nobody is to be told
            if is_wanted():
                raise
        finally:
            self._sessions.leave(session)

    @ray.method(concurrency_group=CONTROL)
    def end_session(self, session: str) -> None:
        """Its stream ends before the next token or chunk of its prompt, or never begins. A session that has ended is no
        error."""
        self._sessions.end(session)

    @ray.method(concurrency_group=SERVE)
    def score(self, ids: Sequence[int], choice: VersionChoice) -> tuple[list[float], int]:
        return self._router.serving.score(ids, choice)

    @ray.method(concurrency_group=SERVE)
    def embed(self, ids: Sequence[int], choice: VersionChoice) -> tuple[list[float], int]:
        return self._router.serving.embed(ids, choice)

    @ray.method(concurrency_group=CONTROL)
    def vitals(self) -> dict[str, Any]:
        self._watch.vitals_asked()
        return {**self._router.vitals(), **self._measures.told()}

    @ray.method(concurrency_group=SERVE)
    def logits(self, ids: MicroBatch) -> Any:
        return self._router.serving.logits(_tensors([ids])[0]).cpu()

    @ray.method(concurrency_group=FILES)
    def export(self, directory: str) -> list[str]:
        return self._router.export(Path(directory))

    @ray.method(concurrency_group=FILES)
    def check_same_architecture(self, directory: str) -> None:
        from cluster.fabric.model import check_same_architecture

        check_same_architecture(self._config, directory, self._router.grown_to or 0)

    @ray.method(concurrency_group=TRAIN)
    def replace_weights(self, path: str) -> None:
        self._router.replace_weights(path)

    @ray.method(concurrency_group=TRAIN)
    def is_between_models(self) -> bool:
        """After `replace_weights`, if it is under way: whether weights have been replaced in part, and requests wait
        for the rest."""
        return self._router.serving.is_shut


def _tensors(batches: Sequence[MicroBatch]) -> list[Tensor]:
    import torch

    return [torch.tensor(batch) for batch in batches]
