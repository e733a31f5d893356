"""The passes over rows between grouped products: permutation, activation with the gate weight in it, and the sum over a
token's experts; each forward and backward.

With w the gate weight of a pair, w * (act @ W) = (w * act) @ W: in one pass with the activation the weighting costs
nothing, and backward gets the gradient of the weights W without another pass over the output's gradient.

On a GPU with Triton each is one kernel (`actors.moe.kernels`): as fast as what torch.compile makes of the activation,
and in backward, with the sum over a row in it, 1.7 times as fast (0.48 against 0.81 ms for 98,304 pairs of width 1408
on an H100). Elsewhere plain torch, with the same numbers but for the last digits. Nothing here makes the host wait.

    P pairs of a token and an expert, sorted by expert   T tokens   D model width   I inner width   H = 2 I
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)


@cache
def _kernels() -> ModuleType | None:
    try:
        from actors.moe import kernels
    except ImportError:  # a build of torch without Triton
        return None
    try:
        into_TD = torch.zeros(1, 16, device="cuda")
        kernels.add_at(into_TD, torch.zeros(1, dtype=torch.int64, device="cuda"), into_TD)
    except Exception:  # it needs a compiler for C, and the host may lack it: whatever is wrong, there is another way
        logger.warning("Triton does not work here; the passes between grouped products are plain torch", exc_info=True)
        return None
    return kernels


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """`actors.moe.kernels`, where it is and knows what to do with these tensors; else None."""
    if any(tensor.device.type != "cuda" for tensor in tensors) or (kernels := _kernels()) is None:
        return None
    fits = all(t.is_contiguous() and (t.dtype in kernels.DTYPES or not t.is_floating_point()) for t in tensors)
    return kernels if fits else None


def gather_rows(x_TD: Tensor, token_P: Tensor) -> Tensor:
    """x[token of p]: [P, D]."""
    if kernels := kernels_for(x_TD, token_P):
        return kernels.gather_rows(x_TD, token_P)  # type: ignore[no-any-return]
    return x_TD.index_select(0, token_P)


def order_by_token(token_P: Tensor) -> tuple[Tensor, Tensor]:
    """-> tokens in ascending order [P], and the pairs in that order [P]: what `add_sums` goes by."""
    sorted_P, order_P = token_P.sort(stable=True)
    return sorted_P, order_P


def add_sums(
    into_TD: Tensor,
    rows_PD: Tensor,
    token_P: Tensor,
    by_token: tuple[Tensor, Tensor],
    weight_P: Tensor | None = None,
) -> None:
    """into[t] += sum over the pairs p of t of weight[p] * rows[p], in place; without `weight_P`, of the rows.

    `by_token`: of `order_by_token`. In the order of the pairs, so equal arguments give equal bits, which atomic sums on
    a GPU do not.
    """
    if kernels := kernels_for(into_TD, rows_PD, token_P, *(() if weight_P is None else (weight_P,))):
        sorted_P, order_P = by_token
        tokens_T = torch.arange(len(into_TD), dtype=sorted_P.dtype, device=sorted_P.device)
        ends_T = torch.searchsorted(sorted_P, tokens_T, right=True, out_int32=True)
        kernels.add_sums(into_TD, rows_PD, order_P, ends_T, weight_P)
        return
    rows_PD = rows_PD if weight_P is None else rows_PD * weight_P.unsqueeze(1)
    into_TD.index_add_(0, token_P, rows_PD.to(into_TD.dtype))


def gated(pre_PH: Tensor, weight_P: Tensor) -> Tensor:
    """weight[p] * silu(gate[p]) * up[p] with (gate, up) the halves of a row: [P, I]."""
    if kernels := kernels_for(pre_PH, weight_P):
        return kernels.gated(pre_PH, weight_P)  # type: ignore[no-any-return]
    gate_PI, up_PI = pre_PH.chunk(2, dim=1)
    return (F.silu(gate_PI) * up_PI * weight_P.unsqueeze(1)).to(pre_PH.dtype)


def gated_backward_(pre_PH: Tensor, grad_PI: Tensor, weight_P: Tensor) -> Tensor:
    """Of `gated`, where `grad_PI` is the gradient of its result. -> gradient of the weights [P]; that of `pre_PH` takes
    its place there."""
    if kernels := kernels_for(pre_PH, grad_PI, weight_P):
        return kernels.gated_backward_(pre_PH, grad_PI, weight_P)  # type: ignore[no-any-return]
    wide = torch.promote_types(weight_P.dtype, pre_PH.dtype)
    gate_PI, up_PI = (half.to(wide) for half in pre_PH.chunk(2, dim=1))
    part_PI = torch.sigmoid(gate_PI)
    silu_PI = gate_PI * part_PI
    grad_weight_P = (grad_PI * silu_PI * up_PI).sum(1).to(weight_P.dtype)
    given_PI = grad_PI * weight_P.unsqueeze(1).to(wide)
    grad_gate_PI = given_PI * up_PI * part_PI * (1 + gate_PI * (1 - part_PI))
    pre_PH.copy_(torch.cat((grad_gate_PI, given_PI * silu_PI), 1))
    return grad_weight_P


def add_at(into_TD: Tensor, index_R: Tensor, rows_RD: Tensor) -> None:
    """into[index[r]] += rows[r], in place. Indices ascend, so that as many as there are rows are all of them."""
    if len(index_R) == len(into_TD):
        into_TD.add_(rows_RD)
    elif kernels := kernels_for(into_TD, index_R, rows_RD):
        kernels.add_at(into_TD, index_R, rows_RD)
    else:
        into_TD.index_add_(0, index_R, rows_RD)
