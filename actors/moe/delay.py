"""What a gradient lacks that was computed with older weights than those it is applied to.

DC-ASGD (Zheng et al. 2017, arXiv:1609.08326): g(now) is about g(then) + H (now - then), with the diagonal of g g^T in
the place of the Hessian H. Its adaptive form divides by the root of a mean square of the gradients, so that the
strength needs no tuning to their scale; AdamW has that mean square as its second moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-7
"""As in the paper's adaptive form: under the root."""


@torch.no_grad()
def compensate_(
    gradient: Tensor, now: Tensor, then: Tensor, *, strength: float, mean_square: Tensor | None = None
) -> None:
    """gradient += strength * g * g / sqrt(mean_square) * (now - then), in place; all [E, ...].

    `mean_square`: by element; without it that of the gradient itself, over each expert (all dimensions but the first).
    """
    square = gradient * gradient
    if mean_square is None:
        mean_square = square.mean(dim=tuple(range(1, gradient.ndim)), keepdim=True)
    gradient.add_(square.div_((mean_square + TINY * TINY).sqrt_()).mul_(now - then), alpha=strength)
