"""Experts of one layer at shapes that do not depend on the gate's choice, so that a CUDA graph can hold them.

Every stack takes all T tokens; pairs of experts that it has not come last and count nothing. Sorting, counting and
offsets are done on the device, and nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.moe.experts import ExpertStack, Weights


@dataclass(frozen=True)
class StaticPart:
    """A stack's part of a layer."""

    stack: ExpertStack
    weights: Weights
    row_E: Tensor
    """int64 [experts of the layer + 1], on the device: row of each expert in the stack; the number of rows for those
    that it has not, and behind all of them, for expert -1."""
    range_R: Tensor
    """0, 1, ... of the R rows."""

    @staticmethod
    def of(stack: ExpertStack, rows: Mapping[int, int], num_experts: int) -> StaticPart:
        """`rows[e]`: row of expert e."""
        weights, num_rows = stack.weights, stack.num_experts
        device = next(iter(weights.values())).device
        row_E = [rows.get(expert, num_rows) for expert in range(num_experts)]
        return StaticPart(
            stack, weights, torch.tensor([*row_E, num_rows], device=device), torch.arange(num_rows, device=device)
        )


def static_experts(parts: Sequence[StaticPart], x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sums [T, D] over the parts' experts, as `ExpertStack.forward` rounds them. No gradients."""
    wide = torch.promote_types(weights_TK.dtype, x_TD.dtype)
    y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    for part in parts:
        y_TD += _weighted_sums(part, x_TD, ids_TK, weights_TK).to(wide)
    return y_TD.to(x_TD.dtype)


def _weighted_sums(part: StaticPart, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    num_tokens, top_k = ids_TK.shape
    row_N = part.row_E[ids_TK.reshape(-1)]
    sorted_N, order_N = torch.sort(row_N, stable=True)
    ends_R = torch.searchsorted(sorted_N, part.range_R, right=True, out_int32=True)
    out_ND = _outputs(part, x_TD.index_select(0, order_N // top_k), sorted_N, ends_R)
    weighted_ND = out_ND * weights_TK.reshape(-1).index_select(0, order_N).unsqueeze(1)
    # Rows behind the last offset were not computed: what is there may be anything.
    weighted_ND = weighted_ND.masked_fill((sorted_N == len(part.range_R)).unsqueeze(1), 0)
    return torch.empty_like(weighted_ND).index_copy_(0, order_N, weighted_ND).view(num_tokens, top_k, -1).sum(1)


def _outputs(part: StaticPart, rows_ND: Tensor, row_N: Tensor, ends_R: Tensor) -> Tensor:
    """Of each pair [N, D], not weighted."""
    stack, weights = part.stack, part.weights
    pre_NH = _project(part, stack._in, rows_ND, row_N, ends_R)
    act_NI = stack._activate(pre_NH)
    assert set(weights) <= {stack._in, stack._out, f"{stack._in}_bias", f"{stack._out}_bias"}
    return _project(part, stack._out, act_NI, row_N, ends_R)


def _project(part: StaticPart, name: str, rows_NM: Tensor, row_N: Tensor, ends_R: Tensor) -> Tensor:
    out_N = F.grouped_mm(rows_NM, part.stack._matrices(part.weights[name]), offs=ends_R)
    bias = part.stack._bias(part.weights, name)
    if bias is not None:
        out_N = out_N + bias.index_select(0, row_N.clamp_max(len(part.range_R) - 1))
    return out_N
