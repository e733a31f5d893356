"""Triton kernels of the passes between grouped products. Imported only where Triton is and tensors are on a GPU; the
same in plain torch, and what each computes, is in `actors.moe.passes`.

All read and write each element once and compute in float32. Rows are counted in 64 bits: a layer's activations have
more than 2^31 bytes.

    P pairs   T tokens   D model width   I inner width
"""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BLOCKS = (1024, 512, 256, 128)
_MAX_IDLE = 0.1
"""Part of a block's lanes that may be beyond the end of a row."""


Launch = TypeVar("Launch", bound=Callable[..., object])


def _there(launch: Launch) -> Launch:
    """Triton launches on the device that is current, which need not be the one that the first tensor is on."""

    @wraps(launch)
    def run(first: Tensor, *rest: object) -> object:
        with torch.cuda.device_of(first):
            return launch(first, *rest)

    return cast(Launch, run)


def _block(width: int) -> int:
    """The largest block that divides a row without much waste."""
    for block in _BLOCKS:
        if triton.cdiv(width, block) * block <= (1 + _MAX_IDLE) * width:
            return block
    return _BLOCKS[-1]


def _warps(block: int) -> int:
    """So that a thread has 8 elements: 16 bytes of bfloat16."""
    return max(1, block // 256)


@triton.jit
def _gather(x, token, out, num_tokens, D: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token + pair).to(tl.int64)
    inside = column < D
    known = (row >= 0) & (row < num_tokens)
    value = tl.load(x + row * D + column, mask=inside & known, other=0.0)
    tl.store(out + pair * D + column, value, mask=inside)


@_there
def gather_rows(x_TD: Tensor, token_P: Tensor) -> Tensor:
    """A token that is not there gives zeros: no index leads out of the tensor."""
    num_tokens, width = x_TD.shape
    out_PD = x_TD.new_empty(len(token_P), width)
    block = _block(width)
    if out_PD.numel():
        grid = (len(token_P), triton.cdiv(width, block))
        _gather[grid](x_TD, token_P, out_PD, num_tokens, D=width, BLOCK=block, num_warps=_warps(block))
    return out_PD


@triton.jit
def _sum(into, rows, order, ends, weight, D: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    first = tl.load(ends + token - 1, mask=token > 0, other=0)
    last = tl.load(ends + token)
    total = tl.load(into + token * D + column, mask=inside, other=0.0).to(tl.float32)
    for number in range(first, last):
        pair = tl.load(order + number).to(tl.int64)
        value = tl.load(rows + pair * D + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value = value * tl.load(weight + pair).to(tl.float32)
        total += value
    tl.store(into + token * D + column, total, mask=inside)


@_there
def add_sums(into_TD: Tensor, rows_PD: Tensor, order_P: Tensor, ends_T: Tensor, weight_P: Tensor | None) -> None:
    num_tokens, width = into_TD.shape
    block = _block(width)
    if into_TD.numel():
        weight = rows_PD if weight_P is None else weight_P  # which is not read then
        grid = (num_tokens, triton.cdiv(width, block))
        is_weighted = weight_P is not None
        _sum[grid](
            into_TD,
            rows_PD,
            order_P,
            ends_T,
            weight,
            D=width,
            WEIGHTED=is_weighted,
            BLOCK=block,
            num_warps=_warps(block),
        )


@triton.jit
def _gate(pre, weight, act, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    w = tl.load(weight + pair).to(tl.float32)
    gate = tl.load(pre + pair * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pre + pair * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(act + pair * WIDTH + column, w * gate * tl.sigmoid(gate) * up, mask=inside)


@_there
def gated(pre_PH: Tensor, weight_P: Tensor) -> Tensor:
    num_pairs, width = len(pre_PH), pre_PH.shape[1] // 2
    act_PI = pre_PH.new_empty(num_pairs, width)
    block = _block(width)
    if act_PI.numel():
        grid = (num_pairs, triton.cdiv(width, block))
        _gate[grid](pre_PH, weight_P, act_PI, WIDTH=width, BLOCK=block, num_warps=_warps(block))
    return act_PI


@triton.jit
def _gate_backward(pre, grad, weight, grad_weight, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + pair).to(tl.float32)
    products = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        gate = tl.load(pre + pair * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(pre + pair * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(grad + pair * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        part = tl.sigmoid(gate)
        silu = gate * part
        products += given * silu * up
        given = given * w
        tl.store(pre + pair * 2 * WIDTH + column, given * up * part * (1.0 + gate * (1.0 - part)), mask=inside)
        tl.store(pre + pair * 2 * WIDTH + WIDTH + column, given * silu, mask=inside)
    tl.store(grad_weight + pair, tl.sum(products, axis=0))


@_there
def gated_backward_(pre_PH: Tensor, grad_PI: Tensor, weight_P: Tensor) -> Tensor:
    num_pairs, width = len(pre_PH), pre_PH.shape[1] // 2
    grad_weight_P = weight_P.new_empty(num_pairs)
    block = _block(width)
    if pre_PH.numel():
        _gate_backward[(num_pairs,)](
            pre_PH, grad_PI, weight_P, grad_weight_P, WIDTH=width, BLOCK=block, num_warps=_warps(block)
        )
    return grad_weight_P


@triton.jit
def _few_rows(
    rows,
    index,
    weight,
    ends,
    out,
    stride_e,
    stride_n,
    stride_k,
    K: tl.constexpr,
    N: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert = tl.program_id(1)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_M):
        pair = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = pair < last
        row = pair
        if PER_ROW > 0:
            row = tl.load(index + pair, mask=inside, other=0).to(tl.int64) // PER_ROW
        k = tl.arange(0, BLOCK_K)
        a = rows + row[:, None] * K + k[None, :]
        b = weight + expert.to(tl.int64) * stride_e + n[None, :] * stride_n + k[:, None] * stride_k
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for at in range(0, K, BLOCK_K):
            there = at + k < K
            left = tl.load(a, mask=inside[:, None] & there[None, :], other=0.0)
            right = tl.load(b, mask=(n < N)[None, :] & there[:, None], other=0.0)
            total = tl.dot(left, right, total)
            a += BLOCK_K
            b += BLOCK_K * stride_k
        place = out + pair[:, None] * N + n[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@_there
def few_rows_mm(
    rows_RK: Tensor, matrices_EKN: Tensor, ends_E: Tensor, num_pairs: int, order_P: Tensor | None, per_row: int
) -> Tensor:
    """Grouped product of so few rows an expert that reading the matrices is what takes time: [P, N], pairs sorted by
    expert, `ends_E` int32. Pair p is row `order_P[p] // per_row`; without `order_P`, row p. Pairs behind the last end
    are not computed."""
    num_experts, width, num_out = matrices_EKN.shape
    out_PN = rows_RK.new_empty(num_pairs, num_out)
    grid = (triton.cdiv(num_out, 64), num_experts)
    _few_rows[grid](
        rows_RK,
        ends_E if order_P is None else order_P,  # which is not read then
        matrices_EKN,
        ends_E,
        out_PN,
        matrices_EKN.stride(0),
        matrices_EKN.stride(2),
        matrices_EKN.stride(1),
        K=width,
        N=num_out,
        PER_ROW=0 if order_P is None else per_row,
        BLOCK_M=16,
        BLOCK_N=64,
        BLOCK_K=128,
        num_warps=4,
        num_stages=4,
    )
    return out_PN


@triton.jit
def _add_at(into, index, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    row = tl.load(index + number).to(tl.int64)
    total = tl.load(into + row * D + column, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(rows + number * D + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(into + row * D + column, total, mask=inside)


@_there
def add_at(into_TD: Tensor, index_R: Tensor, rows_RD: Tensor) -> None:
    width = into_TD.shape[1]
    block = _block(width)
    if rows_RD.numel():
        grid = (len(index_R), triton.cdiv(width, block))
        _add_at[grid](into_TD, index_R, rows_RD, D=width, BLOCK=block, num_warps=_warps(block))


@triton.jit
def _pack(rows, out, scales, LARGEST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(rows + row * D + column, mask=column < D, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(value))
    scale = tl.div_rn(tl.max(most, axis=0), LARGEST)
    scale = tl.where(scale == 0, 1.0, scale)
    tl.store(scales + row, scale)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(rows + row * D + column, mask=column < D, other=0.0).to(tl.float32)
        value = tl.div_rn(value, scale)  # to the bit as on a CPU: a plain quotient is off by two digits
        inside = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
        value = tl.where(value == value, inside, value)  # what is not a number stays so
        tl.store(out + row * D + column, value.to(tl.float8e4nv), mask=column < D)


@_there
def pack(rows_RD: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    num_rows, width = rows_RD.shape
    out_RD = torch.empty(rows_RD.shape, dtype=torch.float8_e4m3fn, device=rows_RD.device)
    scale_R = torch.empty(num_rows, dtype=torch.float32, device=rows_RD.device)
    block = _block(width)
    if out_RD.numel():
        _pack[(num_rows,)](rows_RD, out_RD, scale_R, LARGEST=largest, D=width, BLOCK=block, num_warps=_warps(block))
    return out_RD, scale_R


@triton.jit
def _unpack(rows, scales, out, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(rows + row * D + column, mask=column < D, other=0.0).to(tl.float32) * tl.load(scales + row)
    tl.store(out + row * D + column, value, mask=column < D)


@_there
def unpack(rows_RD: Tensor, scale_R: Tensor, dtype: torch.dtype) -> Tensor:
    num_rows, width = rows_RD.shape
    out_RD = torch.empty(rows_RD.shape, dtype=dtype, device=rows_RD.device)
    block = _block(width)
    if out_RD.numel():
        grid = (num_rows, triton.cdiv(width, block))
        _unpack[grid](rows_RD, scale_R, out_RD, D=width, BLOCK=block, num_warps=_warps(block))
    return out_RD
