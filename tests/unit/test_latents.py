"""One new token's attention over latents, against transformers' own over what it expands them to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from actors.trunk import latents
from actors.trunk.latents import attend_to_latents
from tests.families import FAMILIES

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def pair(family: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Plain, and attending to latents."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    return plain, attend_to_latents(copy.deepcopy(plain))


@pytest.fixture
def absorbed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the queries whose half of the expansion was taken."""
    found: list[torch.Size] = []
    inner = latents._absorbed

    def noted(module: Any, query_BHW: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(query_BHW.shape)
        return inner(module, query_BHW, *rest)

    monkeypatch.setattr(latents, "_absorbed", noted)
    return found


def steps(model: Any, prompt_BS: torch.Tensor, tokens_BS: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor:
    """Logits after the prompt and after each token [B, 1 + S, V], through a cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = [model(prompt_BS, past_key_values=cache, attention_mask=mask_BS).logits[:, -1]]
        for token_B in tokens_BS.t():
            if mask_BS is not None:
                mask_BS = torch.cat((mask_BS, mask_BS.new_ones(len(mask_BS), 1)), dim=1)
            out.append(model(token_B.unsqueeze(1), past_key_values=cache, attention_mask=mask_BS).logits[:, -1])
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_logits_are_those_of_expanded_keys(
    family: str, dtype: torch.dtype, padded: bool, absorbed: list[torch.Size]
) -> None:
    plain, view = pair(family, dtype)
    prompt_BS, tokens_BS = torch.randint(3, 250, (3, 9)), torch.randint(3, 250, (3, 4))
    mask_BS = torch.ones(3, 9, dtype=torch.int64) if padded else None
    if mask_BS is not None:
        mask_BS[1, :5] = mask_BS[2, :1] = 0
    want = steps(plain, prompt_BS, tokens_BS, mask_BS)
    assert not absorbed
    got = steps(view, prompt_BS, tokens_BS, mask_BS)
    assert len(absorbed) == 4 * plain.config.num_hidden_layers
    # V2's rotation computes in float32, whatever the model's dtype is.
    rtol = 1e-6 if family == "deepseek_v2" and dtype == torch.float64 else TOLERANCE[dtype]
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


def test_a_mask_may_be_added_to_scores(absorbed: list[torch.Size]) -> None:
    plain, view = pair("deepseek_v3", torch.float64)
    prompt_BS, token_B1 = torch.randint(3, 250, (2, 6)), torch.randint(3, 250, (2, 1))
    mask_B11S = torch.zeros(2, 1, 1, 7, dtype=torch.float64)
    mask_B11S[1, ..., :3] = torch.finfo(torch.float64).min
    found = []
    for model in (plain, view):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt_BS, past_key_values=cache)
            found.append(model(token_B1, past_key_values=cache, attention_mask=mask_B11S).logits)
    assert absorbed
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_where_scores_would_be_rounded_nothing_is_absorbed(absorbed: list[torch.Size]) -> None:
    plain, view = pair("deepseek_v3", torch.bfloat16)
    prompt_BS, tokens_BS = torch.randint(3, 250, (2, 6)), torch.randint(3, 250, (2, 2))
    assert torch.equal(steps(view, prompt_BS, tokens_BS, None), steps(plain, prompt_BS, tokens_BS, None))
    assert not absorbed


def test_weights_are_read_where_they_are(absorbed: list[torch.Size]) -> None:
    plain, view = pair("deepseek_v3", torch.float64)
    prompt_BS, tokens_BS = torch.randint(3, 250, (2, 6)), torch.randint(3, 250, (2, 2))
    for model in (plain, view):
        steps(model, prompt_BS, tokens_BS, None)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "kv_b_proj" in name:
                    parameter.mul_(2)
    got, want = (steps(model, prompt_BS, tokens_BS, None) for model in (view, plain))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"deepseek_v2", "deepseek_v3"}))
def test_other_families_stay_as_they_are(family: str) -> None:
    plain, view = pair(family, torch.float32)
    assert view.config._attn_implementation == plain.config._attn_implementation
    assert not any("expand_kv" in module.__dict__ for module in view.modules())
