"""Small random models of the families, as transformers itself builds and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_COMMON, **_LATENT, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_COMMON, **_LATENT, "n_group": 2, "topk_group": 1},
    "mixtral": {**_COMMON, "num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "qwen3_moe": {
        **_COMMON,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "olmoe": {**_COMMON, "num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {
        **_COMMON,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if "bias" in name:  # transformers starts biases at zero; a test needs to see them
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def save(family: str, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    build(family, dtype, seed).save_pretrained(directory)
    return directory


def plain(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model the way any transformers user loads it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager")
