"""The router's side of its links: a layer's tokens go out, weighted sums come back, and the same for gradients.

One dispatcher serves one thread at a time. Questions go to all actors first, then answers are awaited, so actors work
together; in between the router has time for something else (`actors.router.halves`, `actors.router.flight`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.errors import LinkError, MoeClusterError, NonFinite, PeerLost, ProtocolError, StepAborted
from actors.moe.dispatch import HolderTable, Share
from actors.moe.fp8 import Payload, packed
from actors.moe.gating import GatePast
from actors.router.backlog import Backlog
from actors.router.halves import routed
from actors.router.rows import add_rows, load_where, plan_where, rows_of
from actors.transport.contract import Link, Pending
from actors.transport.message import Message
from actors.trunk.shared import Meanwhile, nothing
from actors.values import Address, Placement

if TYPE_CHECKING:
    from actors.trunk.model import RemoteExperts

logger = logging.getLogger(__name__)

LinkOpener = Callable[[], Link]


@dataclass(frozen=True)
class Peer:
    """An expert actor, as a router reaches it."""

    open: LinkOpener
    exchange: Address | None = None
    """Where other expert actors reach it; needed where groups have copies."""
    near: bool = False
    """Whether it is on the router's own node."""
    contact: Mapping[str, Any] = field(default_factory=dict)
    """Plain values by which another router can find it."""


@dataclass(frozen=True)
class Roster:
    placement: Placement
    peers: Mapping[str, Peer]
    """Every actor of the placement."""

    def fields(self) -> dict[str, Any]:
        """Of the message that tells expert actors their part."""
        placement = self.placement
        addresses = {name: list(astuple(peer.exchange)) for name, peer in self.peers.items() if peer.exchange}
        holders = [list(held) for held in placement.holders]
        return {"epoch": placement.epoch, "holders": holders, "addresses": addresses}


@dataclass
class Purpose:
    """Why a forward is run. Training names its micro-batch of an attempt at a step; serving leaves `step` at 0."""

    step: int = 0
    attempt: int = 0
    microbatch: int = 0
    min_version: int = 0
    sequence_length: int = 1
    """S of the tokens [B * S, D]; for gates that see a token in its sequence."""
    pasts: Sequence[GatePast] | None = None
    """What such gates keep of a decoding session, by layer."""
    max_behind: int = 0
    """Committed updates that the experts may still have to make; serving only."""
    pin: str = ""
    """Of a version that is kept; `min_version` is its number."""

    @property
    def keep(self) -> bool:
        return self.step > 0

    def fields(self, layer: int) -> dict[str, Any]:
        if self.pin:
            return {"layer": layer, "pin": self.pin}
        serving = {} if self.keep else {"max_behind": self.max_behind}
        return {
            **serving,
            "layer": layer,
            "keep": self.keep,
            "step": self.step,
            "attempt": self.attempt,
            "microbatch": self.microbatch,
            "min_version": self.min_version,
        }


@dataclass
class Pass:
    """One way through the layers and back, of one micro-batch or request."""

    purpose: Purpose = field(default_factory=Purpose)
    used_version: int = 0
    """The least version of the experts that were used."""
    backlog: Mapping[str, float] = field(default_factory=dict)
    """Pairs that each actor has to do for others, a layer: the same all the way, so that a layer that is computed twice
    is shared alike."""
    counted: set[int] = field(default_factory=set)
    """Layers whose load is noted: one that is computed twice (activation checkpointing) counts once."""


@dataclass
class Sent:
    """Tokens of a layer that are with the actors."""

    layer: int
    shares: list[Share]
    pending: list[Pending | None]
    x_TD: Tensor
    ids_TK: Tensor
    weights_N: Tensor


class Dispatcher:
    """A router has one for training, where a lost actor ends the attempt, and one for serving (`reroutes`), where the
    work of a lost actor goes to other holders of its experts."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        timeout_s: float,
        turn: int = 0,
        reroutes: bool = False,
        payload: Payload = "trunk",
    ) -> None:
        self.links: dict[str, Link] = {}
        self.epoch = 0
        self._peers: dict[str, Peer] = {}
        self._held: dict[str, list[int]] = {}
        self._lost: set[str] = set()
        """Without a living link; only of a dispatcher that reroutes."""
        self._just_lost: set[str] = set()
        """Those of them that were not tried again."""
        self._timeout_s, self._turn, self._reroutes, self.payload = timeout_s, turn, reroutes, payload
        self._num_experts = num_experts
        self._names: list[str] = []
        self._table = HolderTable.of([], num_experts)
        self._backlog = Backlog(num_layers)
        self.current = Pass()
        """What is computed now. Where several passes are in flight, whose turn it is sets it."""
        self.while_away: Meanwhile = nothing
        """Called once in each direction of each layer, after the questions were sent and before answers are awaited."""
        self.load_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        """Pairs routed to each expert since the caller last zeroed it; training forwards only."""

    # -- actors come and go: between forwards -------------------------------------------------------------------------

    def connect(self, peers: Mapping[str, Peer]) -> None:
        """Links to exactly these actors. Those that are there already stay."""
        for name in [n for n in self.links if n not in peers]:
            self.links.pop(name).close()
        self._peers = dict(peers)
        for name, peer in peers.items():
            if name not in self.links:
                self.links[name] = peer.open()

    def drop_closed(self, but: Mapping[str, Peer]) -> None:
        """Forgets the actors that are gone and not among these."""
        for name in [n for n, link in self.links.items() if link.closed and n not in but]:
            del self.links[name], self._peers[name]

    def use(self, epoch: int, held: Mapping[str, list[int]], num_experts: int) -> None:
        """`held[name]`: expert numbers of each actor, in its local order; `num_experts` of every layer."""
        self.epoch, self._held = epoch, dict(held)
        if num_experts != self._num_experts:
            self._num_experts = num_experts
            self.load_LE = torch.zeros(len(self.load_LE), num_experts, dtype=torch.int64)
        self._lost.clear()
        self._just_lost.clear()
        self._build_table()

    def reopen(self) -> list[str]:
        """Opens closed links again. -> actors that are gone for good; none if this one reroutes around them."""
        # A link may end though its actor lives: once it is tried again, and as long as nobody can stand in for it.
        if again := self._lost if self._lost and self._table.missing else self._just_lost:
            self._lost = self._lost - again
            self._build_table()
        gone = []
        for name, link in self.links.items():
            if link.closed and name not in self._lost:
                try:
                    if link.is_cut:
                        # A frozen process still takes connections: who asks it anew waits in vain.
                        raise PeerLost("it was cut off", peer=name)
                    self.links[name] = self._peers[name].open()
                except LinkError:
                    gone.append(name)
        for name in gone if self._reroutes else ():
            self._lose(name)
        self._just_lost.clear()
        return [] if self._reroutes else gone

    @property
    def num_experts(self) -> int:
        """Of every layer."""
        return self._num_experts

    @property
    def lost(self) -> frozenset[str]:
        """Actors that are rerouted around."""
        return frozenset(self._lost)

    def close_links(self, names: Sequence[str]) -> None:
        """Others cannot reach these: whether they are gone is found out by opening the links again."""
        for name in names:
            if (link := self.links.get(name)) is not None:
                link.close()

    def forget(self) -> None:
        """Nobody waits for the open questions any more."""
        for link in self.links.values():
            link.forget()

    def held(self, name: str) -> list[int]:
        """Expert numbers of this actor, in its local order."""
        return list(self._held.get(name, []))

    @property
    def purpose(self) -> Purpose:
        """Of the pass that is computed now."""
        return self.current.purpose

    @property
    def used_version(self) -> int:
        """The least version of the experts that were used since `begin`."""
        return self.current.used_version

    def begin(self, purpose: Purpose) -> None:
        """Before each pass through the layers."""
        if not purpose.pin:  # what is pinned must not depend, by a rounding, on how holders share the work
            self._backlog.refresh_after_a_pass(self._names)
        self.current = Pass(purpose, max(purpose.min_version, purpose.step - 1), self._backlog.by_name())

    def _build_table(self) -> None:
        self._names = list(self.links)
        held = [[] if n in self._lost else self._held.get(n, []) for n in self._names]
        self._table = HolderTable.of(held, self._num_experts, [self._peers[n].near for n in self._names])
        self._backlog.refresh(self._names)

    def _lose(self, name: str) -> None:
        logger.warning("%s is lost; its work goes to other holders of its experts", name)
        self.links[name].close()
        self._lost.add(name)
        self._just_lost.add(name)
        self._build_table()

    # -- a layer ------------------------------------------------------------------------------------------------------

    def layer_function(self, layer: int) -> RemoteExperts:
        """What the experts module of this layer calls instead of computing: differentiable in tokens and weights."""

        def remote(
            x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, meanwhile: Meanwhile = nothing, /
        ) -> Tensor:
            return routed(self, layer, x_TD, topk_ids_TK, topk_weights_TK, meanwhile)

        return remote

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Sent:
        """The sending half: every actor that is needed has its part. `receive` is the other."""
        now = self.current
        shares, finite = self._plan(ids_TK, weights_TK)
        if not finite:
            raise NonFinite(f"gate scores of layer {layer} are not finite", step=now.purpose.step)
        if now.purpose.keep and layer not in now.counted:
            now.counted.add(layer)
            self.load_LE[layer] += load_where(ids_TK, shares, self._table)
        self._backlog.visit()
        weights_N = weights_TK.reshape(-1)
        return Sent(layer, shares, self._ask(layer, shares, x_TD, weights_N), x_TD, ids_TK, weights_N)

    def receive(self, sent: Sent) -> Tensor:
        """The weighted sums [T, D]."""
        self.while_away()
        y_TD = torch.zeros_like(sent.x_TD)
        todo = self._take(sent.shares, sent.pending, sent.x_TD, sent.ids_TK, y_TD)
        while todo:
            todo = self._compute(sent.layer, todo, sent.x_TD, sent.ids_TK, sent.weights_N, y_TD)
        return y_TD

    def _plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None) -> tuple[list[Share], bool]:
        backlog = self.current.backlog
        backlog_A = [backlog.get(name, 0.0) for name in self._names]
        return plan_where(ids_TK, self._table, backlog_A, self._turn, weights_TK)

    def _compute(
        self, layer: int, shares: list[Share], x_TD: Tensor, ids_TK: Tensor, weights_N: Tensor, y_TD: Tensor
    ) -> list[Share]:
        """Adds what the actors answer to `y_TD`. -> what lost actors left, as shares of others."""
        return self._take(shares, self._ask(layer, shares, x_TD, weights_N), x_TD, ids_TK, y_TD)

    def _ask(self, layer: int, shares: Sequence[Share], x_TD: Tensor, weights_N: Tensor) -> list[Pending | None]:
        fields = {**self.purpose.fields(layer), "epoch": self.epoch}
        pending: list[Pending | None] = []
        for share in shares:
            rows = packed(rows_of(x_TD, share), self.payload)
            weight_P = weights_N.index_select(0, share.pair_P.to(x_TD.device))
            question = Message("forward", {**fields, "counts_E": share.counts_E}, (*rows, share.token_P, weight_P))
            pending.append(self._start(self._names[share.actor], question))
        return pending

    def _take(
        self,
        shares: Sequence[Share],
        pending: Sequence[Pending | None],
        x_TD: Tensor,
        ids_TK: Tensor,
        y_TD: Tensor,
    ) -> list[Share]:
        answers = self._answers(pending)
        left: list[Share] = []
        for share, answer in zip(shares, answers, strict=True):
            name = self._names[share.actor]
            if answer is None:
                left.append(share)
                continue
            self._check_version(answer, name)
            now = self.current
            now.used_version = min(now.used_version, int(answer.fields["used"]))  # type: ignore[arg-type]
            (part,) = _tensors(answer, 1, name)
            _expect(part, (len(share.tokens_T), x_TD.shape[1]), x_TD.dtype, name)
            add_rows(y_TD, share, part)
            self._backlog.note(name, len(share.token_P), int(answer.fields["pairs"]))  # type: ignore[arg-type]
        return self._planned_anew(left, ids_TK) if left else []

    def _check_version(self, answer: Message, name: str) -> None:
        """No answer of two versions: a router that was left out of a step must not serve any longer."""
        if not self.purpose.keep and answer.fields["version"] != self.purpose.min_version:
            raise StepAborted(
                f"{name} is at version {answer.fields['version']}, this router at {self.purpose.min_version}"
            )

    def _planned_anew(self, left: Sequence[Share], ids_TK: Tensor) -> list[Share]:
        ids_N = torch.full((ids_TK.numel(),), -1, dtype=ids_TK.dtype, device=ids_TK.device)
        for share in left:
            ids_N[share.pair_P] = ids_TK.reshape(-1)[share.pair_P]
        return self._plan(ids_N.view_as(ids_TK))[0]

    def backward(self, shares: Sequence[Share], purpose: Mapping[str, Any], grad_y_TD: Tensor) -> list[Pending | None]:
        """The sending half; `purpose`: fields of the layer's forward."""
        return [
            self._start(
                self._names[share.actor],
                Message("backward", purpose, (rows_of(grad_y_TD, share),)),
            )
            for share in shares
        ]

    def gradients(
        self, shares: Sequence[Share], pending: Sequence[Pending | None], grad_x_TD: Tensor, grad_weights_N: Tensor
    ) -> None:
        """The receiving half: adds to the gradients of the tokens [T, D], and writes those of the gate weights
        [T * K]."""
        self.while_away()
        device = grad_x_TD.device
        for share, answer in zip(shares, self._answers(pending), strict=True):
            assert answer is not None, "only serving loses an actor without an error"
            name = self._names[share.actor]
            part, grad_weight_P = _tensors(answer, 2, name)
            _expect(part, (len(share.tokens_T), grad_x_TD.shape[1]), grad_x_TD.dtype, name)
            _expect(grad_weight_P, share.pair_P.shape, grad_weights_N.dtype, name)
            add_rows(grad_x_TD, share, part)
            grad_weights_N[share.pair_P.to(device)] = grad_weight_P.to(device)

    # -- questions to all ---------------------------------------------------------------------------------------------

    def ask_all(
        self, op: str, fields: Mapping[str, Any], timeout_s: float | None = None, *, among: Sequence[str] | None = None
    ) -> dict[str, Message]:
        """The same question to every actor (that is not lost). Raises the first error, after all were asked."""
        names = [n for n in (self.links if among is None else among) if n not in self._lost]
        answers = self._answers([self._start(name, Message(op, fields)) for name in names], timeout_s)
        return {name: answer for name, answer in zip(names, answers, strict=True) if answer is not None}

    def start_each(self, op: str, fields: Mapping[str, Any]) -> list[Pending | None]:
        """The same question to every actor, without waiting. None where it could not be sent."""
        return [_try_start(link, Message(op, fields)) for link in self.links.values()]

    def tell_living(self, op: str, fields: Mapping[str, Any]) -> None:
        """Best effort to every open link, errors logged: used to clean up after a failure."""
        for link in self.links.values():
            if not link.closed:
                link.forget()
                try:
                    link.call(Message(op, fields), self._timeout_s)
                except MoeClusterError as error:
                    logger.info("%s was not told to %s: %s", link.peer, op, error)
                    if isinstance(error, PeerLost):
                        link.close()  # so that it is opened again before the next try, not found broken in it

    def close(self) -> None:
        for link in self.links.values():
            link.close()

    def _start(self, name: str, question: Message) -> Pending | None:
        """None if a dispatcher that reroutes finds the actor lost."""
        try:
            return self.links[name].start(question)
        except PeerLost:
            self.links[name].close()
            if not self._reroutes:
                raise
            self._lose(name)
            return None

    def _answers(self, pending: Sequence[Pending | None], timeout_s: float | None = None) -> list[Message | None]:
        """All answers, in order. One error spoils the lot, but the other answers are still awaited (and dropped).

        None for an actor that a dispatcher that reroutes has lost.
        """
        deadline = time.monotonic() + (timeout_s or self._timeout_s)
        answers: list[Message | None] = []
        failure: MoeClusterError | None = None
        for question in pending:
            if question is None:
                answers.append(None)
                continue
            answer = None
            try:
                answer = question.result(max(0.001, deadline - time.monotonic()))
            except PeerLost as error:
                question.link.close()
                if self._reroutes:
                    self._lose(question.link.peer)
                else:
                    failure = failure or error
            except MoeClusterError as error:
                failure = failure or error
            answers.append(answer)
        if failure is not None:
            raise failure
        return answers


def _try_start(link: Link, question: Message) -> Pending | None:
    try:
        return link.start(question)
    except LinkError as error:
        logger.warning("%s was not sent: %s", question.op, error)
        link.close()
        return None


def _tensors(answer: Message, count: int, peer: str) -> tuple[Tensor, ...]:
    if len(answer.tensors) != count:
        raise ProtocolError(f"answer with {len(answer.tensors)} tensors, need {count}", peer=peer)
    return answer.tensors


def _expect(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, peer: str) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ProtocolError(f"answer of {tuple(tensor.shape)} {tensor.dtype}, need {tuple(shape)} {dtype}", peer=peer)
