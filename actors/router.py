"""A router actor's inside: a trunk, its links, training steps as transactions, and serving from the same weights."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.buckets import Buckets
from actors.compress.pieces import pieces_of
from actors.compress.settings import CompressionSettings
from actors.dispatcher import Dispatcher, Purpose, Roster
from actors.division import Part
from actors.engine import DecodeEngine
from actors.errors import InvalidInput, LinkError, MoeClusterError, NonFinite, PeerLost, StepAborted
from actors.exchange import Attempt
from actors.growing import Blueprint, Grower, GrownTrunk, base_settings, blank_trunk, check_growth, seen_by_gates
from actors.moe.gating import GatePast
from actors.moe.settings import BalanceSettings, GateSettings
from actors.optim import OptimizerSettings, adamw, scale_gradients, set_lr, square_sum
from actors.pieces import PIECE_BYTES
from actors.replicas import Replicas, Tally
from actors.routing import Opening, Routing
from actors.snapshots import SavedState, Snapshot, copy_all, moments, set_moments, to_host
from actors.transport.contract import Link, Pending
from actors.transport.message import Message
from actors.trunk.checkpoint import CheckpointReader
from actors.trunk.export import export_model
from actors.trunk.load import load_trunk, load_weights
from actors.trunk.model import ModelSource, connect, second_view, skeleton
from actors.values import Course, Grown, Growth, Placement, Sampling, SnapshotTaken, StepReport, TokenEvent
from actors.versions import VersionGate

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer."
"""Prefix of the moments' names in a snapshot."""
_ROUTING = "routing."
_TRIED_TOKENS = 2048
"""That the gates of a growth are tried with."""


def token_losses(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Cross entropy of every predicted token, summed; in float32 or wider."""
    logits = logits_BSV[:, :-1].flatten(0, 1)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    return F.cross_entropy(logits, ids_BS[:, 1:].flatten(), reduction="sum")


class Router:
    """`train_step`, `adopt`, `grow`, `take_snapshot` and `restore` are called by one thread at a time; serving calls by
    any number of others.

    `find_roster` is asked when expert actors are gone, with their names: it gives the roster to go on with, or raises.

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
        find_roster: Callable[[Sequence[str]], Roster] | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._skeleton = skeleton(source)
        self._source = source
        self._max_retries = max_step_retries
        self._timeout_s = timeout_s
        self._find_roster = find_roster
        num_layers, num_experts = len(self._skeleton.layers), self._skeleton.num_experts
        if roster is not None and roster.placement.num_experts != num_experts:
            raise InvalidInput(
                f"the model has {num_experts} experts a layer", field="placement", value=roster.placement.num_experts
            )
        self._training = Dispatcher(num_layers, num_experts, timeout_s=timeout_s)
        self._serving = Dispatcher(num_layers, num_experts, timeout_s=timeout_s, reroutes=True)
        self.trunk = load_trunk(source, self._skeleton, device)
        self._view = second_view(source, self.trunk)
        settings = base_settings(source, gate or GateSettings(), num_experts)
        self.routing = Routing(self.trunk, self._skeleton, settings, source.seed)
        if source.path is not None and source.num_experts is None:
            self.routing.load(Path(source.path))
        self._connect()
        self._sample: Tensor | None = None
        """Tokens [B, S] of the last step."""
        self._attempt = 0
        self._unconfirmed: list[Pending | None] = []
        self._commit_fields: dict[str, Any] = {}
        self._served_version = 0
        """The newest version that every expert actor has confirmed over the serving links."""
        self._gate = VersionGate()
        self._serving_lock = threading.Lock()
        self._settings = OptimizerSettings()
        self._optimizer = self._new_optimizer()
        self._memory_bytes = self._measure()
        """With gradients and moments once there was a step."""
        self._blueprint: Blueprint | None = None
        """Of the growth that was asked for last."""
        self.snapshot: Snapshot[str] | None = None
        """The last one that was taken, until `drop_snapshot`."""
        self.replicas = Replicas(timeout_s, piece_bytes)
        self.replicas.on_experts_lost = self._training.close_links
        self._piece_bytes = piece_bytes
        self.compress(CompressionSettings())
        self.version = self._run = 0
        self._roster = Roster(Placement(0, (), 1), {})
        self._settled = True
        if roster is not None:
            self._training.connect(roster.peers)
            self.version, self._run = self._take_over()
            self._switch(roster)
        text = self._skeleton.config.get_text_config()
        self.vocab_size = int(text.vocab_size)
        self.max_positions = int(getattr(text, "max_position_embeddings", 1 << 20))
        self._engine = DecodeEngine(
            self._view,
            self._version_guard,
            lambda: self.routing.new_pasts(),
            max_sessions=max_sessions,
            max_positions=self.max_positions,
            end_ids=_end_ids(self._skeleton.config),
        )

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
        self.compress(compression or CompressionSettings())
        self._settings = settings
        self._reach_all()
        self._run += 1
        fields = {"optimizer": settings.to_dict(), "run": self._run}
        self._training.ask_all("begin_run", fields)
        self.replicas.ask("begin_run", {**fields, **self._rules()})
        self._optimizer = self._new_optimizer()
        return self.course

    def continue_run(self, balance: BalanceSettings, compression: CompressionSettings | None = None) -> Course:
        """A job that goes on from a checkpoint: its balance rules, and how gradients travel. Its optimizer settings and
        moments are here."""
        self.routing.begin_run(balance)
        self.compress(compression or CompressionSettings())
        self.replicas.ask("continue_run", self._rules())
        return self.course

    def compress(self, settings: CompressionSettings) -> None:
        """Gradients travel so from now on; errors of before are forgotten. `InvalidInput` where the trunk's dtype
        cannot be compressed."""
        self.pieces = pieces_of(self._parameters(), settings, self._piece_bytes)
        self.compression = settings

    def _rules(self) -> dict[str, Any]:
        """Of the job, as replicas are told."""
        return {"balance": asdict(self.routing.balance), "compression": asdict(self.compression)}

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
            self._check_ids(ids_BS)
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
        fields = {"step": attempt.step, "attempt": attempt.number}
        num_tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in microbatches)
        self._training.load_LE.zero_()
        mine = self.replicas.start(attempt, microbatches, num_tokens, len(self.pieces))
        own = self._accumulate(attempt.step, mine, num_tokens, len(microbatches))
        total = self.replicas.collect(own, self.pieces, self._training.load_LE)
        if len(self.replicas):
            self.pieces.squeeze()
        else:
            self.pieces.forget()
        square = square_sum(self._parameters())
        self._confirm_commit()
        for phase in ("prepare", "reduce") if self._roster.placement.has_copies else ("prepare",):
            for answer in self._training.ask_all(phase, fields).values():
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
        update = {"lr": lr, "scale": scale, "bias_speed": bias_speed}
        self.replicas.prepare(attempt, update, report, self.pieces, load_LE)
        self.commit(attempt, **update)
        return report

    def _accumulate(
        self,
        step: int,
        parts: Sequence[Part],
        num_tokens: int,
        num_microbatches: int,
        should_stop: Callable[[], bool] = lambda: False,
        last_backward: AbstractContextManager[None] | None = None,
    ) -> Tally:
        """Forward and backward of parts of a batch, whose losses are normalised by the `num_tokens` of all of it."""
        started = time.monotonic()
        device = self.trunk.get_input_embeddings().weight.device
        total = total_balance = 0.0
        own_tokens = 0
        for part in parts:
            if should_stop():
                raise StepAborted("the step was given up")
            ids_BS = part.ids_BS.to(device)
            self._training.begin(
                Purpose(step, self._attempt, part.number, min_version=step - 1, sequence_length=ids_BS.shape[1])
            )
            loss = token_losses(self.trunk(input_ids=ids_BS, use_cache=False).logits, ids_BS) / num_tokens
            total += loss.item()
            if (balance := self.routing.take_loss()) is not None:
                balance = balance * part.share / num_microbatches
                total_balance += balance.item()
                loss = loss + balance
            if not math.isfinite(total + total_balance):
                raise NonFinite(f"loss is {total + total_balance}", step=step)
            with last_backward if last_backward and part is parts[-1] else nullcontext():
                loss.backward()
            own_tokens += ids_BS.shape[0] * (ids_BS.shape[1] - 1)
        return Tally(total, total_balance, own_tokens, time.monotonic() - started)

    def commit(self, attempt: Attempt, *, lr: float, scale: float, bias_speed: float) -> None:
        """Tells every actor and applies the trunk's part. Nobody waits: the queue of each link keeps the order.

        All are prepared, so the step counts from here on, even where the message is lost: `_confirm_commit` repeats it.
        Between steps serving sees either all of the old version or, through `min_version`, all of the new one.
        """
        with self.pausing():
            started = self.apply(attempt, lr=lr, scale=scale, bias_speed=bias_speed)
        self.replicas.confirm(started)

    def apply(self, attempt: Attempt, *, lr: float, scale: float, bias_speed: float) -> Mapping[str, Pending | None]:
        """`commit` while serving waits already. -> what replicas were asked."""
        self._commit_fields = {
            "step": attempt.step,
            "attempt": attempt.number,
            "lr": lr,
            "scale": scale,
            "term": self.replicas.term,
        }
        self._unconfirmed = self._training.start_each("commit", self._commit_fields)
        started = self.replicas.start_commit(attempt)
        scale_gradients(self._parameters(), scale)
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self.pieces.keep()
        self._memory_bytes = self._measure()
        self._optimizer.zero_grad(set_to_none=True)
        self.routing.update_bias(self._training.load_LE, bias_speed)
        self.routing.open_further()
        self.version = attempt.step
        self._attempt = 0
        return started

    def _confirm_commit(self) -> None:
        """Reads the answers to the last commit. If one is missing all are asked again: who has done it just says so."""
        answered = all(self._is_confirmed(pending) for pending in self._unconfirmed)
        if not answered:
            self._unconfirmed = [None]  # each answer comes once: whoever calls next must not wait for it
            self._reopen()
            self._training.ask_all("commit", self._commit_fields)
        self._unconfirmed = []

    def _confirm_without(self, staying: Roster) -> None:
        """The same, but for actors that are gone and not to stay. A link may tell only now that its peer has died."""
        while True:
            self._training.drop_closed(but=staying.peers)
            num_links = len(self._training.links)
            try:
                return self._confirm_commit()
            except PeerLost:
                self._training.drop_closed(but=staying.peers)
                if len(self._training.links) == num_links:
                    raise

    def _is_confirmed(self, pending: Pending | None) -> bool:
        if pending is None:
            return False
        try:
            pending.result(self._timeout_s)
        except LinkError as error:
            if isinstance(error, PeerLost):
                pending.link.close()
            logger.warning("commit of step %d is not confirmed: %s", self.version, error)
            return False
        return True

    def _abort(self) -> None:
        self.drop_gradients()
        if self._unconfirmed:
            self._unconfirmed = [None]  # the answers are forgotten with all others that are open: it is asked again
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
        self._confirm_without(roster)
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
        with self._serving_lock, self._gate.writing():
            self._place(roster)

    @property
    def grown_to(self) -> int | None:
        """Experts of every layer, if they are not as many as the model's config says."""
        return self._source.num_experts

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
        self._served_version = self.version
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
        self._confirm_commit()
        self._settle()

    # -- growth: between two steps ------------------------------------------------------------------------------------

    def prepare_growth(self, growth: Growth) -> None:
        """What needs no weights, so that steps wait less for `grow`. From any thread. Errors as there."""
        placement = self._roster.placement
        check_growth(growth, placement.num_experts, placement.group_size)
        if self._blueprint is None or self._blueprint.skeleton.num_experts != growth.num_experts:
            self._blueprint = Blueprint.of(
                self._source, self.routing.settings, self._skeleton.num_experts, growth.num_experts
            )

    def grow(self, growth: Growth) -> Grown:
        """More experts from the next step on: on every actor and here, or after an error nowhere.

        `InvalidInput` if the model or its gate cannot have them.
        """
        started = time.monotonic()
        self.prepare_growth(growth)
        self._reopen()
        self._confirm_commit()
        self._settle()
        made = self._grown_trunk(growth)
        roster = Roster(made.births.placed(self._roster.placement), self._roster.peers)
        with self.replicas.holding():
            try:
                with self._serving_lock, self._gate.writing():
                    self._place(roster, made.births.fields())
                    self._take(made)
            except MoeClusterError:
                with suppress(MoeClusterError):  # whoever needs it next tries again
                    self._settle()
                raise
            self._give_state(self.replicas.names)
        waited = time.monotonic() - started
        self._training.tell_living("retire", {})
        num_parameters = self._skeleton.num_parameters
        return Grown(roster.placement, num_parameters, made.way, made.moved_share, waited)

    def _grown_trunk(self, growth: Growth) -> GrownTrunk:
        assert self._blueprint is not None
        ids_BS = self._tokens_to_try(growth.seed).to(self._device)
        with self._version_guard(ids_BS.shape[1]), torch.no_grad(), seen_by_gates(self._view) as inputs_LTD:
            self._view(input_ids=ids_BS, use_cache=False)
        placement = self._roster.placement
        grower = Grower(growth, self._blueprint, self._skeleton, self.trunk, self.routing, placement)
        try:
            return grower.make(inputs_LTD, ids_BS.shape[1])
        finally:
            self._connect()  # the gates were tried without experts

    def _tokens_to_try(self, seed: int) -> Tensor:
        """[B, S]: of the last step, or random ones before the first."""
        if self._sample is not None:
            return self._sample[: max(1, _TRIED_TOKENS // self._sample.shape[1])]
        length = min(128, self.max_positions)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.vocab_size, (max(1, _TRIED_TOKENS // length), length), generator=generator)

    def _take(self, made: GrownTrunk) -> None:
        states = {name: self._optimizer.state.get(parameter) for name, parameter in self._trained()}
        self._put_on(made.blueprint, made.trunk, made.view, made.routing)
        self._optimizer = self._new_optimizer()
        for name, parameter in self._trained():
            if state := states[name]:
                self._optimizer.state[parameter] = {
                    kind: made.moment(name, tensor) if tensor.ndim else tensor for kind, tensor in state.items()
                }
        self._memory_bytes = self._measure()

    def _put_on(self, blueprint: Blueprint, trunk: PreTrainedModel, view: PreTrainedModel, routing: Routing) -> None:
        self._source, self._skeleton = blueprint.source, blueprint.skeleton
        self.trunk, self._view, self.routing = trunk, view, routing
        self._connect()
        self._engine.use(view)
        self.compress(self.compression)

    def _connect(self) -> None:
        layers = range(len(self._skeleton.layers))
        connect(self.trunk, [self.routing.layer_function(i, self._training) for i in layers])
        connect(self._view, [self.routing.layer_function(i, self._serving) for i in layers])

    # -- checkpoints: between two steps -------------------------------------------------------------------------------

    def take_snapshot(self) -> SnapshotTaken:
        """Copies of all state here and on every owner of a group, at one version; steps wait for the copying alone.

        Each is kept where it was made, until it is dropped or the next is taken.
        """
        self._reach_all()
        self.snapshot = None  # its memory first
        answers = self._training.ask_all("snapshot", {"version": self.version, "run": self._run})
        owned = {name: groups for name, answer in answers.items() if (groups := _numbers(answer, "groups"))}
        if sorted(group for groups in owned.values() for group in groups) != list(
            range(self._roster.placement.num_groups)
        ):
            raise StepAborted(f"not every expert group has one owner: {owned}")
        state = {**self._state(), **self._moments()}
        copies = {name: to_host(tensor) for name, tensor in state.items()}
        self.snapshot = Snapshot(self.version, self._run, 0, self._settings, copies)
        return SnapshotTaken(self.version, self._run, tuple(owned), self._roster.placement.num_experts)

    def drop_snapshot(self) -> None:
        """It was written, or never will be."""
        self.snapshot = None

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
        optimizer = {name: found.pop(name) for name in saved.keys if name.startswith(_OPTIMIZER)}
        self._optimizer.zero_grad(set_to_none=True)
        self.routing.take_loss()
        self.pieces.forget()
        self.snapshot = None
        with self._serving_lock, self._gate.writing():
            self._disconnect()
            self._reshape(roster.placement.num_experts)
            self._take_weights(found)
            self._settings = saved.optimizer
            self._optimizer = self._new_optimizer()
            set_moments(self._optimizer, self._named_parameters(), optimizer)
            self._attempt += 1
            self.version, self._run = saved.version, run
            self._training.connect(roster.peers)
            self._place(roster)

    def _take_weights(self, found: Mapping[str, Tensor]) -> None:
        """Counterpart of `_state`, for as many experts as there are now."""
        opening = {name: tensor for name, tensor in found.items() if name.startswith(f"{_ROUTING}opening.")}
        self.routing.opening = None
        copy_all(self._state(), {name: tensor for name, tensor in found.items() if name not in opening})
        self.routing.opening = Opening.of({name.removeprefix(_ROUTING): t for name, t in opening.items()})

    def _disconnect(self) -> None:
        """Questions of before must not be answered now."""
        for dispatcher in (self._training, self._serving):
            dispatcher.connect({})
        self._unconfirmed, self._commit_fields = [], {}

    def _reshape(self, num_experts: int) -> None:
        """Gates for so many experts, to be filled by what is restored."""
        if num_experts != self._skeleton.num_experts:
            blueprint = Blueprint.of(self._source, self.routing.settings, self._skeleton.num_experts, num_experts)
            trunk = blank_trunk(blueprint, self.trunk)
            routing = Routing(trunk, blueprint.skeleton, blueprint.gate, blueprint.source.seed)
            routing.balance = self.routing.balance
            self._put_on(blueprint, trunk, second_view(blueprint.source, trunk), routing)

    def _state(self) -> dict[str, Tensor]:
        """Trunk and gates, without moments; what is tied counts once."""
        own = {f"trunk.{name}": tensor for name, tensor in self.trunk.state_dict(keep_vars=True).items()}
        own |= {f"{_ROUTING}{name}": tensor for name, tensor in self.routing.tensors().items()}
        if self.routing.opening is not None:
            own |= {f"{_ROUTING}{name}": tensor for name, tensor in self.routing.opening.tensors().items()}
        return {name: own[name] for name in {id(tensor): name for name, tensor in reversed(own.items())}.values()}

    def _moments(self) -> dict[str, Tensor]:
        return moments(self._optimizer, self._named_parameters())

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._trained():
            yield f"{_OPTIMIZER}{name}", parameter

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [*self.trunk.named_parameters(), *self.routing.named_parameters()]

    # -- as the leader of others --------------------------------------------------------------------------------------

    def join(self, name: str, link: Link) -> None:
        """Another router, which has just been started, computes its part of every step from now on. Between two steps,
        which wait until it has taken the trunk over from here. `PeerLost` if it does not."""
        self._reach_all()
        self.replicas.add(name, link)
        self._give_state([name])
        if name not in self.replicas.names:
            raise PeerLost("it did not take over the trunk", peer=name)

    def part(self, name: str) -> None:
        """A replica is ended on purpose; between two steps."""
        self.replicas.remove(name)

    def _give_state(self, names: Sequence[str]) -> None:
        if not names:
            return
        tensors = {name: to_host(tensor) for name, tensor in self._state().items()} | self._moments()
        ticket = {
            **self._placing(),
            "version": self.version,
            "run": self._run,
            "num_experts": self._skeleton.num_experts,
            "optimizer": self._settings.to_dict(),
            **self._rules(),
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
        return self._gate.writing()

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
        tally = self._accumulate(attempt.step, parts, num_tokens, num_microbatches, should_stop, buckets.watching())
        buckets.close()
        self._confirm_commit()
        return tally

    def new_buckets(self) -> Buckets:
        return Buckets(self._parameters(), self.pieces)

    def drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self.pieces.drop()
        self.routing.take_loss()

    @property
    def load_LE(self) -> Tensor:
        """Pairs routed to each expert in the step at hand."""
        return self._training.load_LE

    @property
    def placement(self) -> Placement:
        return self._roster.placement

    def follow_run(
        self, run: int, settings: OptimizerSettings, balance: BalanceSettings, compression: CompressionSettings
    ) -> None:
        """A replica's `begin_run`."""
        self.routing.begin_run(balance)
        self.compress(compression)
        self._settings, self._run = settings, run
        self._optimizer = self._new_optimizer()

    def follow(self, roster: Roster, held: Mapping[str, list[int]]) -> None:
        """A replica's `adopt`: the expert actors have been told by the leader, and `held` is what they said. Serving
        waits already."""
        self._unconfirmed = []  # the leader has seen the last commit done
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
        found = dict(tensors)
        optimizer = {name: found.pop(name) for name in tensors if name.startswith(_OPTIMIZER)}
        self.drop_gradients()
        self._disconnect()
        self._reshape(num_experts)
        self._take_weights(found)
        self.version = version
        self.follow_run(run, settings, balance, compression)
        set_moments(self._optimizer, self._named_parameters(), optimizer)

    def fence(self, term: int) -> dict[str, dict[str, Any]]:
        """Expert actors refuse every commit of an earlier term from now on. -> status of those that can be reached."""
        self.replicas.term = term
        if self._commit_fields:
            self._commit_fields["term"] = term
        self._training.forget()
        if self._unconfirmed:
            self._unconfirmed = [None]
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
            self._confirm_commit()
            self._settle()
        except (LinkError, StepAborted) as error:
            logger.warning("the next step settles what could not be now: %s", error)

    # -- serving ------------------------------------------------------------------------------------------------------

    def generate(self, prompt: Sequence[int], sampling: Sampling, *, timeout_s: float) -> Iterator[TokenEvent]:
        self._check_prompt(prompt)
        return self._engine.stream(prompt, sampling, timeout_s)

    def score(self, ids: Sequence[int]) -> tuple[list[float], int]:
        """Natural log-probability of each token but the first, and the version they are of."""
        self._check_prompt(ids, least=2)
        logits_BSV, version = self._logits(torch.tensor([ids]))
        logprobs_SV = torch.log_softmax(logits_BSV[0, :-1].float(), dim=-1)
        next_S1 = torch.tensor(ids[1:], device=logprobs_SV.device).unsqueeze(1)
        return logprobs_SV.gather(1, next_S1).squeeze(1).tolist(), version

    def logits(self, ids_BS: Tensor) -> Tensor:
        """[B, S, V] of the serving view."""
        self._check_ids(ids_BS, least=1)
        return self._logits(ids_BS)[0]

    def embed(self, ids: Sequence[int]) -> tuple[list[float], int]:
        """Mean of the last hidden states [D]."""
        self._check_prompt(ids)
        with self._version_guard(len(ids)) as version, torch.no_grad():
            base: nn.Module = self._view.base_model
            hidden_BSD = base(input_ids=torch.tensor([ids], device=self._device), use_cache=False).last_hidden_state
        return hidden_BSD[0].float().mean(0).tolist(), version

    def evaluate(self, batches: Sequence[Tensor]) -> tuple[float, int]:
        """Mean loss (nats a token) over the batches, and their number of predicted tokens."""
        total, count = 0.0, 0
        for ids_BS in batches:
            self._check_ids(ids_BS)
            with self._version_guard(ids_BS.shape[1]), torch.no_grad():
                ids_BS = ids_BS.to(self._device)
                total += token_losses(self._view(input_ids=ids_BS, use_cache=False).logits, ids_BS).item()
            count += ids_BS.shape[0] * (ids_BS.shape[1] - 1)
        return total / max(count, 1), count

    def _logits(self, ids_BS: Tensor) -> tuple[Tensor, int]:
        with self._version_guard(ids_BS.shape[1]) as version, torch.no_grad():
            return self._view(input_ids=ids_BS.to(self._device), use_cache=False).logits, version

    @contextmanager
    def _version_guard(self, sequence_length: int = 1, pasts: Sequence[GatePast] | None = None) -> Iterator[int]:
        """One forward at a time on the serving links, none while a commit goes out."""
        with self._serving_lock, self._gate.reading():
            self._serving.reopen()
            self._bring_commit()
            self._serving.begin(Purpose(min_version=self.version, sequence_length=sequence_length, pasts=pasts))
            yield self.version

    def _bring_commit(self) -> None:
        """The last commit, once more over the serving links: there it may have overtaken the training links, or be the
        only one that arrives. Who has done it just says so."""
        if self._served_version < self.version:
            self._serving.ask_all("commit", self._commit_fields)
            self._served_version = self.version

    # -- state --------------------------------------------------------------------------------------------------------

    @contextmanager
    def quiet(self) -> Iterator[Dispatcher]:
        """No update and no other serving forward inside: for exports, imports and status over the serving links."""
        with self._version_guard():
            yield self._serving

    def status(self) -> list[dict[str, Any]]:
        """What each expert actor says of itself, in actor order, with the kind of its link."""
        with self.quiet() as dispatcher:
            answers = dispatcher.ask_all("status", {})
            return [{**answer.fields, "link": dispatcher.links[name].kind} for name, answer in answers.items()]

    def vitals(self) -> dict[str, Any]:
        """Cheap, without asking anybody: version, memory in bytes, link kind of each expert actor."""
        num_waiting, queue_s = self._engine.queue()
        return {
            "num_waiting": num_waiting,
            "queue_s": queue_s,
            "version": self.version,
            "run": self._run,
            "memory_bytes": self._memory_bytes,
            "links": {name: link.kind for name, link in list(self._training.links.items())},
            "left_out": self.replicas.lost,
        }

    def _measure(self) -> int:
        """Bytes of parameters, gradients and optimizer state. By the thread that trains alone: a gradient that another
        thread reads while autograd replaces it may be gone already."""
        tensors: list[Tensor] = [*self._parameters()]
        tensors += [p.grad for p in self._parameters() if p.grad is not None]
        tensors += [t for state in self._optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def replace_weights(self, path: str) -> None:
        """Trunk and experts from another directory of the same architecture; optimizer moments start anew."""
        reader = CheckpointReader(path, self._skeleton)
        with self.replicas.holding():
            self._replace_weights(path, reader)
            self._give_state(self.replicas.names)

    def _replace_weights(self, path: str, reader: CheckpointReader) -> None:
        with self._serving_lock, self._gate.writing():
            self._serving.reopen()
            self._bring_commit()
            self._run += 1
            self._serving.ask_all("load", {"path": path, "run": self._run}, timeout_s=10 * self._timeout_s)
            load_weights(self.trunk, reader)
            self.routing.load(Path(path))
            self.routing.opening = None
            self.pieces.forget()
            self._optimizer = self._new_optimizer()

    def export(self, directory: Path) -> list[str]:
        """Writes the whole model as a Hugging Face directory. Steps wait meanwhile. Returns the file names."""
        with self.quiet() as dispatcher:
            return export_model(
                directory,
                self.trunk,
                self._skeleton,
                dispatcher,
                self.routing.save,
                tokenizer_from=self._source.path,
                timeout_s=10 * self._timeout_s,
            )

    def close(self) -> None:
        self._training.close()
        self._serving.close()
        self.replicas.close()

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.trunk.parameters(), *(p for _, p in self.routing.named_parameters())]

    def _new_optimizer(self) -> torch.optim.AdamW:
        return adamw(self._trained(), self._settings)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.trunk.get_input_embeddings().weight.device
        return device

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
        self._attempt = attempt + 1
        return version, run

    def _check_ids(self, ids_BS: Tensor, least: int = 2) -> None:
        if ids_BS.ndim != 2 or ids_BS.shape[0] == 0 or ids_BS.shape[1] < least:
            raise InvalidInput(f"need [B, S] with S of at least {least}", field="token_ids", value=tuple(ids_BS.shape))
        if ids_BS.shape[1] > self.max_positions:
            raise InvalidInput(
                "sequence is longer than the model",
                field="sequence_length",
                value=ids_BS.shape[1],
                remedy=f"use at most {self.max_positions} tokens",
            )
        low, high = int(ids_BS.min()), int(ids_BS.max())
        if low < 0 or high >= self.vocab_size:
            raise InvalidInput(
                "token outside the vocabulary",
                field="token_ids",
                value=low if low < 0 else high,
                remedy=f"ids are 0 to {self.vocab_size - 1}",
            )

    def _check_prompt(self, ids: Sequence[int], least: int = 1) -> None:
        self._check_ids(torch.tensor([list(ids)], dtype=torch.int64), least)


def _numbers(answer: Message, name: str) -> list[int]:
    return [int(n) for n in answer.fields[name]]  # type: ignore[union-attr]


def _end_ids(config: Any) -> list[int]:
    ids = getattr(config.get_text_config(), "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
