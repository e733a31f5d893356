"""Experts at shapes that do not depend on the choice give what a stack gives for its pairs."""

from __future__ import annotations

import pytest
import torch

from actors.moe import static
from actors.moe.experts import ExpertStack, Work
from actors.moe.static import StaticPart, static_experts
from actors.trunk.init import initial_experts
from actors.trunk.model import ModelSource, skeleton
from tests.families import FAMILIES

NUM_EXPERTS = 8


def stacks_of(family: str) -> list[tuple[ExpertStack, list[int]]]:
    """Two, with the experts of groups of 2, the second in another order than their numbers."""
    shape = skeleton(ModelSource(values={"model_type": family, **FAMILIES[family]}))
    found = []
    for groups in ([0, 2], [3, 1]):
        tensors = initial_experts(shape, 0, groups, 2, seed=1)
        torch.manual_seed(groups[0])
        drawn = {name: torch.randn_like(tensor) * 0.2 for name, tensor in tensors.items()}  # biases start at zero
        stack = ExpertStack(shape.layers[0].template, drawn)
        found.append((stack, [g * 2 + i for g in groups for i in range(2)]))
    return found


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("choice", ["any", "one expert", "unused places"])
@pytest.mark.parametrize("has_kernel", [False, True])
def test_it_is_the_sum_over_the_stacks(
    family: str, choice: str, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static, "_has_kernel", lambda x_TD: has_kernel)
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(13, 32, generator=generator)
    ids_TK = torch.rand(13, NUM_EXPERTS, generator=generator).argsort(1)[:, :2]
    weights_TK = torch.rand(13, 2, generator=generator)
    if choice == "one expert":
        ids_TK = torch.full((13, 1), 5)
        weights_TK = weights_TK[:, :1]
    if choice == "unused places":
        ids_TK[::3, 1], weights_TK[::3, 1] = -1, 0.0
    parts, expected_TD = [], torch.zeros(13, 32)
    for stack, experts in stacks_of(family):
        parts.append(StaticPart.of(stack, {e: row for row, e in enumerate(experts)}, NUM_EXPERTS))
        pairs = [(ids_TK == expert).nonzero() for expert in experts]
        token_P = torch.cat([pair_P2[:, 0] for pair_P2 in pairs])
        weight_P = torch.cat([weights_TK[pair_P2[:, 0], pair_P2[:, 1]] for pair_P2 in pairs])
        work = Work(token_P.int(), [len(pair_P2) for pair_P2 in pairs], weight_P)
        expected_TD += stack(x_TD, work, keep=False)[0].detach()
    with torch.no_grad():
        torch.testing.assert_close(static_experts(parts, x_TD, ids_TK, weights_TK), expected_TD)


@pytest.mark.parametrize("has_kernel", [False, True])
def test_an_expert_that_overflows_is_none_of_those_tokens_that_did_not_choose_it(
    has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static, "_has_kernel", lambda x_TD: has_kernel)
    generator = torch.Generator().manual_seed(3)
    x_TD, weights_TK = torch.randn(5, 32, generator=generator), torch.rand(5, 2, generator=generator)
    ids_TK = torch.tensor([[0, 1], [1, 0], [0, 4], [5, 1], [4, 5]])  # and not 6, 7, 2 or 3
    stacks = stacks_of("mixtral")
    with torch.no_grad():
        for is_wild in (False, True):
            if is_wild:
                stacks[1][0].weights["down_proj"][0] = 1e38
            parts = [StaticPart.of(stack, {e: row for row, e in enumerate(own)}, NUM_EXPERTS) for stack, own in stacks]
            y_TD = static_experts(parts, x_TD, ids_TK, weights_TK)
            if not is_wild:
                expected_TD = y_TD
    torch.testing.assert_close(y_TD, expected_TD)
