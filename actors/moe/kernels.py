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


def there(launch: Launch) -> Launch:
    """Triton launches on the device that is current, which need not be the one that the first tensor is on."""

    @wraps(launch)
    def run(first: Tensor, *rest: object, **more: object) -> object:
        with torch.cuda.device_of(first):
            return launch(first, *rest, **more)

    return cast(Launch, run)


def block_of(width: int) -> int:
    """The largest block that divides a row without much waste."""
    for block in _BLOCKS:
        if triton.cdiv(width, block) * block <= (1 + _MAX_IDLE) * width:
            return block
    return _BLOCKS[-1]


def warps_of(block: int) -> int:
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


@there
def gather_rows(x_TD: Tensor, token_P: Tensor) -> Tensor:
    """A token that is not there gives zeros: no index leads out of the tensor."""
    num_tokens, width = x_TD.shape
    out_PD = x_TD.new_empty(len(token_P), width)
    block = block_of(width)
    if out_PD.numel():
        grid = (len(token_P), triton.cdiv(width, block))
        _gather[grid](x_TD, token_P, out_PD, num_tokens, D=width, BLOCK=block, num_warps=warps_of(block))
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


@there
def add_sums(into_TD: Tensor, rows_PD: Tensor, order_P: Tensor, ends_T: Tensor, weight_P: Tensor | None) -> None:
    num_tokens, width = into_TD.shape
    block = block_of(width)
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
            num_warps=warps_of(block),
        )


@triton.jit
def _gate(pre, weight, act, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(pre + pair * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pre + pair * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        value = tl.load(weight + pair).to(tl.float32) * value
    tl.store(act + pair * WIDTH + column, value, mask=inside)


@there
def gated(pre_PH: Tensor, weight_P: Tensor | None) -> Tensor:
    num_pairs, width = len(pre_PH), pre_PH.shape[1] // 2
    act_PI = pre_PH.new_empty(num_pairs, width)
    block = block_of(width)
    if act_PI.numel():
        grid = (num_pairs, triton.cdiv(width, block))
        weight, is_weighted = (pre_PH, False) if weight_P is None else (weight_P, True)
        _gate[grid](pre_PH, weight, act_PI, WIDTH=width, WEIGHTED=is_weighted, BLOCK=block, num_warps=warps_of(block))
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


@there
def gated_backward_(pre_PH: Tensor, grad_PI: Tensor, weight_P: Tensor) -> Tensor:
    num_pairs, width = len(pre_PH), pre_PH.shape[1] // 2
    grad_weight_P = weight_P.new_empty(num_pairs)
    block = block_of(width)
    if pre_PH.numel():
        _gate_backward[(num_pairs,)](
            pre_PH, grad_PI, weight_P, grad_weight_P, WIDTH=width, BLOCK=block, num_warps=warps_of(block)
        )
    return grad_weight_P


@triton.jit
def _add_at(into, index, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    row = tl.load(index + number).to(tl.int64)
    total = tl.load(into + row * D + column, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(rows + number * D + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(into + row * D + column, total, mask=inside)


@there
def add_at(into_TD: Tensor, index_R: Tensor, rows_RD: Tensor) -> None:
    width = into_TD.shape[1]
    block = block_of(width)
    if rows_RD.numel():
        grid = (len(index_R), triton.cdiv(width, block))
        _add_at[grid](into_TD, index_R, rows_RD, D=width, BLOCK=block, num_warps=warps_of(block))


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


@there
def pack(rows_RD: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    num_rows, width = rows_RD.shape
    out_RD = torch.empty(rows_RD.shape, dtype=torch.float8_e4m3fn, device=rows_RD.device)
    scale_R = torch.empty(num_rows, dtype=torch.float32, device=rows_RD.device)
    block = block_of(width)
    if out_RD.numel():
        _pack[(num_rows,)](rows_RD, out_RD, scale_R, LARGEST=largest, D=width, BLOCK=block, num_warps=warps_of(block))
    return out_RD, scale_R


@triton.jit
def _unpack(rows, scales, out, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(rows + row * D + column, mask=column < D, other=0.0).to(tl.float32) * tl.load(scales + row)
    tl.store(out + row * D + column, value, mask=column < D)


@there
def unpack(rows_RD: Tensor, scale_R: Tensor, dtype: torch.dtype) -> Tensor:
    num_rows, width = rows_RD.shape
    out_RD = torch.empty(rows_RD.shape, dtype=dtype, device=rows_RD.device)
    block = block_of(width)
    if out_RD.numel():
        grid = (num_rows, triton.cdiv(width, block))
        _unpack[grid](rows_RD, scale_R, out_RD, D=width, BLOCK=block, num_warps=warps_of(block))
    return out_RD
