"""The router's side of its links: a layer's tokens go out, weighted sums come back, and the same for gradients.

One dispatcher serves one thread at a time. Questions go to all actors first, then answers are awaited, so actors work
together; in between the router has time for something else (`actors.router.halves`, `actors.router.flight`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.errors import NonFinite, ProtocolError, StepAborted
from actors.moe.dispatch import HolderTable, Share
from actors.moe.fp8 import Payload, packed
from actors.router.backlog import Backlog
from actors.router.halves import routed
from actors.router.links import Links
from actors.router.passes import Pass, Purpose
from actors.router.rows import add_rows, load_where, plan_where, rows_of
from actors.transport.contract import Pending
from actors.transport.message import Message
from actors.trunk.shared import Meanwhile, nothing

if TYPE_CHECKING:
    from actors.trunk.model import RemoteExperts


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
        self.links = Links(timeout_s=timeout_s, reroutes=reroutes)
        self.links.on_lost = self._build_table
        self.epoch = 0
        self._held: dict[str, list[int]] = {}
        self._turn, self.payload = turn, payload
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

    def use(self, epoch: int, held: Mapping[str, list[int]], num_experts: int) -> None:
        """`held[name]`: expert numbers of each actor, in its local order; `num_experts` of every layer."""
        self.epoch, self._held = epoch, dict(held)
        if num_experts != self._num_experts:
            self._num_experts = num_experts
            self.load_LE = torch.zeros(len(self.load_LE), num_experts, dtype=torch.int64)
        self.links.find_all()
        self._build_table()

    def reopen(self) -> list[str]:
        """Opens closed links again. -> actors that are gone for good; none if this one reroutes around them."""
        # Those that are lost are tried as long as nobody can stand in for them.
        return self.links.reopen(everybody=bool(self._table.missing))

    @property
    def num_experts(self) -> int:
        """Of every layer."""
        return self._num_experts

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
        self._names, lost = list(self.links), self.links.lost
        held = [[] if n in lost else self._held.get(n, []) for n in self._names]
        self._table = HolderTable.of(held, self._num_experts, [self.links.is_near(n) for n in self._names])
        self._backlog.refresh(self._names)

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
            pending.append(self.links.start(self._names[share.actor], question))
        return pending

    def _take(
        self,
        shares: Sequence[Share],
        pending: Sequence[Pending | None],
        x_TD: Tensor,
        ids_TK: Tensor,
        y_TD: Tensor,
    ) -> list[Share]:
        answers = self.links.answers(pending)
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
            self.links.start(
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
        for share, answer in zip(shares, self.links.answers(pending), strict=True):
            assert answer is not None, "only serving loses an actor without an error"
            name = self._names[share.actor]
            part, grad_weight_P = _tensors(answer, 2, name)
            _expect(part, (len(share.tokens_T), grad_x_TD.shape[1]), grad_x_TD.dtype, name)
            _expect(grad_weight_P, share.pair_P.shape, grad_weights_N.dtype, name)
            add_rows(grad_x_TD, share, part)
            grad_weights_N[share.pair_P.to(device)] = grad_weight_P.to(device)


def _tensors(answer: Message, count: int, peer: str) -> tuple[Tensor, ...]:
    if len(answer.tensors) != count:
        raise ProtocolError(f"answer with {len(answer.tensors)} tensors, need {count}", peer=peer)
    return answer.tensors


def _expect(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, peer: str) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ProtocolError(f"answer of {tuple(tensor.shape)} {tensor.dtype}, need {tuple(shape)} {dtype}", peer=peer)
