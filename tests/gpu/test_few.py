"""Experts of few tokens and gates by kernels of ours: what plain torch gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from actors.moe import static
from actors.moe.device import experts_on
from actors.moe.static import FEW_TOKENS, StaticPart, static_experts
from actors.trunk.gates import fuse_gates
from actors.trunk.init import initial_experts
from actors.trunk.model import ModelSource, skeleton
from tests.families import FAMILIES

pytestmark = pytest.mark.gpu
NUM_EXPERTS, TOP_K = 8, 3


def parts_of(family: str, groups: list[list[int]]) -> list[StaticPart]:
    """A stack for each list of groups of 2."""
    shape = skeleton(ModelSource(values={"model_type": family, **FAMILIES[family]}, dtype="bfloat16"))
    parts = []
    for own in groups:
        tensors = initial_experts(shape, 0, own, 2, seed=1)
        torch.manual_seed(own[0])
        drawn = {name: (torch.randn(tensor.shape) * 0.2).bfloat16().cuda() for name, tensor in tensors.items()}
        stack = experts_on(torch.device("cuda"), shape.layers[0].template, drawn, num_layers=1)
        rows = {g * 2 + i: row * 2 + i for row, g in enumerate(own) for i in range(2)}
        parts.append(StaticPart.of(stack, rows, NUM_EXPERTS))
    return parts


def choices(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, 32, device="cuda").bfloat16()
    ids_TK = torch.rand(num_tokens, NUM_EXPERTS, device="cuda").argsort(1)[:, :TOP_K]
    weights_TK = torch.rand(num_tokens, TOP_K, device="cuda", dtype=dtype)
    ids_TK[::3, 1], weights_TK[::3, 1] = -1, 0.0
    return x_TD, ids_TK, weights_TK


@torch.no_grad()
def plainly(monkeypatch: pytest.MonkeyPatch, *what: Any) -> Tensor:
    """Every expert computes every token."""
    with monkeypatch.context() as patched:
        patched.setattr(static, "_has_kernel", lambda x_TD: False)
        return static_experts(*what)


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("num_tokens", [1, 5, 32, FEW_TOKENS])
@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[0, 2], [3, 1]], [[2]]], ids=["all", "two parts", "some"])
def test_sums_of_few_tokens(
    family: str, num_tokens: int, groups: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, what = parts_of(family, groups), choices(num_tokens)
    assert static._is_few(what[0], what[2])
    with torch.no_grad():
        got_TD = static_experts(parts, *what)
    want_TD = plainly(monkeypatch, parts, *what)
    torch.testing.assert_close(got_TD, want_TD, rtol=2e-2, atol=2e-2 * float(want_TD.abs().max()))


def test_weights_of_the_dtype_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, what = parts_of("mixtral", [[0, 1, 2, 3]]), choices(7, torch.bfloat16)
    with torch.no_grad():
        got_TD = static_experts(parts, *what)
    want_TD = plainly(monkeypatch, parts, *what)
    torch.testing.assert_close(got_TD, want_TD, rtol=2e-2, atol=2e-2 * float(want_TD.abs().max()))


def test_what_was_not_computed_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does an index that is none: a peer that ends in a step leaves anything in its place."""
    parts, (x_TD, ids_TK, weights_TK) = parts_of("mixtral", [[0, 1]]), choices(6)
    for weights in (part.weights for part in parts):
        weights["down_proj"][3] = 1e38
    ids_TK[ids_TK == 3] = 7
    want_TD = plainly(monkeypatch, parts, x_TD, ids_TK, weights_TK)
    ids_TK[ids_TK == 7] = 1 << 40
    with torch.no_grad():
        got_TD = static_experts(parts, x_TD, ids_TK, weights_TK)
    assert torch.isfinite(got_TD).all()
    torch.testing.assert_close(got_TD, want_TD, rtol=2e-2, atol=2e-2 * float(want_TD.abs().max()))


def models(family: str, **changes: object) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    with torch.device("cuda"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
            if name.endswith(("gate.weight", "e_score_correction_bias")):
                tensor.normal_(std=0.3)
    return plain, fuse_gates(copy.deepcopy(plain))


def gates_of(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (2, 1)])
@pytest.mark.parametrize("sums_to_1", [True, False])
def test_fused_gates_choose_as_transformers_does(groups: int, kept: int, sums_to_1: bool) -> None:
    plain, view = models("deepseek_v3", n_routed_experts=16, n_group=groups, topk_group=kept, norm_topk_prob=sums_to_1)
    assert gates_of(view)
    for ours, theirs in zip(gates_of(view), gates_of(plain), strict=True):
        assert "forward" in ours.__dict__
        x_BSD = torch.randn(3, 20, 32, device="cuda").bfloat16()
        logits_TE, weights_TK, ids_TK = ours(x_BSD)
        want_TE, want_TK, want_ids_TK = theirs(x_BSD)
        torch.testing.assert_close(logits_TE, want_TE)
        found_TE, wanted_TE = (torch.zeros_like(want_TE) for _ in range(2))
        torch.testing.assert_close(found_TE.scatter(1, ids_TK, weights_TK), wanted_TE.scatter(1, want_ids_TK, want_TK))


def test_scores_that_are_no_numbers_are_seen() -> None:
    _, view = models("deepseek_v3")
    gate = gates_of(view)[0]
    x_TD = torch.randn(4, 32, device="cuda").bfloat16()
    x_TD[2] = float("nan")
    _, weights_TK, ids_TK = gate(x_TD)
    assert torch.isfinite(weights_TK).all(dim=1).tolist() == [True, True, False, True]
    assert int(ids_TK.max()) < gate.num_experts


@pytest.mark.parametrize("family", ["deepseek_v2", "mixtral", "gpt_oss"])
def test_gates_of_another_kind_are_left_alone(family: str) -> None:
    _, view = models(family)
    gates = [module for name, module in view.named_modules() if name.endswith(("gate", "router"))]
    assert not any("forward" in gate.__dict__ for gate in gates)
