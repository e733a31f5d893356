"""A layer's tokens with the gate's choices as one tensor of bytes, of a size that both ends know: one thing to send.

x [T, D] | ids [T, K] | weights [T, K], row by row
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IDS = torch.int64


@dataclass(frozen=True)
class LayerShape:
    """`dtype` of the tokens, `weight_dtype` of the gate's weights."""

    num_tokens: int
    width: int
    top_k: int
    dtype: torch.dtype
    weight_dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int, int]:
        """In bytes, of each part."""
        pairs = self.num_tokens * self.top_k
        tokens = self.num_tokens * self.width * self.dtype.itemsize
        return tokens, pairs * IDS.itemsize, pairs * self.weight_dtype.itemsize

    @property
    def is_aligned(self) -> bool:
        """Whether each part can be read where it lies."""
        tokens, ids, _ = self.sizes
        return tokens % IDS.itemsize == 0 and (tokens + ids) % self.weight_dtype.itemsize == 0

    def room(self, device: torch.device) -> Tensor:
        """For what `to_bytes` gives."""
        return torch.zeros(sum(self.sizes), dtype=torch.uint8, device=device)


def to_bytes(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """uint8 [N]."""
    parts = (x_TD, ids_TK.to(IDS), weights_TK)
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def from_bytes(bytes_N: Tensor, shape: LayerShape) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], ids [T, K] and weights [T, K], without a copy."""
    x, ids, weights = bytes_N.split(list(shape.sizes))
    return (
        x.view(shape.dtype).view(shape.num_tokens, shape.width),
        ids.view(IDS).view(shape.num_tokens, shape.top_k),
        weights.view(shape.weight_dtype).view(shape.num_tokens, shape.top_k),
    )
