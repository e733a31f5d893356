"""An expert actor's inside: holds expert groups, computes for routers, keeps gradients, applies its own optimizer.

Everything it is asked comes as a `Message` to `handle`, one at a time, whichever link brought it. A training step is a
transaction: forward and backward accumulate under (step, attempt); `prepare` says the gradients are complete; `commit`
applies the optimizer and makes the version the step; `abort` drops everything of that attempt.

Where groups have copies on other actors, `prepare` also sends what was accumulated here to each group's owner, and
`reduce` lets the owners send the sums back: every copy then commits the same update.

With a staleness above 0 `commit` leaves the update to a thread (`actors.expert.updates`), and a forward waits only if
its layer is further behind. Whatever reads or changes whole groups lets that thread finish first.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.errors import InvalidInput, LinkError, MoeClusterError, StepAborted
from actors.expert.arrivals import Arrivals
from actors.expert.births import Births, give_birth
from actors.expert.copies import Copies
from actors.expert.exchange import Attempt, Exchange, PeerOpener
from actors.expert.followers import Followers
from actors.expert.holdings import Holdings, LoadLayer
from actors.expert.pins import KeptVersions
from actors.expert.residency import beside_a_cache
from actors.expert.transaction import Transaction
from actors.expert.updates import PendingUpdate, Updates
from actors.moe.cache import CacheSettings
from actors.moe.experts import Weights, Work
from actors.moe.fp8 import unpacked
from actors.optim import OptimizerSettings
from actors.snapshots import ExpertKey, SavedState, Snapshot
from actors.staleness import check_staleness
from actors.transport.contract import answered
from actors.transport.message import Message, error_answer
from actors.transport.turns import Lane
from actors.trunk.init import initial_experts
from actors.trunk.layout import Layout, ModelLayout, layout_of
from actors.trunk.source import ModelSource
from actors.values import Address, Placement

if TYPE_CHECKING:
    from actors.trunk.model import Skeleton

logger = logging.getLogger(__name__)


def _no_peers(name: str, address: Address) -> Any:
    raise LinkError("this host was given no way to reach others", peer=name)


class ExpertHost:
    """Holds `groups` (expert group numbers, in local order) of every MoE layer of the model.

    Thread-safe: a lock makes every question and every control call exclusive. `exchange.handle` is to be served beside
    `handle`, from another thread.
    """

    def __init__(
        self,
        name: str,
        source: ModelSource,
        groups: Sequence[int],
        *,
        group_size: int,
        device: str = "cpu",
        version: int = 0,
        open_peer: PeerOpener = _no_peers,
        timeout_s: float = 30.0,
        cache: CacheSettings | None = None,
        max_pairs: int = 0,
        layout: ModelLayout | None = None,
    ) -> None:
        """`max_pairs` of a token and an expert are computed at a time; 0: what suits the device. `layout`: of the
        source, from somebody who has it; without one transformers is imported to find out."""
        self.name = name
        self.group_size = group_size
        self.version = version
        self.tokens = 0
        self.pairs = 0
        self._source = source
        self._device, self._cache, self._max_pairs = torch.device(device), cache, max_pairs
        self._skeleton: Skeleton | None = None
        self._layout: Layout = layout or layout_of(self._family()) or self._family()
        self._num_experts = self._layout.num_experts
        """Of every layer now: the model may have grown."""
        self._check_groups(groups)
        self.holdings = self._load(source, groups)
        self._lock = threading.Lock()
        self._memory_bytes = self.holdings.num_bytes()
        self._run = 0
        self._term = 0
        """Of the router that leads; commits of one before are refused."""
        self._step = Transaction(version)
        self.exchange = Exchange(name, open_peer, timeout_s=timeout_s)
        self.exchange.on_follow = self._follow
        self.exchange.on_update = self._take_updates
        self._copies = Copies(self.exchange, group_size)
        self._followers = Followers(self.exchange)
        self.updates = Updates(name, lambda: self.holdings, self._device, timeout_s=timeout_s)
        self.updates.on_made = self._measure
        self._merged_before = 0
        self._arrivals = Arrivals(self.exchange, self._drained)
        self.snapshot: Snapshot[ExpertKey] | None = None
        """The last one that was asked for, until somebody takes it from here to write it."""
        self._kept = KeptVersions()
        self._pinned_bytes = 0
        self.for_peers: Snapshot[ExpertKey] | None = None
        """The same, of one that is to be kept in memory."""
        self._timeout_s = timeout_s
        self._handlers: dict[str, Callable[[Message], Message]] = {
            "forward": self._forward,
            "backward": self._backward,
            "prepare": self._prepare,
            "reduce": self._reduce,
            "commit": self._commit,
            "abort": self._abort,
            "fence": self._fence,
            "begin_run": self._begin_run,
            "place": self._place,
            "retire": self._retire,
            "status": self._status,
            "echo": self._echo,
            "export_layer": self._export_layer,
            "snapshot": self._take_snapshot,
            "load": self._load_model,
            "pin": self._pin,
            "keep_pins": self._keep_pins,
        }

    @property
    def groups(self) -> tuple[int, ...]:
        return self.holdings.groups

    @property
    def experts(self) -> list[int]:
        """In local order."""
        return self.holdings.experts

    def close(self) -> None:
        """Ends its links to other actors."""
        self.updates.close()
        self.exchange.close()
        self._followers.close()
        self.holdings.close()

    # -- what routers ask ---------------------------------------------------------------------------------------------

    def handle(self, peer: str, question: Message) -> Message:
        """One question, one answer. Never raises: errors of the tree and unexpected ones are answers too."""
        handler = self._handlers.get(question.op)
        if handler is None:
            return error_answer(InvalidInput("unknown operation", field="op", value=question.op))

        def handle() -> Message:
            if (need := self._need(question)) is not None:
                self.updates.wait(*need)
            with self._lock:
                return handler(question)

        return answered(self.name, peer, question, handle)

    def ready(self, question: Message) -> bool:
        """Whether `handle` would answer at once, and not wait for updates. From any thread."""
        try:
            need = self._need(question)
        except (KeyError, TypeError, ValueError):  # `handle` says what is wrong with it
            return True
        return need is None or self.updates.admits(*need)

    def _need(self, question: Message) -> tuple[int, int] | None:
        """(layer, how many updates it may be behind) of a question that may have to wait: a forward.

        `prepare` is another, so that on an actor that gets no tokens no more updates are pending than elsewhere.
        """
        fields: Any = question.fields
        if self.lane(question) == "serving":
            layer, max_behind = fields.get("layer"), fields.get("max_behind")
            is_known = type(layer) is int and 0 <= layer < len(self.holdings.stacks)
            return (layer, max_behind) if self._staleness and is_known and type(max_behind) is int else None
        waits = question.op == "prepare" or (question.op == "forward" and fields.get("keep"))
        if not waits or not self._staleness or fields.get("step") != self.version + 1:
            return None
        layer = fields["layer"] if question.op == "forward" else len(self.holdings.stacks) - 1
        if Attempt.of(fields) < self._step.attempt or layer not in range(len(self.holdings.stacks)):
            return None  # it will be refused
        return layer, self._may_lag(fields)

    def _may_lag(self, fields: Mapping[str, Any]) -> int:
        """The job's bound, or what the forward asks for."""
        return min(self._staleness, self.version - int(fields.get("min_version", 0)))

    @property
    def _staleness(self) -> int:
        return self.holdings.settings.staleness

    @staticmethod
    def lane(question: Message) -> Lane:
        """Whose turn it takes, where several questions wait."""
        return "serving" if question.op == "forward" and not question.fields.get("keep") else "training"

    @contextmanager
    def in_place(self, version: int, device: torch.device) -> Iterator[Sequence[Weights] | None]:
        """For a router of this process: the weights of every layer, which inside neither move nor change, if they are
        whole, of this version and on that device."""
        with self._lock:
            settings, layers = self.holdings.settings, [stack.weights for stack in self.holdings.stacks]
            is_here = self._cache is None and all(w.device == device for w in layers[0].values())
            is_current = self.version == version and not settings.staleness and settings.sparse != "exact"
            yield layers if is_here and is_current else None

    def rows(self) -> dict[int, int]:
        """Expert -> its row in the stacks. Inside `in_place`."""
        ordinals = self.holdings.by_place(range(1, len(self.experts) + 1))
        return {self.experts[n - 1]: row for row, n in enumerate(ordinals) if n}

    def idle(self) -> bool:
        """Does one piece of deferred work, between questions. False when none is left."""
        with self._lock:
            if not self._step.do_deferred(self.holdings.stacks):
                self._arrivals.catch_up()
            return self._step.has_deferred

    def _forward(self, question: Message) -> Message:
        """Tokens of one layer -> weighted sums. `keep` (training) saves what backward needs, by micro-batch, layer.

        `used` of the answer is the version of the weights, `version` that of the last commit.
        """
        fields: Any = question.fields
        if "pin" in fields:
            return self._forward_pinned(question)
        layer, keep = self._layer(fields), bool(fields.get("keep"))
        self._check_epoch(fields)
        if keep:
            self._enter(fields)
        self._check_version(int(fields.get("min_version", 0)))
        stack = self.holdings.stacks[layer]
        x_TD, work = self._work(question, len(self.experts))
        self.holdings.catch_up(layer, work.counts_E)
        placed = Work(work.token_P, self.holdings.by_place(work.counts_E), work.weight_P)
        self.updates.check()
        weights, lag = self.updates.read(layer)
        if keep and lag > self._may_lag(fields):
            raise StepAborted(f"layer {layer} of {self.name} is {lag} updates behind, {self._may_lag(fields)} may be")
        y_TD, saved = stack(x_TD, placed, keep=keep, weights=weights)
        if saved is not None:
            self._step.keep(int(fields["microbatch"]), layer, saved)
            self._step.weights[layer] = weights
            self._step.spread.note(lag, sum(count > 0 for count in work.counts_E))
            self._touch(layer, work.counts_E)
        self.tokens += x_TD.shape[0]
        self.pairs += len(work.token_P)
        return Message("ok", {"version": self.version, "used": self.version - lag, "pairs": self.pairs}, (y_TD,))

    def _forward_pinned(self, question: Message) -> Message:
        """The same of a version that is kept, by the placement of that time."""
        fields: Any = question.fields
        kept, layer = self._kept.get(str(fields["pin"])), self._layer(fields)
        x_TD, work = self._work(question, len(kept.experts))
        y_TD, _ = self.holdings.stacks[layer](x_TD, kept.placed(work), keep=False, weights=kept.layers[layer])
        self.tokens += x_TD.shape[0]
        self.pairs += len(work.token_P)
        return Message("ok", {"version": kept.version, "used": kept.version, "pairs": self.pairs}, (y_TD,))

    def _work(self, question: Message, num_experts: int) -> tuple[Tensor, Work]:
        """Tokens and what is to be done with them, checked, on the device."""
        fields: Any = question.fields
        *rows, token_P, weight_P = question.tensors
        x_TD = unpacked([part.to(self._device) for part in rows], self._layout.dtype)
        self._check_tokens(x_TD)
        work = Work(token_P, list(fields["counts_E"]), weight_P)
        work.check(x_TD.shape[0], num_experts)
        return x_TD, work.to(self._device)

    def _backward(self, question: Message) -> Message:
        self._enter(question.fields)
        layer = self._layer(question.fields)
        saved = self._step.take(int(question.fields["microbatch"]), layer)  # type: ignore[arg-type]
        (grad_y_TD,) = question.tensors
        self._check_tokens(grad_y_TD)
        grad_x_TD, grad_weight_P, part = self.holdings.stacks[layer].backward(saved, grad_y_TD.to(self._device))
        if part is not None:
            self._step.defer(layer, part)
        return Message("ok", {}, (grad_x_TD, grad_weight_P))

    def _prepare(self, question: Message) -> Message:
        """Gradients of this actor are complete; the answer's `square_sum` is over the groups that have no copy.

        From here on only `reduce`, `commit` or `abort` is right.
        """
        self._enter(question.fields)
        self._step.check_complete()
        while self._step.do_deferred(self.holdings.stacks):
            pass
        self._copies.compress(question.fields)
        self._copies.send_partial_sums(self.holdings, self._step.touched, self._step.attempt)
        self._step.prepare()
        spread, self._step.spread.merged = self._step.spread, self.updates.num_merged - self._merged_before
        return self._norm_of(self._copies.alone(self.groups), spread.fields())

    def _reduce(self, question: Message) -> Message:
        """All have prepared: the sums of the groups owned here go to their copies."""
        attempt = self._step.check_prepared("reduce", question.fields)
        pending = self._copies.reduce(self.holdings, attempt)
        answer = self._norm_of(self._copies.shared(self.groups))
        self.exchange.settle(pending)
        return answer

    def _commit(self, question: Message) -> Message:
        fields: Any = question.fields
        step = int(fields["step"])
        if step == self.version:
            return Message("ok", {"version": self.version})  # repeated: already done
        if (term := int(fields.get("term", 0))) < self._term:
            raise StepAborted(f"commit of step {step} by a router of term {term}, now is {self._term}")
        self._copies.take_sums(self.holdings, self._step.check_prepared("commit", fields))
        self._copies.keep()
        lr, scale = float(fields["lr"]), float(fields["scale"])
        self._followers.tell(self.holdings, step, lr, scale)
        if self._staleness:
            self._put_update(step, lr, scale)
        else:
            with self.updates.making():
                self.holdings.update(lr, scale)
        self.version = step
        self._end_attempt()
        if self.holdings.leaving:
            self._drained().free_leaving()
        self._arrivals.catch_up()
        if not self.updates.max_lag:
            self._measure()
        return Message("ok", {"version": self.version})

    def _put_update(self, step: int, lr: float, scale: float) -> None:
        """The gradients of this step go; those of the next begin at zero."""
        own = frozenset(self._copies.alone(self.groups)) - self._followers.groups
        then = dict(self._step.weights) if self.holdings.settings.delay_correction else {}
        self._merged_before = self.updates.num_merged
        self.updates.put(PendingUpdate(step, lr, scale, self.holdings.take_gradients(), own, then))

    def _drained(self) -> Holdings:
        """With every committed update in them."""
        self.updates.drain()
        return self.holdings

    def _measure(self) -> None:
        self._memory_bytes = self.holdings.num_bytes() + self._copies.num_bytes()
        self._pinned_bytes = self._kept.num_bytes(self.holdings)

    def _abort(self, question: Message) -> Message:
        if self._step.aborts(Attempt.of(question.fields), self.version):
            self._drop_gradients()
        return Message("ok", {"version": self.version})

    def _fence(self, question: Message) -> Message:
        """A router has taken over: its version is what it is now, whatever the one before has sent."""
        self._term = max(self._term, int(question.fields["term"]))  # type: ignore[arg-type]
        return Message("ok", self.status())

    def _begin_run(self, question: Message) -> Message:
        """A new job: its optimizer settings, fresh moments. Groups on their way here have the old ones: dropped."""
        settings = OptimizerSettings(**question.fields["optimizer"])  # type: ignore[arg-type]
        self._check_staleness(settings)
        self.updates.drain()
        self._new_run(question.fields)
        self._step.attempt = Attempt(self.version, 0)  # a router before may have left one open
        self._drop_gradients()
        self.holdings.begin_run(settings)
        return Message("ok", {"version": self.version})

    def _norm_of(self, groups: Sequence[int], more: Mapping[str, Any] | None = None) -> Message:
        square = self.holdings.square_sum(groups)
        return Message("ok", {"square_sum": square if math.isfinite(square) else None, **(more or {})})

    def _check_staleness(self, settings: OptimizerSettings) -> None:
        if check_staleness(settings.staleness) and self._cache is not None:
            raise beside_a_cache()

    # -- placement ----------------------------------------------------------------------------------------------------

    def arrive(self, group: int, owner: str, address: Address, here: Address, timeout_s: float) -> int:
        """Brings a group here, layer by layer, while its owner goes on with its steps, and follows its updates from
        then on, until `place` says that this actor holds it. Returns the bytes that came.

        Called from a thread of its own; `here` is where this host's exchange listens.
        """
        with self._lock:
            self._check_groups([group])
            if group in self.groups:
                raise InvalidInput(f"{self.name} holds it already", field="group", value=group)
        return self._arrivals.bring(self._lock, group, owner, address, here, timeout_s)

    def leave_off(self, group: int) -> None:
        """Gives up a group that is on its way here."""
        with self._lock:
            self._arrivals.drop(group)

    def _follow(self, peer: str, question: Message) -> Message:
        """One layer of a group for another actor, which gets every update of it from now on."""
        fields: Any = question.fields
        # Two hosts that ask each other must not wait for each other's locks; between prepare and commit the weights
        # are about to change by a sum that has been sent already.
        if not self._lock.acquire(timeout=0.05):
            return Message("busy")
        try:
            if self._step.prepared is not None:
                return Message("busy")
            group, layer = int(fields["group"]), self._layer(fields)
            if group not in self._copies.owned(self.groups):
                return error_answer(InvalidInput(f"{self.name} does not own it", field="group", value=group))
            tensors, updates = self._drained().read(group, layer)
            self._followers.add(group, layer, fields["follower"], Address(*fields["address"]))
            ticket = {"version": self.version, "updates": updates, "run": self._run}
            return Message("ok", {**ticket, "optimizer": self.holdings.settings.to_dict()}, tensors)
        except MoeClusterError as error:
            return error_answer(error)
        finally:
            self._lock.release()

    def _take_updates(self) -> None:
        """In the exchange's thread. A busy host does it itself later."""
        if self._lock.acquire(blocking=False):
            try:
                self._arrivals.catch_up()
            finally:
                self._lock.release()

    def _place(self, question: Message) -> Message:
        """The placement from now on; groups that are not held any more stay until `retire` or the next commit."""
        fields: Any = question.fields
        if self._step.under_way:
            raise StepAborted("groups change between steps, and one is under way")
        self.updates.drain()
        held = tuple(tuple(names) for names in fields["holders"])
        placement = Placement(int(fields["epoch"]), held, self.group_size)
        wanted = placement.held_by(self.name)
        version, run = int(fields["version"]), int(fields["run"])
        if not self.groups and version > self.version:
            self.version, self._run = version, run
            self._step.attempt = Attempt(version, 0)
        self._check_version(version)
        born: list[int] = []
        if births := Births.of(fields):
            born = [group for group in wanted if group in births.source_of]
            give_birth(self.holdings, self._family, self.group_size, births, born)
        self._await_arrivals([g for g in wanted if g in self.holdings.arriving and g not in born], version, run)
        self.holdings.hold(wanted)
        self._num_experts = placement.num_experts
        for group in wanted:
            self._arrivals.arrived(group)
        self._copies.use(placement)
        self.exchange.connect({name: Address(*address) for name, address in fields["addresses"].items()})
        # Those that hold the group now take part in the steps, and those of groups owned elsewhere ask there.
        owned = self._copies.owned(self.groups)
        self._followers.keep(lambda group, name: group in owned and name not in self._copies.holders(group))
        return Message("ok", {"experts": self.experts, "version": self.version})

    def _await_arrivals(self, groups: Sequence[int], version: int, run: int) -> None:
        deadline = time.monotonic() + self._timeout_s / 2
        while behind := self._arrivals.behind(groups, version, run):
            if time.monotonic() > deadline:
                raise StepAborted(f"group {behind[0]} has not arrived at {self.name} in version {version}")
            self.exchange.wait_for_update(0.05)
            self._arrivals.catch_up()

    def _retire(self, question: Message) -> Message:
        """Every router uses the new placement: what is not held any more may go."""
        if not self._step.under_way:
            self._drained().free_leaving()
            self.holdings.trim()
            self._measure()
        return Message("ok", {})

    # -- state in and out ---------------------------------------------------------------------------------------------

    def _echo(self, question: Message) -> Message:
        """What a message costs without the experts' computation."""
        return Message("ok", {"version": self.version}, question.tensors[:1])

    def _status(self, question: Message) -> Message:
        return Message("ok", self.status())

    def status(self) -> dict[str, Any]:
        """Cheap and without the lock: it is also the heartbeat of an actor that is busy."""
        return {
            "version": self.version,
            "used": max(0, self.version - self.updates.max_lag),
            "merged": self.updates.num_merged,
            "groups": list(self.groups),
            "experts": self.experts,
            "tokens": self.tokens,
            "run": self._run,
            "attempt": self._step.attempt.number,
            "term": self._term,
            "memory_bytes": self._memory_bytes + self.exchange.keeper.num_bytes(),
            "pinned_bytes": self._pinned_bytes,
            "cache": self.holdings.cache_counters(),
        }

    def _export_layer(self, question: Message) -> Message:
        """Stacked weights of one layer's experts that are owned here; `experts` are their numbers, in that order."""
        layer = self._layer(question.fields)
        owned = self._copies.owned(self.groups)
        parts = [self._drained().read(group, layer)[0][::3] for group in owned]
        tensors = tuple(torch.cat(kind) for kind in zip(*parts, strict=True))
        names = list(self.holdings.stacks[layer].names) if owned else []
        fields = {"names": names, "experts": self.holdings.experts_of(owned), "version": self.version}
        return Message("ok", fields, tensors)

    def _load_model(self, question: Message) -> Message:
        """Replaces all weights by those of another directory of the same architecture; moments start anew."""
        source = ModelSource(path=str(question.fields["path"]), dtype=self._source.dtype)
        holdings = self._load(source, self.groups)
        for mine, loaded in zip(self.holdings.stacks, holdings.stacks, strict=True):
            for name in loaded.names:
                if mine.shape(name) != loaded.shape(name):
                    raise InvalidInput("another architecture", field=name, value=loaded.shape(name))
        holdings.begin_run(self.holdings.settings)
        self._new_run(question.fields)
        self._drop_gradients()
        self.updates.drop()
        self.holdings.close()
        self.holdings = holdings
        return Message("ok", {"version": self.version})

    # -- pins ---------------------------------------------------------------------------------------------------------

    def _pin(self, question: Message) -> Message:
        """Keeps the version that is asked for, which is the newest, under a name."""
        if self._cache is not None:
            raise InvalidInput(
                "a version is kept by references to its weights, and experts.expert_cache_size is set, where all are "
                "written in place",
                field="pin",
                remedy="set experts.expert_cache_size to 0",
            )
        fields: Any = question.fields
        version = int(fields["version"])
        if version != self.version:
            raise StepAborted(f"version {version} is to be pinned, {self.version} is here")
        kept = self._kept.add(str(fields["name"]), self._drained(), version)
        self._measure()
        return Message("ok", {"experts": list(kept.experts), "version": version})

    def _keep_pins(self, question: Message) -> Message:
        """These and no others."""
        fields: Any = question.fields
        self._kept.keep({str(name) for name in fields["names"]}, self._drained())
        self._measure()
        return Message("ok", {"names": self._kept.names})

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _take_snapshot(self, question: Message) -> Message:
        """Of the groups that are owned here: copies are their owners' business."""
        fields: Any = question.fields
        version = int(fields["version"])
        if version != self.version:
            raise StepAborted(f"a snapshot of version {version} is asked for, {self.version} is here")
        owned = self._copies.owned(self.groups)
        if fields.get("for_peers"):
            self.for_peers = None  # its memory first
            self.for_peers = self._drained().snapshot(owned, version, int(fields["run"]))
        else:
            self.snapshot = None
            self.snapshot = self._drained().snapshot(owned, version, int(fields["run"]))
        return Message("ok", {"groups": owned, "version": version})

    def restore(self, groups: Sequence[int], saved: SavedState[ExpertKey], run: int) -> None:
        """From now on exactly these groups are here, as they were saved; all that was here is gone.

        Called from a thread of its own. Until the next `place` every question that needs experts is refused. After an
        error nothing is here, and it can be called again.
        """
        self._num_experts = max((key.expert + 1 for key in saved.keys), default=self._num_experts)
        self._check_groups(groups)
        self._check_staleness(saved.optimizer)
        with self._lock:
            self._clear(run)
        holdings = self._holdings_of(groups, lambda layer, groups: self._blank(layer, len(groups)))
        holdings.load(saved)
        with self._lock:
            self.holdings.close()
            self.holdings = holdings
            self.version, self._step.attempt = saved.version, Attempt(saved.version, 0)
            self._measure()

    def _clear(self, run: int) -> None:
        """Before what is saved is read, so that there is memory for it."""
        self.updates.drop()
        self._new_run({"run": run})
        self._drop_gradients()
        self.exchange.forget_gradients(Attempt(sys.maxsize, 0))  # steps with these numbers will come again
        self._copies.use(Placement(0, (), self.group_size))
        self.snapshot = None
        self.holdings.close()
        self.holdings = self._holdings_of((), lambda layer, groups: {})
        self._measure()

    def _blank(self, layer: int, num_groups: int) -> dict[str, Tensor]:
        count = num_groups * self.group_size
        shapes = self._layout.layers[layer].shapes()
        return {name: torch.zeros(count, *shape, dtype=self._layout.dtype) for name, shape in shapes.items()}

    # -- inside -------------------------------------------------------------------------------------------------------

    def _holdings_of(self, groups: Sequence[int], load: LoadLayer) -> Holdings:
        return Holdings(self._layout, self.group_size, self._device, groups, load, self._cache, self._max_pairs)

    def _load(self, source: ModelSource, groups: Sequence[int]) -> Holdings:
        return self._holdings_of(groups, self._loader(source) if groups else lambda layer, groups: {})

    def _loader(self, source: ModelSource) -> LoadLayer:
        """From its directory, or drawn from its seed."""
        from actors.trunk.checkpoint import CheckpointReader

        family = self._family()
        reader = CheckpointReader(source.path, family) if source.path else None

        def load(layer: int, groups: Sequence[int]) -> Mapping[str, Tensor]:
            if reader is None:
                return initial_experts(family, layer, groups, self.group_size, source.seed)
            experts = [g * self.group_size + i for g in groups for i in range(self.group_size)]
            return reader.expert_tensors(family.layers[layer].name, experts)

        return load

    def _family(self) -> Skeleton:
        """The model as transformers has it, imported here and not before: what weights are drawn and read by."""
        from actors.trunk.model import skeleton

        if self._skeleton is None:
            self._skeleton = skeleton(self._source)
        return self._skeleton

    def _new_run(self, fields: Mapping[str, Any]) -> None:
        self._run = int(fields.get("run", self._run + 1))
        self._followers.clear()
        self._copies.forget()
        for group in self.holdings.arriving:
            self._arrivals.drop(group)

    def _enter(self, fields: Any) -> None:
        if self._step.begins(fields, self.version):
            self._drop_gradients()

    def _check_epoch(self, fields: Mapping[str, Any]) -> None:
        """A message that was routed by another placement counts experts that are not these."""
        now = self._copies.placement.epoch
        if (epoch := fields.get("epoch", now)) != now:
            raise StepAborted(f"message of placement epoch {epoch}, here it is {now}")

    def _check_version(self, wanted: int) -> None:
        if wanted > self.version:
            raise StepAborted(f"version {wanted} is asked for, {self.version} is here")

    def _check_groups(self, groups: Sequence[int]) -> None:
        num_groups = self._num_experts // self.group_size
        for group in groups:
            if not 0 <= group < num_groups:
                raise InvalidInput(
                    f"the model has {self._num_experts} experts a layer",
                    field="groups",
                    value=group,
                    remedy=f"with groups of {self.group_size} the last group is {num_groups - 1}",
                )

    def _layer(self, fields: Any) -> int:
        layer, num_layers = fields.get("layer"), len(self.holdings.stacks)
        if type(layer) is not int or not 0 <= layer < num_layers:
            raise InvalidInput(f"must be 0 to {num_layers - 1}", field="layer", value=layer)
        return layer

    def _check_tokens(self, x_TD: Tensor) -> None:
        width = self.holdings.stacks[0].width
        if x_TD.ndim != 2 or x_TD.shape[1] != width or x_TD.dtype != self._layout.dtype:
            raise InvalidInput(
                f"need [T, {width}] of {self._layout.dtype}", field="x_TD", value=(tuple(x_TD.shape), x_TD.dtype)
            )

    def _touch(self, layer: int, counts_E: Sequence[int]) -> None:
        if self._copies.placement.has_copies:
            size = self.group_size
            self._step.touched |= {
                (g, layer) for i, g in enumerate(self.groups) if any(counts_E[i * size : (i + 1) * size])
            }

    def _drop_gradients(self) -> None:
        self.holdings.drop_gradients()
        self._copies.drop()
        self._end_attempt()

    def _end_attempt(self) -> None:
        self._step.clear()
        self.exchange.forget_gradients(self._step.attempt)
