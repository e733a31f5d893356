"""Rows as FP8 e4m3 with a float32 scale each, for the way from router to experts (S24; as DeepSeek-V3 dispatches,
2412.19437, 3.3). The scale takes a row's largest value to the largest of the format, 448.

Half of the bytes of bfloat16. Three bits of mantissa round a value by up to 1/16 of itself, and by 1/32 on average over
a binade where it is off most; for rows of normally distributed values the relative error is about 2.6 %. What comes
back from the experts, and gradients, stay in the trunk's dtype.

    R rows   D model width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from actors.errors import InvalidInput
from actors.moe.passes import kernels_for

Payload = Literal["trunk", "fp8"]
"""How rows travel: in the trunk's dtype, or packed."""

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


@torch.no_grad()
def pack(rows_RD: Tensor) -> tuple[Tensor, Tensor]:
    """-> e4m3 [R, D], float32 scales [R]. Rows of zeros have scale 1. Numbers that are not finite come out as such."""
    if kernels := kernels_for(rows_RD):
        return kernels.pack(rows_RD, LARGEST)  # type: ignore[no-any-return]
    wide_RD = rows_RD.float()
    scale_R = wide_RD.abs().amax(1) / LARGEST if rows_RD.shape[1] else wide_RD.new_zeros(len(rows_RD))
    scale_R = torch.where(scale_R == 0, 1.0, scale_R)
    # A rounding of the quotient must not lead out of the format: beyond its largest value there is only NaN.
    return (wide_RD / scale_R.unsqueeze(1)).clamp(-LARGEST, LARGEST).to(E4M3), scale_R


@torch.no_grad()
def unpack(packed_RD: Tensor, scale_R: Tensor, dtype: torch.dtype) -> Tensor:
    """Counterpart of `pack`, in `dtype`: [R, D]."""
    if packed_RD.is_contiguous() and (kernels := kernels_for(packed_RD.view(torch.uint8), scale_R)):
        return kernels.unpack(packed_RD, scale_R, dtype)  # type: ignore[no-any-return]
    return (packed_RD.float() * scale_R.unsqueeze(1)).to(dtype)


@torch.no_grad()
def relative_error(rows_RD: Tensor) -> float:
    """|unpack(pack(rows)) - rows| / |rows|, Frobenius norms in float64; 0 of rows that are all zero."""
    exact_RD = rows_RD.double()
    norm = exact_RD.norm()
    error = (unpack(*pack(rows_RD), torch.float64) - exact_RD).norm()
    return float(error / norm) if norm else 0.0


def packed(rows_RD: Tensor, payload: Payload) -> tuple[Tensor, ...]:
    """What stands for the rows in a message: themselves, or FP8 and scales."""
    return pack(rows_RD) if payload == "fp8" else (rows_RD,)


def unpacked(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Counterpart of `packed`: rows in `dtype`, where they were packed."""
    if len(tensors) == 1:
        return tensors[0]
    rows_RD, scale_R = tensors
    if rows_RD.dtype != E4M3 or rows_RD.ndim != 2 or scale_R.dtype != torch.float32 or len(rows_RD) != scale_R.numel():
        raise InvalidInput(
            "need rows [R, D] of float8_e4m3fn and scales [R] of float32",
            field="x_TD",
            value=(tuple(rows_RD.shape), rows_RD.dtype, tuple(scale_R.shape), scale_R.dtype),
        )
    return unpack(rows_RD, scale_R.view(-1), dtype)
