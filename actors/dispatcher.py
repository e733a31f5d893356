"""The router's side of its links: a layer's tokens go out, weighted sums come back, and the same for gradients.

One dispatcher serves one thread. Questions go to all actors first, then answers are awaited, so actors work together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.errors import LinkError, MoeClusterError, NonFinite, PeerLost, ProtocolError
from actors.moe.balance import expert_load
from actors.moe.dispatch import OwnerTable, Share, plan
from actors.moe.gating import GatePast
from actors.transport.contract import Link, Pending
from actors.transport.message import Message

logger = logging.getLogger(__name__)

LinkOpener = Callable[[], Link]


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

    @property
    def keep(self) -> bool:
        return self.step > 0

    def fields(self, layer: int) -> dict[str, Any]:
        return {
            "layer": layer,
            "keep": self.keep,
            "step": self.step,
            "attempt": self.attempt,
            "microbatch": self.microbatch,
            "min_version": self.min_version,
        }


class Dispatcher:
    """`openers[a]` opens a link to actor a of `owners`. Closed links are opened again by `reopen`."""

    def __init__(self, openers: Sequence[LinkOpener], owners: OwnerTable, *, num_layers: int, timeout_s: float) -> None:
        self._openers = list(openers)
        self.links: list[Link] = [opener() for opener in self._openers]
        self.owners = owners
        """Changes only between forwards."""
        self._timeout_s = timeout_s
        self.purpose = Purpose()
        self.load_LE = torch.zeros(num_layers, len(owners.actor_E), dtype=torch.int64)
        """Pairs routed to each expert since the caller last zeroed it; training forwards only."""

    def layer_function(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """What the experts module of this layer calls instead of computing: differentiable in tokens and weights."""

        def remote(x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
            result: Tensor = _RoutedExperts.apply(x_TD, topk_weights_TK, topk_ids_TK, layer, self)
            return result

        return remote

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, list[Share]]:
        purpose = self.purpose
        if not torch.isfinite(weights_TK).all():
            raise NonFinite(f"gate scores of layer {layer} are not finite", step=purpose.step)
        ids_TK = ids_TK.cpu()
        shares = plan(ids_TK, self.owners)
        fields = purpose.fields(layer)
        if purpose.keep:
            self.load_LE[layer] += expert_load(ids_TK, self.load_LE.shape[1])
        weights_N = weights_TK.reshape(-1)
        pending = []
        for share in shares:
            rows = x_TD.index_select(0, share.tokens_T.to(x_TD.device))
            weight_P = weights_N.index_select(0, share.pair_P.to(x_TD.device))
            question = Message("forward", {**fields, "counts_E": share.counts_E}, (rows, share.token_P, weight_P))
            pending.append(self.links[share.actor].start(question))
        y_TD = torch.zeros_like(x_TD)
        for share, answer in zip(shares, self._answers(pending), strict=True):
            (part,) = _tensors(answer, 1, self.links[share.actor])
            _expect(part, (len(share.tokens_T), x_TD.shape[1]), x_TD.dtype, self.links[share.actor])
            y_TD.index_add_(0, share.tokens_T.to(x_TD.device), part.to(x_TD.device))
        return y_TD, shares

    def backward(
        self, layer: int, shares: Sequence[Share], purpose: Mapping[str, Any], grad_y_TD: Tensor, like_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> gradient of the tokens [T, D] and of the gate weights [T, K]."""
        device = grad_y_TD.device
        pending = [
            self.links[s.actor].start(Message("backward", purpose, (grad_y_TD.index_select(0, s.tokens_T.to(device)),)))
            for s in shares
        ]
        grad_x_TD = torch.zeros_like(grad_y_TD)
        grad_weights_N = torch.zeros_like(like_TK).reshape(-1)
        for share, answer in zip(shares, self._answers(pending), strict=True):
            link = self.links[share.actor]
            part, grad_weight_P = _tensors(answer, 2, link)
            _expect(part, (len(share.tokens_T), grad_y_TD.shape[1]), grad_y_TD.dtype, link)
            _expect(grad_weight_P, share.pair_P.shape, like_TK.dtype, link)
            grad_x_TD.index_add_(0, share.tokens_T.to(device), part.to(device))
            grad_weights_N[share.pair_P.to(device)] = grad_weight_P.to(device)
        return grad_x_TD, grad_weights_N.view_as(like_TK)

    def ask_all(self, op: str, fields: Mapping[str, Any], timeout_s: float | None = None) -> list[Message]:
        """The same question to every actor; answers in actor order. Raises the first error, after all were asked."""
        return self._answers([link.start(Message(op, fields)) for link in self.links], timeout_s)

    def start_each(self, op: str, fields: Mapping[str, Any]) -> list[Pending | None]:
        """The same question to every actor, without waiting. None where it could not be sent."""
        return [_try_start(link, Message(op, fields)) for link in self.links]

    def tell_living(self, op: str, fields: Mapping[str, Any]) -> None:
        """Best effort to every open link, errors logged: used to clean up after a failure."""
        for link in self.links:
            if not link.closed:
                link.forget()
                try:
                    link.call(Message(op, fields), self._timeout_s)
                except MoeClusterError as error:
                    logger.info("%s was not told to %s: %s", link.peer, op, error)

    def reopen(self) -> None:
        """Opens closed links again. Raises `PeerLost` when an actor is gone for good."""
        for number, link in enumerate(self.links):
            if link.closed:
                self.links[number] = self._openers[number]()

    def close(self) -> None:
        for link in self.links:
            link.close()

    def _answers(self, pending: Sequence[Pending], timeout_s: float | None = None) -> list[Message]:
        """All answers, in order. One error spoils the lot, but the other answers are still awaited (and dropped)."""
        deadline = time.monotonic() + (timeout_s or self._timeout_s)
        answers: list[Message] = []
        failure: MoeClusterError | None = None
        for question in pending:
            try:
                answers.append(question.result(max(0.001, deadline - time.monotonic())))
            except MoeClusterError as error:
                if isinstance(error, PeerLost):
                    question.link.close()
                failure = failure or error
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


class _RoutedExperts(torch.autograd.Function):
    """gate -> dispatch plan -> links -> combine, as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, layer: int, dispatcher: Dispatcher
    ) -> Tensor:
        ctx.dispatcher, ctx.layer = dispatcher, layer
        ctx.purpose = dispatcher.purpose.fields(layer)
        ctx.save_for_backward(weights_TK)
        y_TD, ctx.shares = dispatcher.forward(layer, x_TD, ids_TK, weights_TK)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weights_TK,) = ctx.saved_tensors
        grad_x_TD, grad_weights_TK = ctx.dispatcher.backward(ctx.layer, ctx.shares, ctx.purpose, grads[0], weights_TK)
        return grad_x_TD, grad_weights_TK, None, None, None


def _tensors(answer: Message, count: int, link: Link) -> tuple[Tensor, ...]:
    if len(answer.tensors) != count:
        raise ProtocolError(f"answer with {len(answer.tensors)} tensors, need {count}", peer=link.peer)
    return answer.tensors


def _expect(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, link: Link) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ProtocolError(
            f"answer of {tuple(tensor.shape)} {tensor.dtype}, need {tuple(shape)} {dtype}", peer=link.peer
        )
