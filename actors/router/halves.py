"""A layer's experts as two nodes of the graph: tokens go out in one, sums come back in the other.

What the router computes between the halves, it computes while the tokens are away. Autograd runs ready nodes in the
reverse order of their making, so backward has the same gap: gradients go out, then comes the backward of what was
computed between the halves, then the answers are awaited.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.trunk.shared import Meanwhile, nothing

if TYPE_CHECKING:
    from actors.moe.dispatch import Share
    from actors.router.dispatcher import Dispatcher, Sent
    from actors.router.parcels import Asked


def routed(
    dispatcher: Dispatcher,
    layer: int,
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    meanwhile: Meanwhile = nothing,
) -> Tensor:
    """gate -> dispatch plan -> links -> `meanwhile` -> combine: [T, D], differentiable in tokens and weights."""
    away = _Away(dispatcher, layer)
    try:
        ticket = _Send.apply(x_TD, topk_weights_TK, topk_ids_TK, away)
        meanwhile()
    except BaseException:  # of `meanwhile`, whatever it is: activation checkpointing ends forwards by one, too
        away.drop()
        raise
    y_TD: Tensor = _Receive.apply(ticket, away)
    return y_TD


@dataclass
class _Away:
    """What both halves know of a layer. Without the tokens once they are back: the graph keeps it until backward."""

    dispatcher: Dispatcher
    layer: int
    purpose: dict[str, Any] = field(default_factory=dict)
    shares: list[Share] = field(default_factory=list)
    sent: Sent | None = None
    asked: list[Asked] = field(default_factory=list)
    """In backward."""
    grad_x_TD: Tensor | None = None

    def drop(self) -> None:
        """Nobody will ask for the answers."""
        sent, self.sent = self.sent, None
        for each in sent.asked if sent is not None else ():
            if each.pending is not None:
                each.pending.drop()


class _Send(torch.autograd.Function):
    """-> a ticket for `_Receive`: it carries no value, only the edge of the graph."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, away: _Away) -> Tensor:
        ctx.away, ctx.like = away, (weights_TK.shape, weights_TK.dtype, weights_TK.device)
        away.purpose = away.dispatcher.purpose.fields(away.layer)
        away.sent = away.dispatcher.forward(away.layer, x_TD, ids_TK, weights_TK)
        away.shares = away.sent.shares
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        away: _Away = ctx.away
        shape, dtype, device = ctx.like
        grad_x_TD, away.grad_x_TD = away.grad_x_TD, None
        asked, away.asked = away.asked, []
        assert grad_x_TD is not None, "the gradients of a layer are sent before they are awaited"
        grad_weights_TK = torch.zeros(shape, dtype=dtype, device=device)
        away.dispatcher.gradients(asked, grad_x_TD, grad_weights_TK.view(-1))
        return grad_x_TD, grad_weights_TK, None, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, away: _Away) -> Tensor:
        ctx.away = away
        ctx.save_for_backward(ticket)
        sent, away.sent = away.sent, None
        assert sent is not None
        return away.dispatcher.receive(sent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        away: _Away = ctx.away
        # Nothing is in it, but activation checkpointing runs the layer's forward again before it is here: the experts
        # must be asked for that before they are asked for gradients.
        _ = ctx.saved_tensors
        (grad_y_TD,) = grads
        away.asked = away.dispatcher.backward(away.shares, away.purpose, grad_y_TD)
        away.grad_x_TD = torch.zeros_like(grad_y_TD)
        return grad_y_TD.new_empty(0), None
