"""Experts of one layer at shapes that do not depend on the gate's choice, so that a CUDA graph can hold them.

Every stack takes all T tokens. Where there is a kernel for grouped products with offsets on the device, pairs are
sorted there, those of experts that the stack has not come last and count nothing; of few tokens by kernels of ours, see
`FEW_TOKENS`. Elsewhere every expert computes every
token and the gate's weights, most of them zero, sum up: few tokens cost little more that way, since reading the
experts' weights is what takes time. Nothing is waited for either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.moe.device import DeviceExperts
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
    sums = _sums_of_few if _is_few(x_TD, weights_TK) else _sums_of_pairs if _has_kernel(x_TD) else _sums_of_all
    first, *others = (sums(part, x_TD, ids_TK, weights_TK, wide if len(parts) > 1 else x_TD.dtype) for part in parts)
    return sum(others, first).to(x_TD.dtype)


def _is_few(x_TD: Tensor, weights_TK: Tensor) -> bool:
    return _has_kernel(x_TD) and len(x_TD) <= FEW_TOKENS and kernels_for(x_TD, weights_TK) is not None


def _has_kernel(x_TD: Tensor) -> bool:
    """For grouped products whose offsets stay on the device."""
    is_gpu = x_TD.device.type == "cuda" and x_TD.dtype == torch.bfloat16
    return is_gpu and torch.cuda.get_device_capability(x_TD.device) >= (9, 0)


def _sums_of_all(part: StaticPart, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
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
    return (out_RTD * weights_RT1).masked_fill(weights_RT1 == 0, 0).sum(0).to(dtype)


def _sums_of_pairs(part: StaticPart, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """Pairs sorted by row of the stack, N = T * K."""
    num_tokens, top_k = ids_TK.shape
    row_N = part.row_E[ids_TK.reshape(-1)]
    sorted_N, order_N = torch.sort(row_N, stable=True)
    ends_R = torch.searchsorted(sorted_N, part.range_R, right=True, out_int32=True)
    rows_ND = x_TD.index_select(0, order_N // top_k)
    into, out = (part.stack._matrices(part.weights[name]) for name in (part.stack._in, part.stack._out))
    pre_NH = _with_bias(part, part.stack._in, F.grouped_mm(rows_ND, into, offs=ends_R), sorted_N)
    out_ND = F.grouped_mm(part.stack._activate(pre_NH), out, offs=ends_R)
    out_ND = _with_bias(part, part.stack._out, out_ND, sorted_N)
    weighted_ND = out_ND * weights_TK.reshape(-1).index_select(0, order_N).unsqueeze(1)
    # Rows behind the last offset were not computed: what is there may be anything.
    weighted_ND = weighted_ND.masked_fill((sorted_N == len(part.range_R)).unsqueeze(1), 0)
    sums_TD = torch.empty_like(weighted_ND).index_copy_(0, order_N, weighted_ND).view(num_tokens, top_k, -1).sum(1)
    return sums_TD.to(dtype)


def _sums_of_few(part: StaticPart, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """As `_sums_of_pairs`, in five kernels of ours."""
    from actors.moe import few_kernels as few
    from actors.moe import kernels

    stack, num_pairs = part.stack, ids_TK.numel()
    into, out = (stack._matrices(part.weights[name]) for name in (stack._in, stack._out))
    place_N, order_N, row_N, ends_R = few.places(ids_TK, part.row_E, len(part.range_R))
    pre_NH = few.few_rows_mm(x_TD, into, ends_R, num_pairs, order_N, ids_TK.shape[1])
    if isinstance(stack, DeviceExperts) and stack.is_fused:
        act_NI = kernels.gated(pre_NH, None)
    else:
        act_NI = stack._activate(_with_bias(part, stack._in, pre_NH, row_N)).contiguous()
    out_ND = _with_bias(part, stack._out, few.few_rows_mm(act_NI, out, ends_R, num_pairs, None, 0), row_N)
    return few.weighted_sums(out_ND, place_N, ends_R, weights_TK, dtype)


def _with_bias(part: StaticPart, name: str, out_N: Tensor, row_N: Tensor) -> Tensor:
    """`row_N`: of the stack, that of each pair."""
    bias = part.stack._bias(part.weights, name)
    return out_N if bias is None else out_N + bias.index_select(0, row_N.clamp_max(len(part.range_R) - 1))
