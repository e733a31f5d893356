"""What goes into the scores beside the projection. Parameters start so that a loaded model's gate means what it meant
(attention), or keeps its ranking nearly (noise)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.moe.gating.contract import GateContext

NOISE, DROPOUT = range(2)
"""Streams of random numbers, see `GateContext.generator`."""


class LearnedNoise(nn.Module):
    """randn_like(x) @ W^T, W [E, D] learned (S3); after the noisy top-k gate of arXiv 1701.06538."""

    def __init__(self, num_experts: int, width: int, std: float, dtype: torch.dtype) -> None:
        super().__init__()
        self._std = std
        self.weight = nn.Parameter(torch.empty(num_experts, width, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self._std / self.weight.shape[1] ** 0.5)

    def forward(self, x_TD: Tensor, context: GateContext) -> Tensor:
        """-> [T, E], to be added to the logits in training."""
        generator = context.generator(NOISE, x_TD.device)
        noise_TD = torch.randn(x_TD.shape, generator=generator, dtype=x_TD.dtype, device=x_TD.device)
        return F.linear(noise_TD, self.weight.to(x_TD.dtype))


class ContextAttention(nn.Module):
    """Causal attention of each token over its sequence, in a low dimension H (S4). It is added to what the projection
    sees. The output projection starts at zero, so that a gate starts as it was without it.
    """

    def __init__(self, width: int, attention_width: int, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._heads = heads
        self.query = nn.Parameter(torch.empty(attention_width, width, dtype=dtype))
        self.key = nn.Parameter(torch.empty(attention_width, width, dtype=dtype))
        self.value = nn.Parameter(torch.empty(attention_width, width, dtype=dtype))
        self.output = nn.Parameter(torch.empty(width, attention_width, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.query, self.key, self.value):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        nn.init.zeros_(self.output)

    def forward(self, x_TD: Tensor, context: GateContext) -> Tensor:
        """-> [T, D], what each token's context adds. Extends `context.past`."""
        length = context.sequence_length
        query, key, value = (self._split(F.linear(x_TD, w.to(x_TD.dtype)), length) for w in self._inputs())
        if context.past is not None:
            key, value = context.past.extend(key, value)
        earlier = key.shape[2] - length
        mask = None if context.past is None else context.past.mask
        if mask is None and earlier and length > 1:
            mask = torch.ones(length, earlier + length, dtype=torch.bool, device=x_TD.device).tril(earlier)
        is_causal = mask is None and not earlier
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
        mixed_TH = mixed.transpose(1, 2).reshape(x_TD.shape[0], self.query.shape[0])
        return F.linear(mixed_TH, self.output.to(x_TD.dtype))

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def _split(self, rows_TH: Tensor, length: int) -> Tensor:
        """[T, H] -> [B, heads, S, H / heads]"""
        tokens, width = rows_TH.shape
        return rows_TH.view(tokens // length, length, self._heads, width // self._heads).transpose(1, 2)


class GroupScores(nn.Module):
    """p(expert) = p(group) * p(expert | group), the group's from a projection [G, D] of its own (S6)."""

    def __init__(self, num_groups: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, width, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)  # at zero all tokens would choose group 0

    def forward(self, x_TD: Tensor, logits_TE: Tensor, temperature: float) -> Tensor:
        """-> [T, E]; rows sum to 1. The temperature holds for both levels (`logits_TE` are divided by it already)."""
        (tokens, num_experts), num_groups = logits_TE.shape, self.weight.shape[0]
        group_TG = (F.linear(x_TD, self.weight.to(x_TD.dtype)) / temperature).softmax(dim=1)
        inside_TGE = logits_TE.view(tokens, num_groups, num_experts // num_groups).softmax(dim=2)
        return (group_TG.unsqueeze(2) * inside_TGE).flatten(1)


def normalised(scores_TN: Tensor) -> Tensor:
    """Rows divided by their sums; a row of zeros stays one."""
    return scores_TN / (scores_TN.sum(dim=1, keepdim=True) + 1e-20)
