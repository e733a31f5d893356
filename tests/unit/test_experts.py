"""The expert stack against autograd over a plain loop of experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from actors.errors import InvalidInput
from actors.moe.experts import ExpertStack, Work
from actors.moe.gradient import gradient_of
from actors.trunk.model import ModelSource, skeleton
from tests.families import FAMILIES

T, E = 24, 8


def make(family: str, counts: list[int], seed: int = 0) -> tuple[nn.Module, dict[str, Tensor], Work, Tensor]:
    torch.manual_seed(seed)
    values = {"model_type": family, **FAMILIES[family]}
    layer = skeleton(ModelSource(values=values, dtype="float64")).layers[0]
    tensors = {n: torch.randn(E, *shape, dtype=torch.float64) * 0.3 for n, shape in layer.shapes().items()}
    pairs = sum(counts)
    work = Work(torch.randint(0, T, (pairs,)), counts, torch.rand(pairs, dtype=torch.float64))
    return layer.template, tensors, work, torch.randn(T, 32, dtype=torch.float64)


def brute_force(template: nn.Module, tensors: dict[str, Tensor], work: Work, x_TD: Tensor, weight_P: Tensor) -> Tensor:
    """y[t] = sum over the pairs of t of weight * expert(x[t]), one pair at a time."""
    experts = [e for e, n in enumerate(work.counts_E) for _ in range(n)]
    y_TD = torch.zeros_like(x_TD)
    for pair, (expert, token) in enumerate(zip(experts, work.token_P.tolist(), strict=True)):
        w_in, w_out = tensors["gate_up_proj"][expert], tensors["down_proj"][expert]
        if not template.is_transposed:
            w_in, w_out = w_in.t(), w_out.t()
        hidden = x_TD[token : token + 1] @ w_in
        if "gate_up_proj_bias" in tensors:
            hidden = hidden + tensors["gate_up_proj_bias"][expert]
        out = template._apply_gate(hidden) @ w_out
        if "down_proj_bias" in tensors:
            out = out + tensors["down_proj_bias"][expert]
        y_TD = y_TD.index_add(0, torch.tensor([token]), out * weight_P[pair])
    return y_TD


SKEWS = {
    "even": [3] * E,
    "some experts idle": [0, 9, 0, 0, 4, 1, 0, 7],
    "all to one": [0, 0, 40, 0, 0, 0, 0, 0],
    "nothing": [0] * E,
}


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("max_pairs", [1, 7, 1000])
def test_forward_and_all_gradients(family: str, skew: str, max_pairs: int) -> None:
    template, tensors, work, x_TD = make(family, SKEWS[skew])
    stack = ExpertStack(template, {n: t.clone() for n, t in tensors.items()}, max_pairs=max_pairs)
    y_TD, saved = stack(x_TD, work, keep=True)
    grad_y = torch.randn_like(y_TD)
    assert saved is not None
    grad_x, grad_weight, part = stack.backward(saved, grad_y)
    if part is not None:
        stack.accumulate(part)

    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    x_leaf, weight_leaf = x_TD.clone().requires_grad_(), work.weight_P.clone().requires_grad_()
    expected = brute_force(template, leaves, work, x_leaf, weight_leaf)
    torch.testing.assert_close(y_TD, expected.detach())
    if not sum(work.counts_E):
        assert not grad_x.any()
        return
    expected.backward(grad_y)
    torch.testing.assert_close(grad_x, x_leaf.grad)
    torch.testing.assert_close(grad_weight, weight_leaf.grad)
    for name, leaf in leaves.items():
        torch.testing.assert_close(stack.get_parameter(name).grad, leaf.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_micro_batches_accumulate() -> None:
    template, tensors, work, x_TD = make("deepseek_v3", SKEWS["even"])
    once = ExpertStack(template, {n: t.clone() for n, t in tensors.items()})
    twice = ExpertStack(template, {n: t.clone() for n, t in tensors.items()})
    for stack, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            _, saved = stack(x_TD, work, keep=True)
            assert saved is not None
            stack.accumulate(stack.backward(saved, torch.ones_like(x_TD))[2])
    for name in tensors:
        torch.testing.assert_close(twice.get_parameter(name).grad, 2 * once.get_parameter(name).grad)


def test_nothing_is_kept_without_keep() -> None:
    template, tensors, work, x_TD = make("deepseek_v3", SKEWS["even"])
    y_TD, saved = ExpertStack(template, tensors)(x_TD, work, keep=False)
    assert saved is None
    assert not y_TD.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near(dtype: torch.dtype) -> None:
    template, tensors, work, x_TD = make("deepseek_v3", SKEWS["even"])
    exact, _ = ExpertStack(template, tensors)(x_TD, work, keep=False)
    low = {n: t.to(dtype) for n, t in tensors.items()}
    low_work = Work(work.token_P, work.counts_E, work.weight_P.float())
    y_TD, saved = ExpertStack(template, low)(x_TD.to(dtype), low_work, keep=True)
    assert y_TD.dtype == dtype
    assert saved is not None
    error = (y_TD.double() - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("work", "field"),
    [
        (Work(torch.zeros(3, dtype=torch.int64), [3], torch.ones(3)), "counts_E"),
        (Work(torch.zeros(3, dtype=torch.int64), [-1] + [0] * 7, torch.ones(3)), "counts_E"),
        (Work(torch.zeros(2, dtype=torch.int64), [3] + [0] * 7, torch.ones(3)), "token_P"),
        (Work(torch.full((3,), T), [3] + [0] * 7, torch.ones(3)), "token_P"),
        (Work(torch.full((3,), -1), [3] + [0] * 7, torch.ones(3)), "token_P"),
    ],
)
def test_work_that_does_not_fit_is_refused(work: Work, field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        work.check(T, E)


def test_the_templates_of_all_families_are_understood(tmp_path: Path) -> None:
    for family, values in FAMILIES.items():
        found = skeleton(ModelSource(values={"model_type": family, **values}))
        assert found.num_experts == 8, family
        assert found.top_k == 2, family
        assert all(p.device.type == "meta" for p in found.model.parameters())


@pytest.mark.parametrize("counts", list(SKEWS.values()))
@pytest.mark.parametrize("max_pairs", [1, 4, 7, 1000])
def test_parts_of_work_hold_every_pair_once(counts: list[int], max_pairs: int) -> None:
    pairs = sum(counts)
    parts = list(Work(torch.arange(pairs), counts, torch.rand(pairs)).parts(max_pairs))
    assert all(sum(p.counts_E) == len(p.token_P) == len(p.weight_P) <= max_pairs for p in parts)
    assert [t for p in parts for t in p.token_P.tolist()] == list(range(pairs))
    assert [sum(column) for column in zip(*(p.counts_E for p in parts), strict=True)] == (counts if pairs else [])


def test_memory_of_a_skewed_load_is_bounded() -> None:
    """What a host keeps between forward and backward does not grow with the width of its experts."""
    template, tensors, work, x_TD = make("mixtral", [0, 0, 4000, 0, 0, 0, 0, 0])
    _, saved = ExpertStack(template, tensors, max_pairs=256)(x_TD, work, keep=True)
    assert saved is not None
    assert saved.activations is None
    assert saved.x_TD is x_TD


def test_room_that_was_made_before_is_what_room_made_now_is() -> None:
    template, tensors, work, x_TD = make("gpt_oss", SKEWS["some experts idle"])
    stacks = [ExpertStack(template, {n: t.clone() for n, t in tensors.items()}) for _ in range(2)]
    for stack in stacks:
        y_TD, saved = stack(x_TD, work, keep=True)
        _, _, part = stack.backward(saved, torch.ones_like(y_TD))
        assert part is not None
        stack.accumulate(part)
    prepared = stacks[0].room_for(E + 4)
    stacks[0].resize(E + 4, [torch.ones(1), *reversed(prepared)])
    stacks[1].resize(E + 4)
    for mine, theirs in zip(stacks[0].parameters(), stacks[1].parameters(), strict=True):
        assert len(mine) == E + 4
        assert torch.equal(mine, theirs)
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)
        assert bool(mine.grad.any())
        assert {mine.data_ptr(), mine.grad.data_ptr()} <= {tensor.data_ptr() for tensor in prepared}
    stacks[0].resize(E)
    assert stacks[0].num_experts == E + 4, "it makes room, and gives none back"


def test_gradient_of_is_that_of_autograd() -> None:
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y_TD, grad_TD = x_TD.exp() * x_TD, torch.randn(5, 3, dtype=torch.float64)
    (expected_TD,) = torch.autograd.grad(y_TD, x_TD, grad_TD, retain_graph=True)
    with torch.no_grad():
        assert torch.equal(gradient_of(y_TD, x_TD, grad_TD), expected_TD)
