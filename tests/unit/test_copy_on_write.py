"""Updates that write new tensors: whoever computes with the weights of before has them whole, and the numbers are those
of updates in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from actors.errors import InvalidInput
from actors.expert.holdings import Holdings, LayerStep
from actors.expert.residency import Quarters
from actors.moe.cache import CacheSettings
from actors.moe.experts import ExpertStack, Work
from actors.moe.optimizer import GroupOptimizer
from actors.optim import OptimizerSettings
from actors.trunk.init import initial_experts
from actors.trunk.model import ModelSource, Skeleton, skeleton
from tests.families import FAMILIES

T, E = 12, 4
COUNTS = [5, 0, 9, 3]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("max_pairs", [4, 1000])
def test_backward_uses_the_weights_of_its_forward(family: str, max_pairs: int) -> None:
    torch.manual_seed(0)
    layer = skeleton(ModelSource(values={"model_type": family, **FAMILIES[family]}, dtype="float64")).layers[0]
    old, new = ({n: torch.randn(E, *s).double() for n, s in layer.shapes().items()} for _ in range(2))
    pairs = sum(COUNTS)
    work = Work(torch.randint(0, T, (pairs,)), COUNTS, torch.rand(pairs).double())
    x_TD, grad_y = torch.randn(T, 32).double(), torch.randn(T, 32).double()

    def pass_of(stack: ExpertStack, between: dict[str, Tensor] | None) -> list[Tensor]:
        y_TD, saved = stack(x_TD, work, keep=True)
        if between is not None:
            stack.switch(between)
        grad_x, grad_weight, part = stack.backward(saved, grad_y)
        if part is not None:
            stack.accumulate(part)
        return [y_TD, grad_x, grad_weight, *(stack.gradient(name) for name in stack.names)]

    undisturbed = ExpertStack(layer.template, old, max_pairs=max_pairs)
    switched = ExpertStack(layer.template, old, max_pairs=max_pairs)
    expected = pass_of(undisturbed, None)
    for mine, theirs in zip(pass_of(switched, new), expected, strict=True):
        assert torch.equal(mine, theirs)
    y_new, _ = switched(x_TD, work, keep=False)
    assert torch.equal(y_new, ExpertStack(layer.template, new, max_pairs=max_pairs)(x_TD, work, keep=False)[0])
    assert not torch.equal(y_new, expected[0])
    y_old, _ = switched(x_TD, work, keep=False, weights=undisturbed.weights)
    assert torch.equal(y_old, expected[0]), "a version that somebody holds can still be computed with"


@pytest.fixture(scope="module")
def model() -> Skeleton:
    return skeleton(ModelSource(values={"model_type": "mixtral", **FAMILIES["mixtral"]}, dtype="float32"))


def held(model: Skeleton, groups: Sequence[int], cache: CacheSettings | None = None) -> Holdings:
    def load(layer: int, groups: Sequence[int]) -> dict[str, Tensor]:
        return initial_experts(model, layer, groups, 2, 0)

    holdings = Holdings(Quarters(model, 2, torch.device("cpu"), cache), groups, load)
    holdings.begin_run(OptimizerSettings(lr=1e-2))
    return holdings


def fill(holdings: Holdings, seed: int) -> None:
    """Gradients, the same for a group wherever it is."""
    for group in holdings.groups:
        for layer in range(len(holdings.stacks)):
            generator = torch.Generator().manual_seed(1000 * seed + 10 * group + layer)
            for gradient in holdings.gradients(group, layer):
                gradient.copy_(torch.randn(gradient.shape, generator=generator))


def test_the_numbers_are_those_of_updates_in_place(model: Skeleton) -> None:
    here, beside = held(model, (0, 2)), held(model, (2, 0))
    for seed in range(3):
        for holdings in (here, beside):
            fill(holdings, seed)
        here.update(1e-2, 0.5)
        before = [stack.weights for stack in beside.stacks]
        copies = [{name: t.clone() for name, t in weights.items()} for weights in before]
        for layer, taken in enumerate(beside.take_gradients()):
            steps = {group: [LayerStep(parts, 1e-2, 0.5)] for group, parts in taken.groups.items()}
            beside.stacks[layer].switch(beside.updated(layer, steps))
            beside.give_back(layer, taken)
        for weights, copy in zip(before, copies, strict=True):
            assert all(torch.equal(weights[name], copy[name]) for name in copy), "nobody writes to these any more"
        assert not any(g.any() for g in beside.gradients(0, 0)), "the next step's gradients begin at zero"
        for group in (0, 2):
            for layer in range(len(here.stacks)):
                (mine, count), (theirs, other) = beside.read(group, layer), here.read(group, layer)
                assert count == other == seed + 1
                assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_memory_is_used_again_once_nobody_holds_the_version(model: Skeleton) -> None:
    holdings = held(model, (0, 1))
    stack = holdings.stacks[0]

    def update() -> set[int]:
        fill(holdings, 1)
        taken = holdings.take_gradients()
        fresh = holdings.updated(0, {group: [LayerStep(parts, 1e-2, 1.0)] for group, parts in taken[0].groups.items()})
        stack.switch(fresh)
        holdings.give_back(0, taken[0])
        return {tensor.data_ptr() for tensor in fresh.values()}

    update()
    kept = stack.weights
    copy = {name: tensor.clone() for name, tensor in kept.items()}
    pointers = {tensor.data_ptr() for tensor in kept.values()}
    used = [update() for _ in range(4)]
    assert all(torch.equal(kept[name], copy[name]) for name in copy)
    assert all(not pointers & each for each in used)
    assert used[0] & used[2], "nobody held the version in between"
    assert used[1] & used[3]
    del kept
    used = [update() for _ in range(2)]
    assert any(pointers & each for each in used)
    stack.resize(6)
    assert not stack._spare_weights
    assert not stack._spare_gradients


def test_an_expert_cache_has_one_version(model: Skeleton) -> None:
    with pytest.raises(InvalidInput, match="expert_cache_size"):
        held(model, (0, 1), CacheSettings(1)).take_gradients()


def test_one_step_in_the_place_of_several_keeps_moments_and_count() -> None:
    """With the same gradient k times the averages and their bias correction are those after k steps."""
    first, gradient = (torch.randn(5, 3, 2, dtype=torch.float64) for _ in range(2))
    settings = OptimizerSettings(weight_decay=0.0)
    weights = [nn.Parameter(torch.ones(5, 3, 2, dtype=torch.float64)) for _ in range(2)]
    one, several = (
        GroupOptimizer(settings, [{"w": w}], lambda layer, name: (torch.zeros_like(first), torch.zeros_like(first)))
        for w in weights
    )
    for optimizer in (one, several):
        optimizer.step(0, {"w": first.clone()}, settings.lr, 1.0)
    before = weights[0].detach().clone()
    one.step(0, {"w": gradient.clone()}, 3 * settings.lr, 1.0, num_updates=3)
    for _ in range(3):
        several.step(0, {"w": gradient.clone()}, settings.lr, 1.0)
    assert one.updates(0) == several.updates(0) == 4
    mine, theirs = one.moments(0, "w"), several.moments(0, "w")
    assert mine is not None
    assert theirs is not None
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    average, square = mine[0] / (1 - settings.beta1**4), mine[1] / (1 - settings.beta2**4)
    moved = 3 * settings.lr * average / (square.sqrt() + settings.eps)
    torch.testing.assert_close(weights[0].detach(), before - moved, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sparse", ["none", "skip"])
def test_what_is_not_stepped_is_copied(model: Skeleton, sparse: Literal["none", "skip"]) -> None:
    """Groups without a step, free places, experts without a gradient; memory that is used again has other numbers."""
    holdings = held(model, (0, 2))
    holdings.begin_run(OptimizerSettings(lr=1e-2, sparse=sparse))
    holdings.make_room(1)
    stack = holdings.stacks[0]
    for number in range(4):
        before = {name: tensor.clone() for name, tensor in stack.weights.items()}
        for gradient in holdings.gradients(0, 0):
            gradient[1].fill_(1e-2)
        taken = holdings.take_gradients()
        fresh = holdings.updated(0, {0: [LayerStep(taken[0].groups[0], 1e-2, 1.0)]}, lambda: None)
        stack.switch(fresh)
        holdings.give_back(0, taken[0])
        for name, now in stack.weights.items():
            changed = [not torch.equal(now[e], before[name][e]) for e in range(len(now))]
            # Under `none` the other expert decays; without moments it has no other step.
            assert changed == [sparse == "none" and bool((before[name][0]).any()), True, False, False, False, False], (
                name,
                number,
            )
