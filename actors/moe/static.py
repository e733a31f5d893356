"""Experts of one layer at shapes that do not depend on the gate's choice, so that a CUDA graph can hold them.

Every stack takes all T tokens. Where there is a kernel for grouped products with offsets on the device, pairs are
sorted there, those of experts that the stack has not come last and count nothing. Elsewhere every expert computes every
token and the gate's weights, most of them zero, sum up: few tokens cost little more that way, since reading the
experts' weights is what takes time. Nothing is waited for either way.
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
    """Weighted sums [T, D] over the parts' experts. No gradients."""
    wide = torch.promote_types(weights_TK.dtype, x_TD.dtype)
    y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    for part in parts:
        sums = _sums_of_pairs if _has_kernel(x_TD) else _sums_of_all
        y_TD += sums(part, x_TD, ids_TK, weights_TK)
    return y_TD.to(x_TD.dtype)


def _has_kernel(x_TD: Tensor) -> bool:
    """For grouped products whose offsets stay on the device."""
    is_gpu = x_TD.device.type == "cuda" and x_TD.dtype == torch.bfloat16
    return is_gpu and torch.cuda.get_device_capability(x_TD.device) >= (9, 0)


def _sums_of_all(part: StaticPart, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Every row of the stack computes every token: [R, T, ...]."""
    stack, weights, num_rows = part.stack, part.weights, len(part.range_R)
    row_TK = part.row_E[ids_TK.reshape(-1)].view_as(ids_TK)
    weights_TR = weights_TK.new_zeros(len(x_TD), num_rows + 1).scatter_add_(1, row_TK, weights_TK)[:, :num_rows]

    def project(rows: Tensor, name: str) -> Tensor:
        out = torch.matmul(rows, stack._matrices(weights[name]))
        bias = stack._bias(weights, name)
        return out if bias is None else out + bias.unsqueeze(1)

    out_RTD = project(stack._activate(project(x_TD, stack._in)), stack._out)
    return (out_RTD * weights_TR.t().unsqueeze(2)).sum(0)


def _sums_of_pairs(part: StaticPart, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
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
    stack = part.stack
    pre_NH = _project(part, stack._in, rows_ND, row_N, ends_R)
    return _project(part, stack._out, stack._activate(pre_NH), row_N, ends_R)


def _project(part: StaticPart, name: str, rows_NM: Tensor, row_N: Tensor, ends_R: Tensor) -> Tensor:
    out_N = F.grouped_mm(rows_NM, part.stack._matrices(part.weights[name]), offs=ends_R)
    bias = part.stack._bias(part.weights, name)
    if bias is not None:
        out_N = out_N + bias.index_select(0, row_N.clamp_max(len(part.range_R) - 1))
    return out_N
