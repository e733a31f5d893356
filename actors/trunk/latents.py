"""Attention over latents as they are, for one new token a row: DeepSeek's families keep 512 numbers a position for all
heads, and transformers expands those of every position to keys and values of each head in every step. The expansion is
linear, so that queries and outputs can take their half of it instead (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

Letters: B rows, H heads, S positions, R numbers of a latent, W width of a head's part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "moe_cluster_latents"
"""As transformers knows it. Masks are those of `sdpa`."""
CLASSES = ("DeepseekV2Attention", "DeepseekV3Attention")
"""What nothing comes between the expansion and the attention of."""


def attend_to_latents(view: PreTrainedModel) -> PreTrainedModel:
    """In place, for a view that serves: the weights are read where they are. Other families stay as they were."""
    modules = [module for module in view.modules() if type(module).__name__ in CLASSES]
    if modules and view.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        view.set_attn_implementation(NAME)
        for module in modules:
            module.__dict__["expand_kv"] = _unexpanded
    return view


def _unexpanded(latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    return latents, rotated


def _attention(
    module: Any, query: Tensor, latents_B1SR: Tensor, rotated_B1SW: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Called in the place of `sdpa`, `query` [B, H, T, W] -> [B, T, H, W]."""
    if query.shape[2] == 1 and _is_exact(query):
        mask_B1S = None if attention_mask is None else attention_mask[:, 0, :, : latents_B1SR.shape[2]]
        return _absorbed(module, query[:, :, 0], latents_B1SR[:, 0], rotated_B1SW[:, 0], mask_B1S), None
    key, value = type(module).expand_kv(module, latents_B1SR, rotated_B1SW)
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out, None


def _is_exact(query: Tensor) -> bool:
    """Whether scores come in float32 at least."""
    return query.is_cuda or query.dtype in (torch.float32, torch.float64)


def _absorbed(
    module: Any, query_BHW: Tensor, latents_BSR: Tensor, rotated_BSW: Tensor, mask_B1S: Tensor | None
) -> Tensor:
    """-> [B, 1, H, W]. Numbers are those of the expanded attention, rounded in other places."""
    heads, plain = query_BHW.shape[1], module.qk_nope_head_dim
    weight_HWR = module.kv_b_proj.weight.view(heads, -1, latents_BSR.shape[2])
    query_BHR = torch.bmm(query_BHW[..., :plain].transpose(0, 1), weight_HWR[:, :plain]).transpose(0, 1)
    scores_BHS = _scores(query_BHR, latents_BSR).add_(_scores(query_BHW[..., plain:], rotated_BSW))
    scores_BHS.mul_(module.scaling)
    if mask_B1S is not None:
        scores_BHS = _masked(scores_BHS, mask_B1S)
    shares_BHS = torch.softmax(scores_BHS, dim=-1).to(latents_BSR.dtype)
    sums_HBR = torch.bmm(shares_BHS, latents_BSR).transpose(0, 1)
    return torch.bmm(sums_HBR, weight_HWR[:, plain:].transpose(1, 2)).transpose(0, 1).unsqueeze(1)


def _scores(query_BHR: Tensor, keys_BSR: Tensor) -> Tensor:
    """[B, H, S], in float32 at least: what is rounded to bfloat16 before the exponential is 1 % off."""
    keys_BRS = keys_BSR.transpose(1, 2)
    if query_BHR.dtype in (torch.float32, torch.float64):
        return torch.bmm(query_BHR, keys_BRS)
    return torch.bmm(query_BHR, keys_BRS, out_dtype=torch.float32)


def _masked(scores_BHS: Tensor, mask_B1S: Tensor) -> Tensor:
    """`mask_B1S`: which are looked at, or what is added to the scores."""
    if mask_B1S.dtype == torch.bool:
        return torch.where(mask_B1S, scores_BHS, -torch.inf)
    return scores_BHS.add_(mask_B1S)
