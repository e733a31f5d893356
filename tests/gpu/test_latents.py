"""One new token's attention over latents on a GPU, also in bfloat16, whose scores stay in float32."""

from __future__ import annotations

import pytest
import torch

from tests.unit.test_latents import absorbed, pair, steps

__all__ = ["absorbed"]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_logits_are_those_of_expanded_keys(
    family: str, dtype: torch.dtype, tolerance: float, absorbed: list[torch.Size]
) -> None:
    plain, view = (model.to("cuda") for model in pair(family, dtype))
    prompt_BS, tokens_BS = torch.randint(3, 250, (3, 9), device="cuda"), torch.randint(3, 250, (3, 4), device="cuda")
    want, got = (steps(model, prompt_BS, tokens_BS, None).float() for model in (plain, view))
    assert len(absorbed) == 4 * plain.config.num_hidden_layers
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
