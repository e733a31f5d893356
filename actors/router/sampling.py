"""Which token comes next, from logits, a seed and a position."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from actors.values import Sampling


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id. Ties of the greedy choice go to the lowest id."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probs_V = torch.softmax(logits_V.float().cpu() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        outside_V = sorted_V.cumsum(0) - sorted_V >= sampling.top_p
        probs_V = torch.zeros_like(probs_V).scatter(0, order_V, sorted_V.masked_fill(outside_V, 0.0))
    return int(torch.multinomial(probs_V, 1, generator=generator))


def generator_at(seed: int, position: int) -> torch.Generator:
    """Randomness of the token at this position of prompt and text together, and of nothing before it: a stream that
    goes on elsewhere, from its prompt and its tokens so far, draws the same."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def choose_each(logits_BV: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """The next token of each row, as `choose` would take it at that position. A device is waited for once or twice."""
    tokens: list[int] = logits_BV.argmax(dim=-1).tolist()
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature != 0]
    if drawn:
        logits_BV = logits_BV[torch.tensor(drawn, device=logits_BV.device)].float().cpu()
        for row, logits_V in zip(drawn, logits_BV, strict=True):
            tokens[row] = choose(logits_V, samplings[row], generator_at(samplings[row].seed, positions[row]))
    return tokens
