"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for stacked expert matrices, each orthogonalised by
itself: a gradient's average goes into the weights with all its singular values near 1.

The numbers are those of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025, arXiv:2502.16982),
under which Muon takes the learning rate and weight decay that AdamW takes. torch's takes one matrix at a time.

    E experts   M, N rows and columns of a matrix
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: largest slope at 0 for which all singular values stay near 1."""
ITERATIONS = 5
MIN_NORM = 1e-7
"""A matrix smaller than this is taken as one of this size: zero stays zero."""


@torch.no_grad()
def muon_(
    weight_EMN: Tensor,
    gradient_EMN: Tensor,
    average_EMN: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    num_updates: int = 1,
) -> None:
    """One step with Nesterov momentum, in place: of weights and of the gradients' average.

    `num_updates`: that the step stands for, with the same gradient; the average decays for all of them.
    """
    kept = momentum**num_updates
    average_EMN.lerp_(gradient_EMN, 1 - kept)
    direction_EMN = orthogonal(gradient_EMN.lerp(average_EMN, kept))
    rms_of_adamw = 0.2 * math.sqrt(max(weight_EMN.shape[1:]))
    weight_EMN.mul_(1 - lr * weight_decay)
    weight_EMN.add_(direction_EMN, alpha=-lr * rms_of_adamw)


def orthogonal(x_EMN: Tensor) -> Tensor:
    """Each matrix with singular values between about 0.7 and 1.2 in the place of its own, by Newton-Schulz iterations
    in bfloat16, as torch makes them. The result is bfloat16."""
    a, b, c = COEFFICIENTS
    is_tall = x_EMN.shape[1] > x_EMN.shape[2]
    x_EMN = x_EMN.bfloat16()
    if is_tall:
        x_EMN = x_EMN.mT
    x_EMN = x_EMN / x_EMN.norm(dim=(1, 2), keepdim=True).clamp(min=MIN_NORM)
    for _ in range(ITERATIONS):
        gram_EMM = x_EMN @ x_EMN.mT
        x_EMN = torch.baddbmm(x_EMN, torch.baddbmm(gram_EMM, gram_EMM, gram_EMM, beta=b, alpha=c), x_EMN, beta=a)
    return x_EMN.mT if is_tall else x_EMN
