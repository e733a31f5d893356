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
from actors.moe.passes import kernels_for

FEW_TOKENS = 256
"""Up to so many, a kernel of ours reads the experts' weights once and takes the tokens' rows where they are. Both
products of 64 experts of 2048 x 1408 for 32 (128) tokens, top-6: 0.25 (0.30) ms against 0.37 (0.38) of grouped_mm."""


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
    weights_RT1 = weights_TR.t().unsqueeze(2)
    # Of an expert that nobody chose these may be beyond what the dtype has numbers for, and zero times that is NaN.
    return (out_RTD * weights_RT1).masked_fill(weights_RT1 == 0, 0).sum(0)


def _sums_of_pairs(part: StaticPart, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    num_tokens, top_k = ids_TK.shape
    row_N = part.row_E[ids_TK.reshape(-1)]
    sorted_N, order_N = torch.sort(row_N, stable=True)
    ends_R = torch.searchsorted(sorted_N, part.range_R, right=True, out_int32=True)
    out_ND = _outputs(part, x_TD, _Pairs(sorted_N, order_N, ends_R, top_k))
    weighted_ND = out_ND * weights_TK.reshape(-1).index_select(0, order_N).unsqueeze(1)
    # Rows behind the last offset were not computed: what is there may be anything.
    weighted_ND = weighted_ND.masked_fill((sorted_N == len(part.range_R)).unsqueeze(1), 0)
    return torch.empty_like(weighted_ND).index_copy_(0, order_N, weighted_ND).view(num_tokens, top_k, -1).sum(1)


@dataclass(frozen=True)
class _Pairs:
    """Of T tokens and their top k experts, N = T * k, sorted by row of the stack."""

    row_N: Tensor
    order_N: Tensor
    """Which pair of the unsorted ones each is."""
    ends_R: Tensor
    top_k: int


def _outputs(part: StaticPart, x_TD: Tensor, pairs: _Pairs) -> Tensor:
    """Of each pair [N, D], not weighted."""
    stack, x_TD = part.stack, x_TD.contiguous()
    matrices = [stack._matrices(part.weights[name]) for name in (stack._in, stack._out)]
    if len(x_TD) <= FEW_TOKENS and (kernels := kernels_for(x_TD)) is not None:
        ends_R, top_k, num_pairs = pairs.ends_R, pairs.top_k, len(pairs.row_N)
        pre_NH = kernels.few_rows_mm(x_TD, matrices[0], ends_R, num_pairs, pairs.order_N, top_k)
        act_NI = stack._activate(_with_bias(part, stack._in, pre_NH, pairs)).contiguous()
        out_ND = kernels.few_rows_mm(act_NI, matrices[1], ends_R, num_pairs, None, 0)
    else:
        rows_ND = x_TD.index_select(0, pairs.order_N // pairs.top_k)
        pre_NH = F.grouped_mm(rows_ND, matrices[0], offs=pairs.ends_R)
        act_NI = stack._activate(_with_bias(part, stack._in, pre_NH, pairs))
        out_ND = F.grouped_mm(act_NI, matrices[1], offs=pairs.ends_R)
    return _with_bias(part, stack._out, out_ND, pairs)


def _with_bias(part: StaticPart, name: str, out_N: Tensor, pairs: _Pairs) -> Tensor:
    bias = part.stack._bias(part.weights, name)
    return out_N if bias is None else out_N + bias.index_select(0, pairs.row_N.clamp_max(len(part.range_R) - 1))
