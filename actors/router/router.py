"""A router actor's inside: a trunk, its links, training steps as transactions, and serving from the same weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.compress.settings import CompressionSettings
from actors.errors import InvalidInput, LinkError, MoeClusterError, NonFinite, PeerLost, StepAborted
from actors.expert.exchange import Attempt
from actors.moe.fp8 import Payload
from actors.moe.settings import BalanceSettings, GateSettings
from actors.optim import OptimizerSettings, square_sum
from actors.peer_snapshots import Keeper
from actors.router.accumulation import Accumulation
from actors.router.buckets import Buckets
from actors.router.commits import LastCommit
from actors.router.dispatcher import Dispatcher, Peer, Roster
from actors.router.division import Part
from actors.router.growing import Blueprint, Grower, GrownTrunk, check_growth, seen_by_gates
from actors.router.learner import Learner
from actors.router.likeness import facts_of
from actors.router.pieces import PIECE_BYTES
from actors.router.pinning import Pinning
from actors.router.replicas import Replicas, Tally
from actors.router.routing import Routing
from actors.router.serving import Serving
from actors.snapshots import SavedState, Snapshot, to_host
from actors.staleness import Spread
from actors.transport.contract import Link, Pending
from actors.transport.message import Message
from actors.trunk.checkpoint import CheckpointReader
from actors.trunk.export import export_model
from actors.trunk.model import ModelSource, connect
from actors.values import Course, Grown, Growth, Pinned, Placement, SnapshotTaken, StepReport

logger = logging.getLogger(__name__)

_TRIED_TOKENS = 2048
"""That the gates of a growth are tried with."""


class Router:
    """`train_step`, `adopt`, `grow`, `take_snapshot` and `restore` are called by one thread at a time; serving calls by
    any number of others.

    `find_roster` is asked when expert actors are gone, with their names: it gives the roster to go on with, or raises.

    `in_flight`: micro-batches of a step that are computed at once, 1 to 8; see `actors.router.flight`. Each holds its
    activations, so memory for these grows with it.

    It leads the routers that `join` it: they are `Replica`s, whose own `Router` is made without a roster and gets all
    that it is from the leader. Only the leader is asked to train, to change its placement or to save.
    """

    def __init__(
        self,
        source: ModelSource,
        roster: Roster | None,
        *,
        gate: GateSettings | None = None,
        device: str = "cpu",
        timeout_s: float = 30.0,
        max_step_retries: int = 3,
        max_sessions: int = 16,
        decode_batch: int = 0,
        captured: str = "auto",
        find_roster: Callable[[Sequence[str]], Roster] | None = None,
        piece_bytes: int = PIECE_BYTES,
        payload: Payload = "trunk",
        in_flight: int = 1,
        prompt_chunk: int | None = None,
    ) -> None:
        self.learner = Learner(source, gate or GateSettings(), device, piece_bytes)
        num_layers, num_experts = len(self.learner.skeleton.layers), self.learner.skeleton.num_experts
        if roster is not None and roster.placement.num_experts != num_experts:
            raise InvalidInput(
                f"the model has {num_experts} experts a layer", field="placement", value=roster.placement.num_experts
            )
        self._max_retries = max_step_retries
        self._timeout_s = timeout_s
        self._find_roster = find_roster
        self._training = Dispatcher(num_layers, num_experts, timeout_s=timeout_s, payload=payload)
        self._serving = Dispatcher(num_layers, num_experts, timeout_s=timeout_s, reroutes=True, payload=payload)
        self.accumulation = Accumulation(self.learner, self._training, in_flight)
        self._last_commit = LastCommit(self._training, self._reopen, timeout_s)
        self.version = self._run = 0
        self.serving = Serving(
            self.learner,
            self._serving,
            self._last_commit,
            lambda: self.version,
            max_sessions=max_sessions,
            decode_batch=decode_batch,
            capture=captured,
            prompt_chunk=prompt_chunk,
        )
        self.learner.on_new_model = self._connect
        self._connect()
        self._sample: Tensor | None = None
        """Tokens [B, S] of the last step."""
        self._attempt = 0
        self._blueprint: Blueprint | None = None
        """Of the growth that was asked for last."""
        self.snapshot: Snapshot[str] | None = None
        """The last one that was taken, until somebody takes it from here to write it."""
        self.for_peers: Snapshot[str] | None = None
        """The same, of one that is to be kept in memory: until it is on its way."""
        self.keeper = Keeper()
        self.replicas = Replicas(timeout_s, piece_bytes)
        self.replicas.on_experts_lost = self._training.close_links
        self.pinning = Pinning(self.learner, self._training, self.replicas, self.serving.pins, timeout_s)
        self._roster = Roster(Placement(0, (), 1), {})
        self._settled = True
        if roster is not None:
            self._training.connect(roster.peers)
            self.version, self._run = self._take_over()
            self._switch(roster)

    # -- training -----------------------------------------------------------------------------------------------------

    def begin_run(
        self,
        settings: OptimizerSettings,
        balance: BalanceSettings | None = None,
        compression: CompressionSettings | None = None,
    ) -> Course:
        """A new job: balance rules, optimizer settings and fresh moments, here and on every expert actor; and how the
        trunk's gradients travel between routers."""
        self.routing.begin_run(balance or BalanceSettings())
        self.learner.compress(compression or CompressionSettings())
        self._reach_all()
        self._run += 1
        fields = {"optimizer": settings.to_dict(), "run": self._run}
        self._training.ask_all("begin_run", fields)
        self.replicas.ask("begin_run", {**fields, **self._rules()})
        self.learner.begin_run(settings)
        return self.course

    def continue_run(self, balance: BalanceSettings, compression: CompressionSettings | None = None) -> Course:
        """A job that goes on from a checkpoint: its balance rules, and how gradients travel. Its optimizer settings and
        moments are here."""
        self.routing.begin_run(balance)
        self.learner.compress(compression or CompressionSettings())
        self.replicas.ask("continue_run", self._rules())
        return self.course

    def _rules(self) -> dict[str, Any]:
        """Of the job, as replicas are told."""
        return {"balance": asdict(self.routing.balance), "compression": asdict(self.learner.compression)}

    @property
    def routing(self) -> Routing:
        return self.learner.routing

    @property
    def course(self) -> Course:
        return Course(self._run, self.version)

    def train_step(
        self, microbatches: Sequence[Tensor], *, lr: float, clip_norm: float, bias_speed: float = 0.0
    ) -> StepReport:
        """One transaction over all micro-batches, each [B, S] token ids. `bias_speed`: gamma of S13 after this step.

        A fault before the commit aborts the attempt everywhere and the same batch runs again, `max_step_retries` times.
        Raises `NonFinite` (nothing was changed), or the last fault when the retries are used up.
        """
        for ids_BS in microbatches:
            self.serving.check_ids(ids_BS)
        if not microbatches:
            raise InvalidInput("no token to train on", field="microbatches", value=0)
        self._sample = microbatches[-1]
        started = time.monotonic()
        for retries in range(self._max_retries + 1):
            try:
                if retries:
                    self._recover()
                report = self._attempt_step(microbatches, lr, clip_norm, bias_speed, retries)
                return replace(report, seconds=time.monotonic() - started)
            except NonFinite as error:
                self._abort()
                raise NonFinite(
                    f"{error}; the step was dropped, weights are those of version {self.version}", step=self.version + 1
                ) from error
            except (LinkError, StepAborted) as error:
                logger.warning("step %d attempt %d aborted: %s", self.version + 1, self._attempt, error)
                self._abort()
                if retries == self._max_retries:
                    raise
        raise AssertionError("unreachable")

    def _attempt_step(
        self, microbatches: Sequence[Tensor], lr: float, clip_norm: float, bias_speed: float, retries: int
    ) -> StepReport:
        attempt = Attempt(self.version + 1, self._attempt)
        fields = {"step": attempt.step, "attempt": attempt.number, **self.learner.compression.for_copies()}
        num_tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in microbatches)
        self._training.load_LE.zero_()
        pieces = self.learner.pieces
        mine = self.replicas.start(attempt, microbatches, num_tokens, len(pieces))
        own = self.accumulation.run(attempt, mine, num_tokens, len(microbatches))
        total = self.replicas.collect(own, pieces, self._training.load_LE)
        if len(self.replicas):
            pieces.squeeze()
        else:
            pieces.forget()
        square = square_sum(self.learner.parameters())
        self._last_commit.confirm()
        told: list[Mapping[str, Any]] = []
        for phase in ("prepare", "reduce") if self._roster.placement.has_copies else ("prepare",):
            for answer in self._training.ask_all(phase, fields).values():
                told.append(answer.fields)
                part = answer.fields["square_sum"]
                square += math.nan if part is None else float(part)  # type: ignore[arg-type]
        norm = math.sqrt(square)
        if not math.isfinite(norm):
            raise NonFinite(f"gradient norm is {norm}", step=attempt.step)
        scale = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm > 0 else 1.0
        load_LE = self._training.load_LE
        report = StepReport(
            attempt.step, total.loss, norm, num_tokens, own.seconds, retries, load_LE.tolist(), total.balance
        )
        spread = Spread.of(told)
        report = replace(report, staleness_mean=spread.mean, staleness_max=spread.max, merged_updates=spread.merged)
        update = {"lr": lr, "scale": scale, "bias_speed": bias_speed}
        self.replicas.prepare(attempt, update, report, pieces, load_LE)
        self.commit(attempt, **update)
        return report

    def commit(self, attempt: Attempt, *, lr: float, scale: float, bias_speed: float) -> None:
        """Tells every actor and applies the trunk's part. Nobody waits: the queue of each link keeps the order.

        All are prepared, so the step counts from here on, even where the message is lost.
        Between steps serving sees either all of the old version or, through `min_version`, all of the new one.
        """
        with self.serving.pausing():
            started = self.apply(attempt, lr=lr, scale=scale, bias_speed=bias_speed)
        self.replicas.confirm(started)

    def apply(self, attempt: Attempt, *, lr: float, scale: float, bias_speed: float) -> Mapping[str, Pending | None]:
        """`commit` while serving waits already. -> what replicas were asked."""
        self._last_commit.send(attempt, lr=lr, scale=scale, term=self.replicas.term)
        started = self.replicas.start_commit(attempt)
        self.learner.update(lr, scale)
        self.routing.update_bias(self._training.load_LE, bias_speed)
        self.routing.open_further()
        self.version = attempt.step
        self._attempt = 0
        return started

    def _abort(self) -> None:
        self.learner.drop_gradients()
        self._last_commit.ask_again()  # its answers are forgotten with all others that are open
        self._training.tell_living("abort", {"step": self.version + 1, "attempt": self._attempt})
        self.replicas.abort(Attempt(self.version + 1, self._attempt))
        self._attempt += 1

    def _recover(self) -> None:
        """Before another attempt: every actor there, the last commit done, leftovers of the failed attempt dropped."""
        self._reach_all()
        self._training.ask_all("abort", {"step": self.version + 1, "attempt": self._attempt - 1})

    # -- placement ----------------------------------------------------------------------------------------------------

    def adopt(self, roster: Roster) -> float:
        """Another placement, with what links it needs, between two steps. An older one than that in use is ignored, as
        is one from before a growth.

        -> seconds that steps and requests waited. After an error the placement before is in use again.
        """
        now = self._roster.placement
        if roster.placement.epoch <= now.epoch or roster.placement.num_experts != now.num_experts:
            return 0.0
        self._last_commit.confirm_without(roster)
        # What arrives needs the last update of who leaves, so nobody leaves before the switch.
        leaving = {n: p for n, p in self._roster.peers.items() if n in self._training.links and n not in roster.peers}
        self._training.connect({**roster.peers, **leaving})
        started = time.monotonic()
        try:
            self._reopen()
            self._switch_all(roster)
        except MoeClusterError:
            with suppress(MoeClusterError):  # whoever needs it next tries again
                self._settle()
            raise
        waited = time.monotonic() - started
        self._training.connect(roster.peers)
        self._training.tell_living("retire", {})
        return waited

    def cut(self, names: Sequence[str]) -> None:
        """Every wait for these actors ends now, as if their connections had ended. From any thread."""
        self.replicas.cut(names)
        self.serving.pins.cut(names)
        for dispatcher in (self._training, self._serving):
            for name in names:
                if (link := dispatcher.links.get(name)) is not None:
                    link.cut()

    def _switch_all(self, roster: Roster) -> None:
        """Here and on every replica."""
        if not len(self.replicas):
            return self._switch(roster)
        with self.replicas.holding():
            self._switch(roster)
            self.replicas.ask("adopt", self._placing())
        return None

    def _switch(self, roster: Roster) -> None:
        """Serving waits meanwhile."""
        with self.serving.stopped():
            self._place(roster)

    @property
    def grown_to(self) -> int | None:
        """Experts of every layer, if they are not as many as the model's config says."""
        return self.learner.source.num_experts

    def _place(self, roster: Roster, births: Mapping[str, Any] | None = None) -> None:
        self._settled = False
        fields = {**roster.fields(), "version": self.version, "run": self._run, **(births or {})}
        # Births copy and draw as many weights as they make.
        timeout_s = 10 * self._timeout_s if births else self._timeout_s
        answers = self._training.ask_all("place", fields, timeout_s, among=list(roster.peers))
        self._use(roster, {name: _numbers(answer, "experts") for name, answer in answers.items()})
        self._settled = True

    def _use(self, roster: Roster, held: Mapping[str, list[int]]) -> None:
        self._serving.connect(roster.peers)
        for dispatcher in (self._training, self._serving):
            dispatcher.use(roster.placement.epoch, held, roster.placement.num_experts)
        self._last_commit.served(self.version)
        self._roster = roster

    def _settle(self) -> None:
        """After a switch that failed: some actors may have a newer placement than the one in use."""
        if not self._settled:
            self._reopen()
            self._switch_all(self._roster)

    def _reopen(self) -> None:
        if gone := self._training.reopen():
            raise PeerLost("the actor is gone", peer=gone[0])

    def _reach_all(self) -> None:
        """Every actor has an open link and the last commit. Those that are gone are left out by a new roster."""
        deadline = time.monotonic() + self._timeout_s
        while gone := self._training.reopen():
            # Right after a growth the coordinator may not have heard of it yet, and tell an earlier placement.
            if self._find_roster is None or time.monotonic() > deadline:
                raise PeerLost("the actor is gone", peer=gone[0])
            self.adopt(self._find_roster(gone))
        self._last_commit.confirm()
        self._settle()

    # -- growth: between two steps ------------------------------------------------------------------------------------

    def prepare_growth(self, growth: Growth) -> None:
        """What needs no weights, so that steps wait less for `grow`. From any thread. Errors as there."""
        placement = self._roster.placement
        check_growth(growth, placement.num_experts, placement.group_size)
        if self._blueprint is None or self._blueprint.skeleton.num_experts != growth.num_experts:
            self._blueprint = self.learner.blueprint(growth.num_experts)

    def grow(self, growth: Growth) -> Grown:
        """More experts from the next step on: on every actor and here, or after an error nowhere.

        `InvalidInput` if the model or its gate cannot have them.
        """
        started = time.monotonic()
        self.prepare_growth(growth)
        self._reopen()
        self._last_commit.confirm()
        self._settle()
        made = self._grown_trunk(growth)
        roster = Roster(made.births.placed(self._roster.placement), self._roster.peers)
        with self.replicas.holding():
            try:
                with self.serving.stopped():
                    self._place(roster, made.births.fields())
                    self.learner.grow(made)
            except MoeClusterError:
                with suppress(MoeClusterError):  # whoever needs it next tries again
                    self._settle()
                raise
            self._give_state(self.replicas.names)
        waited = time.monotonic() - started
        self._training.tell_living("retire", {})
        return Grown(roster.placement, self.learner.skeleton.num_parameters, made.way, made.moved_share, waited)

    def _grown_trunk(self, growth: Growth) -> GrownTrunk:
        assert self._blueprint is not None
        learner = self.learner
        ids_BS = self._tokens_to_try(growth.seed).to(learner.device)
        with self.serving.reading(ids_BS.shape[1]), torch.no_grad(), seen_by_gates(learner.view) as inputs_LTD:
            learner.view(input_ids=ids_BS, use_cache=False)
        placement = self._roster.placement
        grower = Grower(growth, self._blueprint, learner.skeleton, learner.trunk, learner.routing, placement)
        try:
            return grower.make(inputs_LTD, ids_BS.shape[1])
        finally:
            self._connect()  # the gates were tried without experts

    def _tokens_to_try(self, seed: int) -> Tensor:
        """[B, S]: of the last step, or random ones before the first."""
        if self._sample is not None:
            return self._sample[: max(1, _TRIED_TOKENS // self._sample.shape[1])]
        length = min(128, self.serving.max_positions)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.serving.vocab_size, (max(1, _TRIED_TOKENS // length), length), generator=generator)

    def _connect(self) -> None:
        """Trunk and view to the experts."""
        layers = range(len(self.learner.skeleton.layers))
        connect(self.learner.trunk, [self.routing.layer_function(i, self._training) for i in layers])
        connect(self.learner.view, [self.routing.layer_function(i, self._serving) for i in layers])

    # -- pins: between two steps --------------------------------------------------------------------------------------

    def pin(self, name: str, ttl_s: float = 0.0) -> Pinned:
        """The newest version stays available to requests under this name (empty: `v` and the version), and keeps its
        outputs, until `keep_pins` leaves it out. It replaces a pin of the same name. `InvalidInput` where expert actors
        cannot keep one. `ttl_s`: only noted, for whoever looks after the cluster; 0: for ever."""
        self._reach_all()
        return self.pinning.pin(name or f"v{self.version}", self.version, self._roster.peers, ttl_s)

    def keep_pins(self, names: Collection[str]) -> None:
        """These and no others. It may be repeated after an error."""
        self._reach_all()
        self.pinning.keep(names)

    # -- checkpoints: between two steps -------------------------------------------------------------------------------

    def take_snapshot(self, *, for_peers: bool = False) -> SnapshotTaken:
        """Copies of all state here and on every owner of a group, at one version; steps wait for the copying alone.

        Each is kept where it was made, until it is written or the next is taken. `for_peers`: as one that is kept in
        memory, beside the one for a checkpoint.
        """
        self._reach_all()
        if for_peers:  # its memory first
            self.for_peers = None
        else:
            self.snapshot = None
        fields = {"version": self.version, "run": self._run, "for_peers": for_peers}
        answers = self._training.ask_all("snapshot", fields)
        owned = {name: groups for name, answer in answers.items() if (groups := _numbers(answer, "groups"))}
        if sorted(group for groups in owned.values() for group in groups) != list(
            range(self._roster.placement.num_groups)
        ):
            raise StepAborted(f"not every expert group has one owner: {owned}")
        state = {**self.learner.state(), **self.learner.moments()}
        copies = {name: to_host(tensor) for name, tensor in state.items()}
        snapshot = Snapshot(self.version, self._run, 0, self.learner.settings, copies)
        if for_peers:
            self.for_peers = snapshot
        else:
            self.snapshot = snapshot
        return SnapshotTaken(self.version, self._run, tuple(owned), self._roster.placement.num_experts)

    def restore(self, roster: Roster, saved: SavedState[str], run: int) -> None:
        """Back to what was saved, under a placement whose actors have been restored to the same version.

        The number of experts may be another: that of before or after a growth. All that was on its way is given up.
        Serving waits for the switch. After an error it can be called again.
        """
        with self.replicas.holding():
            self._restore(roster, saved, run)
            self._give_state(self.replicas.names)

    def _restore(self, roster: Roster, saved: SavedState[str], run: int) -> None:
        found = dict(zip(saved.keys, saved.read(list(saved.keys)), strict=True))
        self.learner.drop_gradients()
        self.snapshot = None
        with self.serving.stopped():
            self._disconnect()
            self.learner.take(found, saved.optimizer, roster.placement.num_experts)
            self._attempt += 1
            self.version, self._run = saved.version, run
            self._training.connect(roster.peers)
            self._place(roster)

    def _disconnect(self) -> None:
        """Questions of before must not be answered now."""
        for dispatcher in (self._training, self._serving):
            dispatcher.connect({})
        self._last_commit.forget()

    # -- as the leader of others --------------------------------------------------------------------------------------

    def join(self, name: str, link: Link) -> None:
        """Another router, which has just been started, computes its part of every step from now on. Between two steps,
        which wait until it has taken the trunk over from here. `PeerLost` if it does not. `InvalidInput` if its config
        is another, by the first value that differs."""
        facts = facts_of(self.learner.source, self.learner.gate)
        link.call(Message("compare", {"term": self.replicas.term, "facts": facts}), self._timeout_s)
        self._reach_all()
        self.replicas.add(name, link)
        self._give_state([name])
        if name not in self.replicas.names:
            raise PeerLost("it did not take over the trunk", peer=name)
        self.pinning.give(name)

    def part(self, name: str) -> None:
        """A replica is ended on purpose; between two steps."""
        self.replicas.remove(name)

    def _give_state(self, names: Sequence[str]) -> None:
        if not names:
            return
        tensors = {name: to_host(tensor) for name, tensor in self.learner.state().items()} | self.learner.moments()
        ticket = {
            **self._placing(),
            **self._rules(),
            "version": self.version,
            "run": self._run,
            "num_experts": self.learner.skeleton.num_experts,
            "optimizer": self.learner.settings.to_dict(),
        }
        self.replicas.give_state(names, {name: tensor.contiguous() for name, tensor in tensors.items()}, ticket)

    def _placing(self) -> dict[str, Any]:
        """What a replica needs to use the placement as it is here."""
        roster = self._roster
        held = {name: self._training.held(name) for name in roster.peers}
        contacts = {name: dict(peer.contact) for name, peer in roster.peers.items()}
        size = roster.placement.group_size
        return {**roster.fields(), "group_size": size, "held": held, "contacts": contacts}

    # -- as a replica, and when one is promoted -----------------------------------------------------------------------

    def pausing(self) -> AbstractContextManager[None]:
        """Serving waits inside. To be entered and left in any thread."""
        return self.serving.pausing()

    def accumulate(
        self,
        attempt: Attempt,
        parts: Sequence[Part],
        num_tokens: int,
        num_microbatches: int,
        should_stop: Callable[[], bool],
        buckets: Buckets,
    ) -> Tally:
        """A replica's part of a step; its gradients and load stay here. `buckets` tells which pieces are complete."""
        self._reopen()
        self._attempt = attempt.number
        self._training.load_LE.zero_()
        tally = self.accumulation.run(
            attempt, parts, num_tokens, num_microbatches, should_stop=should_stop, watching=buckets.watching
        )
        buckets.close()
        self._last_commit.confirm()
        return tally

    def new_buckets(self) -> Buckets:
        return Buckets(self.learner.parameters(), self.learner.pieces)

    @property
    def load_LE(self) -> Tensor:
        """Pairs routed to each expert in the step at hand."""
        return self._training.load_LE

    @property
    def peers(self) -> Mapping[str, Peer]:
        """Of the placement in use."""
        return self._roster.peers

    @property
    def placement(self) -> Placement:
        return self._roster.placement

    def follow_run(
        self, run: int, settings: OptimizerSettings, balance: BalanceSettings, compression: CompressionSettings
    ) -> None:
        """A replica's `begin_run`."""
        self.routing.begin_run(balance)
        self.learner.compress(compression)
        self._run = run
        self.learner.begin_run(settings)

    def follow(self, roster: Roster, held: Mapping[str, list[int]]) -> None:
        """A replica's `adopt`: the expert actors have been told by the leader, and `held` is what they said. Serving
        waits already."""
        self._last_commit.seen_done()  # by the leader
        self._training.connect(roster.peers)
        self._use(roster, held)
        self._settled = True

    def take_state(
        self,
        tensors: Mapping[str, Tensor],
        version: int,
        run: int,
        settings: OptimizerSettings,
        balance: BalanceSettings,
        compression: CompressionSettings,
        num_experts: int,
    ) -> None:
        """All that the leader is, but for the placement; `follow` comes next. Serving waits already."""
        self.learner.drop_gradients()
        self._disconnect()
        self.learner.take(tensors, settings, num_experts)
        self.learner.compress(compression)
        self.routing.begin_run(balance)
        self.version, self._run = version, run

    def fence(self, term: int) -> dict[str, dict[str, Any]]:
        """Expert actors refuse every commit of an earlier term from now on. -> status of those that can be reached."""
        self.replicas.term = term
        self._last_commit.of_term(term)
        self._training.forget()
        self._last_commit.ask_again()
        self._training.reopen()
        found = {}
        for name in list(self._training.links):
            try:
                answers = self._training.ask_all("fence", {"term": term}, among=[name])
                found[name] = dict(answers[name].fields)
            except LinkError as error:  # dead at the same time: the next step finds out
                logger.warning("%s cannot be asked for its version: %s", name, error)
        return found

    def settle_anew(self, attempt: int) -> None:
        """After the router that led is gone: what it left half done, of the next step and of a placement, is undone
        everywhere. `attempt`: the last that anybody knows of."""
        self._attempt = attempt
        self._abort()
        self._settled = False
        try:
            self._last_commit.confirm()
            self._settle()
        except (LinkError, StepAborted) as error:
            logger.warning("the next step settles what could not be now: %s", error)

    # -- state --------------------------------------------------------------------------------------------------------

    @contextmanager
    def quiet(self) -> Iterator[Dispatcher]:
        """No update and no other serving forward inside: for exports, imports and status over the serving links."""
        with self.serving.reading():
            yield self._serving

    def status(self) -> list[dict[str, Any]]:
        """What each expert actor says of itself, in actor order, with the kind of its link."""
        with self.quiet() as dispatcher:
            answers = dispatcher.ask_all("status", {})
            return [{**answer.fields, "link": dispatcher.links[name].kind} for name, answer in answers.items()]

    def vitals(self) -> dict[str, Any]:
        """Cheap, without asking anybody: version, memory in bytes, link kind of each expert actor."""
        num_waiting, queue_s = self.serving.queue()
        return {
            "num_waiting": num_waiting,
            "queue_s": queue_s,
            "version": self.version,
            "run": self._run,
            "memory_bytes": self.learner.memory_bytes + self.keeper.num_bytes(),
            "pinned_bytes": self.serving.pins.num_bytes(),
            "pins": [model.pinned for model in self.serving.pins.all()],
            "links": {name: link.kind for name, link in list(self._training.links.items())},
            "left_out": self.replicas.lost,
        }

    def replace_weights(self, path: str) -> None:
        """Trunk and experts from another directory of the same architecture; optimizer moments start anew."""
        reader = CheckpointReader(path, self.learner.skeleton)
        with self.replicas.holding():
            self._replace_weights(path, reader)
            self._give_state(self.replicas.names)

    def _replace_weights(self, path: str, reader: CheckpointReader) -> None:
        with self.serving.stopped():
            self.serving.reach()
            self._run += 1
            self._serving.ask_all("load", {"path": path, "run": self._run}, timeout_s=10 * self._timeout_s)
            self.learner.load(path, reader)

    def export(self, directory: Path) -> list[str]:
        """Writes the whole model as a Hugging Face directory. Steps wait meanwhile. Returns the file names."""
        with self.quiet() as dispatcher:
            return export_model(
                directory,
                self.learner.trunk,
                self.learner.skeleton,
                dispatcher,
                self.routing.save,
                tokenizer_from=self.learner.source.path,
                timeout_s=10 * self._timeout_s,
            )

    def close(self) -> None:
        self._training.close()
        self.serving.close()
        self.replicas.close()

    def _take_over(self) -> tuple[int, int]:
        """-> version and run of the expert actors. A step that a router before left half done is dropped there."""
        answers: list[Any] = [answer.fields for answer in self._training.ask_all("status", {}).values()]
        found = {(int(fields["version"]), int(fields["run"])) for fields in answers}
        if len(found) != 1:
            raise MoeClusterError(f"expert actors are at different (version, run): {sorted(found)}")
        version, run = found.pop()
        attempt = max(int(fields["attempt"]) for fields in answers)
        self.replicas.term = max(int(fields["term"]) for fields in answers)
        self._training.ask_all("abort", {"step": version + 1, "attempt": attempt})
        self._training.ask_all("keep_pins", {"names": []})  # their trunks are gone
        self._attempt = attempt + 1
        return version, run


def _numbers(answer: Message, name: str) -> list[int]:
    return [int(n) for n in answer.fields[name]]  # type: ignore[union-attr]
