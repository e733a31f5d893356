"""RMS norms in one kernel instead of the seven that most families of transformers write them as.

Only in half precision on a GPU, where a step of few tokens is made of small kernels. They differ in one rounding:
transformers rounds before it multiplies by the weight and after, the kernel after.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

_HALF = (torch.bfloat16, torch.float16)
_EPSILONS = ("variance_epsilon", "eps")
_ROUNDINGS = 4
"""Of the dtype, by which a norm may differ from the kernel and still be the same."""


def fuse_norms(view: PreTrainedModel) -> PreTrainedModel:
    """In place, for a view that serves: the weights are read where they are. What computes other numbers than an RMS
    norm stays as it was."""
    for module in view.modules():
        if type(module).__name__.endswith("RMSNorm") and (eps := _is_rms_norm(module)) is not None:
            module.__dict__["forward"] = _fused(module, eps)
    return view


def _fused(module: Any, eps: float) -> Any:
    def forward(x: Tensor) -> Tensor:
        if x.dtype != module.weight.dtype:
            found: Tensor = type(module).forward(module, x)
            return found
        return F.rms_norm(x, module.weight.shape, module.weight, eps)

    return forward


def _is_rms_norm(module: Any) -> float | None:
    """Its epsilon, if what it computes is what its name says: some families add 1 to the weight, say."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
    if weight is None or eps is None or not weight.is_cuda or weight.dtype not in _HALF:
        return None
    generator = torch.Generator(weight.device).manual_seed(0)
    x_TD = torch.randn(8, *weight.shape, generator=generator, device=weight.device).to(weight.dtype)
    with torch.no_grad():
        want, got = module(x_TD).float(), F.rms_norm(x_TD, weight.shape, weight, eps).float()
    is_same = torch.allclose(got, want, rtol=_ROUNDINGS * torch.finfo(weight.dtype).eps, atol=1e-6)
    return float(eps) if is_same and bool((weight != 0).any()) else None
