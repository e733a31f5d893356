"""Norms of a serving view on a GPU are one kernel, and within rounding of transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.trunk.norms import fuse_norms
from tests.families import FAMILIES

pytestmark = pytest.mark.gpu


def pair(family: str, dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2)
    return plain, fuse_norms(copy.deepcopy(plain))


def fused(model: Any) -> list[Any]:
    return [module for module in model.modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fused_norms_are_within_rounding(family: str) -> None:
    plain, view = pair(family, torch.bfloat16)
    assert fused(view)
    assert not fused(plain)
    of_plain = dict(plain.named_modules())
    for name, module in view.named_modules():
        if module in fused(view):
            x_TD = torch.randn(5, *module.weight.shape, device="cuda").bfloat16()
            torch.testing.assert_close(module(x_TD), of_plain[name](x_TD), rtol=2**-6, atol=1e-6)


def test_in_float32_nothing_is_fused() -> None:
    assert not fused(pair("deepseek_v3", torch.float32)[1])


def test_a_norm_that_adds_to_its_weight_is_left_alone() -> None:
    class OffsetRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.zeros(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (8,), 1 + self.weight, self.eps)

    model: Any = torch.nn.Sequential(OffsetRMSNorm()).to("cuda", torch.bfloat16)
    assert not fused(fuse_norms(model))
    torch.nn.init.uniform_(model[0].weight, -1, 1)
    assert not fused(fuse_norms(model))
