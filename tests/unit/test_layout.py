"""What expert actors are told of a model: enough to compute what the family computes, without transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.errors import InvalidInput
from actors.moe.experts import ExpertStack
from actors.moe.form import ExpertForm, form_of
from actors.trunk.draws import Draw, draws_of
from actors.trunk.init import initial_experts
from actors.trunk.layout import layout_from_json, layout_of
from actors.trunk.model import DTYPES, ModelSource, skeleton
from tests.families import FAMILIES
from tests.unit.test_experts import SKEWS, make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_layout_of_every_family_says_what_its_modules_do(family: str, dtype: str) -> None:
    model = skeleton(ModelSource(values={"model_type": family, **FAMILIES[family]}, dtype=dtype))
    layout = layout_of(model)
    assert layout is not None
    assert (layout.num_experts, layout.dtype) == (model.num_experts, DTYPES[dtype])
    assert [(layer.name, layer.shapes()) for layer in layout.layers] == [
        (layer.name, layer.shapes()) for layer in model.layers
    ]
    assert layout_from_json(layout.to_json()) == layout


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_a_stack_computes_the_same_bits_with_the_form_as_with_the_module(family: str) -> None:
    template, tensors, work, x_TD = make(family, SKEWS["some experts idle"])
    form = form_of(template, torch.float64)
    assert form is not None
    found = []
    for each in (template, form):
        stack = ExpertStack(each, {name: tensor.clone() for name, tensor in tensors.items()})
        y_TD, saved = stack(x_TD, work, keep=True)
        assert saved is not None
        grad_x_TD, grad_weight_P, part = stack.backward(saved, torch.ones_like(y_TD))
        assert part is not None
        stack.accumulate(part)
        found.append([y_TD, grad_x_TD, grad_weight_P, *(stack.gradient(name) for name in stack.names)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_experts_are_the_same_bits_by_the_layout_as_by_the_family(family: str, dtype: str) -> None:
    model = skeleton(ModelSource(values={"model_type": family, **FAMILIES[family]}, dtype=dtype))
    layout = layout_of(model)
    assert layout is not None
    assert layout.knows_draws
    for layer in range(len(model.layers)):
        ours, theirs = (initial_experts(known, layer, [0, 3], 2, seed=7) for known in (layout, model))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == model.dtype for name in ours)
        assert any(tensor.any() for tensor in ours.values())


def one_by_one(module: Any) -> None:
    for expert in module.gate_up_proj:
        expert.normal_()


def other_for_many(module: Any) -> None:
    module.gate_up_proj.normal_(0.0, 1.0 / len(module.gate_up_proj))


def orthogonal(module: Any) -> None:
    torch.nn.init.orthogonal_(module.down_proj)


@pytest.mark.parametrize("draw", [one_by_one, other_for_many, orthogonal])
def test_weights_drawn_in_a_way_without_a_name_are_left_to_the_family(
    draw: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = skeleton(ModelSource(values={"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]}))
    monkeypatch.setattr(type(model.model), "_init_weights", lambda self, module: draw(module))
    assert draws_of(model) == [None, None]
    layout = layout_of(model)
    assert layout is not None
    assert not layout.knows_draws


def test_what_fills_no_tensor_is_not_called() -> None:
    with pytest.raises(InvalidInput, match="apply_"):
        Draw("down_proj", "apply_", ())


class Strange:
    """A family's module, as far as its function goes."""

    is_transposed, has_gate = False, True

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def _apply_gate(self, pre_PH: Tensor) -> Tensor:
        gate_PI, up_PI = pre_PH.chunk(2, dim=-1)
        return F.silu(gate_PI.clamp(max=2000.0)) * up_PI

    def act_fn(self, pre_PI: Tensor) -> Tensor:
        return F.relu(pre_PI) ** 2


@pytest.mark.parametrize("template", [Strange(), Strange(has_gate=False), Strange(alpha=1.7, limit=7.0)])
def test_what_has_no_name_is_not_taken_for_something_else(template: Strange) -> None:
    assert form_of(template, torch.float32) is None


def test_an_activation_without_a_gate_has_a_name() -> None:
    template = Strange(has_gate=False, act_fn=F.gelu)
    assert form_of(template, torch.float32) == ExpertForm(is_transposed=False, gating="none", activation="gelu")
