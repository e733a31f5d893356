"""Gates of DeepSeek-V3's kind in four kernels instead of the twenty that transformers writes them as.

Only for a view that serves, on a GPU: a step of few tokens is made of small kernels there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from actors.moe.passes import kernels_for

MAX_EXPERTS = 1024
"""That one program looks at."""
_NUM_TRIED = 64
"""Tokens by which it is seen whether a gate is one of these."""
_IS_SAME = 1e-5
"""Weights that differ by so little are; two orders of a sum do."""
_ATTRIBUTES = (
    "top_k",
    "num_experts",
    "hidden_dim",
    "routed_scaling_factor",
    "num_group",
    "topk_group",
    "norm_topk_prob",
    "e_score_correction_bias",
)


def fuse_gates(view: PreTrainedModel) -> PreTrainedModel:
    """In place: weights and biases are read where they are. A gate that chooses otherwise stays as it was."""
    for module in view.modules():
        if all(hasattr(module, name) for name in _ATTRIBUTES) and _is_on_gpu(module) and _chooses_so(module):
            module.__dict__["forward"] = _fused(module)
    return view


def _is_on_gpu(gate: Any) -> bool:
    tensors = gate.weight.detach(), gate.e_score_correction_bias.detach()
    return gate.num_experts <= MAX_EXPERTS and kernels_for(*tensors) is not None


def _fused(gate: Any) -> Any:
    from actors.moe.few_kernels import best_experts

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = hidden_states.view(-1, gate.hidden_dim)
        logits_TE = F.linear(x_TD.type(torch.float32), gate.weight.type(torch.float32))
        ids_TK, weights_TK = best_experts(
            logits_TE,
            gate.e_score_correction_bias.float(),
            top_k=gate.top_k,
            num_parts=gate.num_group,
            parts_per_token=gate.topk_group,
            sums_to_1=gate.norm_topk_prob,
            scale=gate.routed_scaling_factor,
        )
        return logits_TE, weights_TK, ids_TK

    return forward


@torch.no_grad()
def _chooses_so(gate: Any) -> bool:
    """Tried: names of attributes are what they are."""
    generator = torch.Generator(gate.weight.device).manual_seed(0)
    x_TD = torch.randn(_NUM_TRIED, gate.hidden_dim, generator=generator, device=gate.weight.device)
    x_TD = x_TD.to(gate.weight.dtype)
    try:
        _, want_TK, want_ids_TK = gate(x_TD)
        _, got_TK, got_ids_TK = _fused(gate)(x_TD)
    except (TypeError, ValueError, RuntimeError):  # another forward
        return False
    is_one = want_ids_TK.shape == got_ids_TK.shape and want_TK.dtype == got_TK.dtype
    return is_one and torch.allclose(
        _by_expert(gate, want_TK, want_ids_TK), _by_expert(gate, got_TK, got_ids_TK), atol=_IS_SAME
    )


def _by_expert(gate: Any, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
    return weights_TK.new_zeros(len(weights_TK), gate.num_experts).scatter_(1, ids_TK, weights_TK)
