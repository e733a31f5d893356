"""The experts as a GPU computes them, here on a CPU: against autograd over a plain loop of experts."""

from __future__ import annotations

import pytest
import torch

from actors.expert.host import ExpertHost
from actors.moe.cache import CacheSettings
from actors.moe.device import DeviceExperts, default_max_pairs, is_swiglu
from actors.moe.experts import MAX_PAIRS, Work
from actors.moe.passes import add_at, gated, gated_backward_
from actors.trunk.model import ModelSource, skeleton
from tests.families import FAMILIES
from tests.unit.test_experts import SKEWS, brute_force, make


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("max_pairs", [7, 1000])
def test_forward_and_all_gradients(family: str, skew: str, max_pairs: int) -> None:
    template, tensors, work, x_TD = make(family, SKEWS[skew])
    stack = DeviceExperts(template, {n: t.clone() for n, t in tensors.items()}, max_pairs=max_pairs)
    assert stack.is_fused == (family == "deepseek_v3")
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    x_leaf, weight_leaf = x_TD.clone().requires_grad_(), work.weight_P.clone().requires_grad_()
    expected = brute_force(template, leaves, work, x_leaf, weight_leaf)
    grad_y = torch.randn_like(x_TD)
    for times in (1, 2):  # the second adds to what the first left
        y_TD, saved = stack(x_TD, work, keep=True)
        assert saved is not None
        grad_x, grad_weight, part = stack.backward(saved, grad_y)
        if part is not None:
            stack.accumulate(part)
        torch.testing.assert_close(y_TD, expected.detach())
        if not sum(work.counts_E):
            assert not grad_x.any()
            return
        if times == 1:
            expected.backward(grad_y)
        torch.testing.assert_close(grad_x, x_leaf.grad)
        torch.testing.assert_close(grad_weight, weight_leaf.grad)
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            torch.testing.assert_close(stack.gradient(name), times * leaf.grad, msg=lambda m, n=name: f"{n}: {m}")
    stack.zero_gradients()
    assert not any(stack.gradient(name).any() for name in tensors)


def test_outputs_without_keep_are_the_same() -> None:
    template, tensors, work, x_TD = make("deepseek_v3", SKEWS["some experts idle"])
    stack = DeviceExperts(template, tensors)
    y_TD, saved = stack(x_TD, work, keep=False)
    assert saved is None
    assert torch.equal(y_TD, stack(x_TD, work, keep=True)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_other_gating_functions_go_the_general_way(family: str) -> None:
    layer = skeleton(ModelSource(values={"model_type": family, **FAMILIES[family]})).layers[0]
    assert is_swiglu(layer.template, list(layer.shapes())) == (family != "gpt_oss")


def test_a_clamp_is_found() -> None:
    template, tensors, *_ = make("deepseek_v3", SKEWS["even"])

    class Clamped(type(template)):  # type: ignore[misc]
        def _apply_gate(self, pre_PH: torch.Tensor) -> torch.Tensor:
            gate_PI, up_PI = pre_PH.chunk(2, dim=-1)
            result: torch.Tensor = self.act_fn(gate_PI.clamp(max=10)) * up_PI
            return result

    template.__class__ = Clamped
    assert not is_swiglu(template, list(tensors))
    assert not is_swiglu(make("deepseek_v3", SKEWS["even"])[0], [*tensors, "down_proj_bias"])


def test_activation_and_weight_are_differentiated_together() -> None:
    torch.manual_seed(0)
    pre_PH = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    weight_P = torch.rand(9, dtype=torch.float64, requires_grad=True)
    grad_PI = torch.randn(9, 6, dtype=torch.float64)
    gate_PI, up_PI = pre_PH.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate_PI) * up_PI
    torch.testing.assert_close(gated(pre_PH.detach(), weight_P.detach()), (expected * weight_P[:, None]).detach())
    (expected * grad_PI * weight_P[:, None]).sum().backward()
    place = pre_PH.detach().clone()
    torch.testing.assert_close(gated_backward_(place, grad_PI, weight_P.detach()), weight_P.grad)
    torch.testing.assert_close(place, pre_PH.grad)


def test_rows_are_added_where_they_belong() -> None:
    into, rows = torch.ones(4, 3), torch.arange(6.0).view(2, 3)
    add_at(into, torch.tensor([0, 2]), rows)
    assert into.tolist() == [[1, 2, 3], [1, 1, 1], [4, 5, 6], [1, 1, 1]]
    add_at(into, torch.arange(4), torch.ones(4, 3))
    assert into[1].tolist() == [2, 2, 2]


def test_a_large_card_keeps_more_pairs_in_one_piece() -> None:
    tensors = {"down_proj": torch.empty(1, 2048, 1408, dtype=torch.bfloat16, device="meta")}
    template = make("deepseek_v3", SKEWS["even"])[0]
    assert default_max_pairs(tensors, template, 80 << 30, 5) > 8 * 2048 * 6
    assert default_max_pairs(tensors, template, 1 << 30, 5) == MAX_PAIRS


def test_counts_are_brought_to_the_device_once() -> None:
    work = Work(torch.zeros(6, dtype=torch.int64), [1, 0, 3, 2], torch.ones(6)).to(torch.device("cpu"))
    (part,) = work.parts(100)
    assert part.counts_E.ends_on(torch.device("cpu")).tolist() == [1, 1, 4, 6]  # type: ignore[attr-defined]
    assert part.counts_E.ends_on(torch.device("cpu")) is part.counts_E.ends_on(torch.device("cpu"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("cache", [None, CacheSettings(1)], ids=["on the device", "behind it"])
@pytest.mark.parametrize(("max_pairs", "is_whole"), [(3, False), (4, True), (0, True)])
def test_a_host_keeps_as_many_pairs_as_it_is_told(cache: CacheSettings | None, max_pairs: int, is_whole: bool) -> None:
    source = ModelSource(values={"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]})
    host = ExpertHost("host", source, [0], group_size=2, cache=cache, max_pairs=max_pairs)
    work = Work(torch.arange(4), [3, 1], torch.ones(4))
    _, saved = host.holdings.stacks[0](torch.randn(4, 32), work, keep=True)
    host.close()
    assert saved is not None
    assert (saved.activations is not None) == is_whole
