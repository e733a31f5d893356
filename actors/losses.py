"""What training minimises and evaluation reports."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_losses(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Cross entropy of every predicted token, summed; in float32 or wider."""
    logits = logits_BSV[:, :-1].flatten(0, 1)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    return F.cross_entropy(logits, ids_BS[:, 1:].flatten(), reduction="sum")
