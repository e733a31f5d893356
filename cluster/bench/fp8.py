"""`fp8_rows`: what FP8 leaves of a token's bytes on the way to the experts, and of its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actors.moe.fp8 import pack, relative_error
from cluster.bench.result import Row

NUM_TOKENS, WIDTH = 128, 7168


@dataclass(frozen=True)
class Fp8Row(Row):
    relative_error: float
    """Of the rows, normally distributed values: Frobenius norms."""


def fp8_row() -> Fp8Row:
    generator = torch.Generator().manual_seed(0)
    rows_TD = torch.randn(NUM_TOKENS, WIDTH, generator=generator).to(torch.bfloat16)
    packed = sum(part.nbytes for part in pack(rows_TD)) / NUM_TOKENS
    plain = rows_TD.nbytes / NUM_TOKENS
    return Fp8Row(
        case=f"fp8_rows_{NUM_TOKENS}x{WIDTH}",
        value=packed,
        unit="bytes/token",
        peer="bfloat16",
        peer_value=plain,
        ratio=plain / packed,
        rounds=1,
        relative_error=relative_error(rows_TD),
    )
