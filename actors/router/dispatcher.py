"""The router's side of its links: a layer's tokens go out, weighted sums come back, and the same for gradients.

One dispatcher serves one thread at a time. Questions go to all actors first, then answers are awaited, so actors work
together; in between the router has time for something else (`actors.router.halves`, `actors.router.flight`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.errors import NonFinite, PeerLost, ProtocolError, StepAborted
from actors.moe.dispatch import HolderTable, Share
from actors.moe.fp8 import Payload
from actors.router.backlog import Backlog
from actors.router.halves import routed
from actors.router.links import Links
from actors.router.parcels import Asked, Parcel
from actors.router.passes import Pass, Purpose
from actors.router.rows import add_rows, load_where, plan_where
from actors.transport.message import Message
from actors.trunk.shared import Meanwhile, nothing

if TYPE_CHECKING:
    from actors.trunk.model import RemoteExperts


@dataclass
class Sent:
    """Tokens of a layer that are with the actors."""

    layer: int
    shares: list[Share]
    asked: list[Asked]
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
        self._in_step: dict[str, int] = {}
        """Step of the last training answer that came over an actor's own link."""
        self._to_come: list[tuple[str, Event, torch.device]] = []
        """Actors whose tensors a device may still be waiting for, what tells that they will not come, the device."""
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
        self._in_step.clear()
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
        self._to_come.clear()
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
        self._check_whole()  # the plan has waited for all that was before it
        if not finite:
            raise NonFinite(f"gate scores of layer {layer} are not finite", step=now.purpose.step)
        if now.purpose.keep and layer not in now.counted:
            now.counted.add(layer)
            self.load_LE[layer] += load_where(ids_TK, shares, self._table)
        self._backlog.visit()
        weights_N = weights_TK.reshape(-1)
        return Sent(layer, shares, self._ask(layer, shares, x_TD, weights_N), x_TD, ids_TK, weights_N)

    def finish(self) -> None:
        """After the last layer, before what came of it is used. `PeerLost` where it is of tensors that never came: the
        wait for an actor that dies, or is cut off, ends on the device with whatever is in the memory."""
        for device in {device for _, _, device in self._to_come}:
            torch.cuda.current_stream(device).synchronize()
        self._check_whole()

    def _check_whole(self) -> None:
        came, self._to_come = self._to_come, []
        for name, over, _ in came:
            if over.is_set():
                self.links.close_some([name])  # so that it is opened again, or known to be gone, before the next try
                raise PeerLost("it ended before its answer was here", peer=name)

    def receive(self, sent: Sent) -> Tensor:
        """The weighted sums [T, D]."""
        self.while_away()
        y_TD = torch.zeros_like(sent.x_TD)
        todo = self._take(sent.asked, sent.x_TD, sent.ids_TK, y_TD)
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
        return self._take(self._ask(layer, shares, x_TD, weights_N), x_TD, ids_TK, y_TD)

    def _parcels(self, shares: Sequence[Share], like_TD: Tensor) -> list[Parcel]:
        row_bytes = like_TD.shape[1] * like_TD.element_size()
        return self.links.relays.parcels(self._names, shares, row_bytes, self.links.unreachable, self._may_relay)

    def _may_relay(self, name: str) -> bool:
        """A step's first tokens go over the actor's own link, behind the last commit, which nobody has waited for: what
        came over a relay could overtake it."""
        return not self.purpose.keep or self._in_step.get(name) == self.purpose.step

    def _ask(self, layer: int, shares: Sequence[Share], x_TD: Tensor, weights_N: Tensor) -> list[Asked]:
        fields = {**self.purpose.fields(layer), "epoch": self.epoch}
        asked = []
        for parcel in self._parcels(shares, x_TD):
            question = parcel.forward(fields, x_TD, weights_N, self.payload)
            asked.append(Asked(parcel, self.links.start_parcel(parcel, question)))
        return asked

    def _take(self, asked: Sequence[Asked], x_TD: Tensor, ids_TK: Tensor, y_TD: Tensor) -> list[Share]:
        answers = self.links.answers([each.pending for each in asked])
        left: list[Share] = []
        for each, answer in zip(asked, answers, strict=True):
            parcel = each.parcel
            if answer is None or each.pending is None:
                left += parcel.shares
                continue
            if (over := each.pending.link.over) is not None:
                self._to_come.append((each.pending.link.peer, over, x_TD.device))
            (part,) = _tensors(answer, 1, parcel.names)
            _expect(part, (len(parcel.tokens_T), x_TD.shape[1]), x_TD.dtype, parcel.names)
            for name, share, told in zip(parcel.names, parcel.shares, parcel.told(answer), strict=True):
                self._note(name, share, told)
            if not parcel.is_shared:
                self._in_step[parcel.names[0]] = self.purpose.step
            add_rows(y_TD, parcel.tokens_T, part)
        return self._planned_anew(left, ids_TK) if left else []

    def _note(self, name: str, share: Share, told: Mapping[str, Any]) -> None:
        """What an actor says of its part. No answer of two versions: a router that was left out of a step must not
        serve any longer."""
        now = self.current
        if not self.purpose.keep and told["version"] != self.purpose.min_version:
            raise StepAborted(f"{name} is at version {told['version']}, this router at {self.purpose.min_version}")
        now.used_version = min(now.used_version, int(told["used"]))
        self._backlog.note(name, len(share.token_P), int(told["pairs"]))

    def _planned_anew(self, left: Sequence[Share], ids_TK: Tensor) -> list[Share]:
        ids_N = torch.full((ids_TK.numel(),), -1, dtype=ids_TK.dtype, device=ids_TK.device)
        for share in left:
            ids_N[share.pair_P] = ids_TK.reshape(-1)[share.pair_P]
        return self._plan(ids_N.view_as(ids_TK))[0]

    def backward(self, shares: Sequence[Share], purpose: Mapping[str, Any], grad_y_TD: Tensor) -> list[Asked]:
        """The sending half; `purpose`: fields of the layer's forward."""
        return [
            Asked(parcel, self.links.start_parcel(parcel, parcel.backward(purpose, grad_y_TD)))
            for parcel in self._parcels(shares, grad_y_TD)
        ]

    def gradients(self, asked: Sequence[Asked], grad_x_TD: Tensor, grad_weights_N: Tensor) -> None:
        """The receiving half: adds to the gradients of the tokens [T, D], and writes those of the gate weights
        [T * K]."""
        self.while_away()
        device = grad_x_TD.device
        answers = self.links.answers([each.pending for each in asked])
        for parcel, answer in zip((each.parcel for each in asked), answers, strict=True):
            assert answer is not None, "only serving loses an actor without an error"
            part, grad_weight_P = _tensors(answer, 2, parcel.names)
            pairs = [len(share.pair_P) for share in parcel.shares]
            _expect(part, (len(parcel.tokens_T), grad_x_TD.shape[1]), grad_x_TD.dtype, parcel.names)
            _expect(grad_weight_P, (sum(pairs),), grad_weights_N.dtype, parcel.names)
            add_rows(grad_x_TD, parcel.tokens_T, part)
            for share, own_P in zip(parcel.shares, grad_weight_P.to(device).split(pairs), strict=True):
                grad_weights_N[share.pair_P.to(device)] = own_P


def _tensors(answer: Message, count: int, peers: Sequence[str]) -> tuple[Tensor, ...]:
    if len(answer.tensors) != count:
        raise ProtocolError(f"answer with {len(answer.tensors)} tensors, need {count}", peer=", ".join(peers))
    return answer.tensors


def _expect(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, peers: Sequence[str]) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        found, need = f"{tuple(tensor.shape)} {tensor.dtype}", f"{tuple(shape)} {dtype}"
        raise ProtocolError(f"answer of {found}, need {need}", peer=", ".join(peers))
