"""Streams of different length in one forward get the logits that each would get alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.router.batch import plain_forward
from actors.router.slots import BLOCK, Layout, Slots, Window, layout_of
from tests.families import FAMILIES, build

CPU = torch.device("cpu")
PROMPTS = [torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(length)) for length in (7, 30, 1)]
"""One is longer than the window of gpt_oss, 16."""


def slots_of(model: PreTrainedModel) -> Slots:
    layout = layout_of(model)
    assert layout is not None
    return Slots(layout, CPU, max_slots=4, max_positions=128)


@torch.no_grad()
def add(slots: Slots, model: PreTrainedModel, prompt: Tensor) -> None:
    out = model(input_ids=prompt.unsqueeze(0), use_cache=True)
    slots.add(out.past_key_values, None, len(prompt))


@torch.no_grad()
def alone(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """[V] after the last token, without any cache."""
    return model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0, -1]


@torch.no_grad()
def step(model: PreTrainedModel, slots: Slots, texts: Sequence[Tensor], next_tokens: Sequence[int]) -> list[Tensor]:
    """Checks a forward against each text alone; -> the longer texts."""
    logits_BV = plain_forward(model, slots, next_tokens)
    longer = [torch.cat((text, torch.tensor([token]))) for text, token in zip(texts, next_tokens, strict=True)]
    for row, text in enumerate(longer):
        torch.testing.assert_close(logits_BV[row], alone(model, text), rtol=0, atol=1e-9)
        slots.lengths[row] += 1
    return longer


@pytest.fixture
def all_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families compute norms, gates and softmax in float32, whose roundings depend on the shape: here in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_gives_the_logits_of_each_stream_alone(family: str, all_double: None) -> None:
    model = build(family, torch.float64).double().eval()
    model.set_experts_implementation("eager")
    slots = slots_of(model)
    texts = [PROMPTS[0], PROMPTS[1]]
    for prompt in texts:
        add(slots, model, prompt)
    texts = step(model, slots, texts, [5, 6])
    add(slots, model, PROMPTS[2])  # joins
    for number in range(3):
        texts = step(model, slots, [*texts, PROMPTS[2]][:3], [9 + number, 4, 8])
    slots.remove(0)  # leaves, and the last takes its place
    texts = [texts[2], texts[1]]
    for number in range(2):
        texts = step(model, slots, texts, [20 + number, 30])
    assert slots.lengths == [len(text) for text in texts]


def test_a_window_of_all_layers_is_one_mask() -> None:
    config = AutoConfig.for_model("mixtral", **{**FAMILIES["mixtral"], "sliding_window": 8})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")
    slots = slots_of(model)
    assert slots.layout == Layout((8, 8), masks_by_type=False, additive=False)
    texts = list(PROMPTS)
    for prompt in texts:
        add(slots, model, prompt)
    logits_BV = plain_forward(model, slots, [5, 6, 7])
    for row, text in enumerate(texts):
        expected_V = alone(model, torch.cat((text, torch.tensor([5 + row]))))
        torch.testing.assert_close(logits_BV[row], expected_V, rtol=0, atol=1e-6)


def test_memory_grows_in_blocks_and_only_as_far_as_is_used() -> None:
    model = build("mixtral").eval()
    slots = slots_of(model)
    assert slots.num_bytes == 0
    add(slots, model, PROMPTS[1])
    one = slots.num_bytes
    heads, width = 2, 8
    assert one == 2 * 2 * heads * BLOCK * width * 4, "layers, keys and values"
    add(slots, model, PROMPTS[0])
    add(slots, model, PROMPTS[0])
    assert (slots.num_bytes, slots.generation) == (4 * one, 3)
    slots.remove(1)
    add(slots, model, PROMPTS[0])
    assert (slots.num_bytes, slots.generation) == (4 * one, 3)
    slots.reserve(99, 9999)
    assert slots.num_bytes == 4 * one, "that is all there may be"


def test_a_window_shows_what_is_not_behind_and_not_too_far_back() -> None:
    window = Window(torch.tensor([0, 3]), 5)
    assert window.visible_B11S(None).int().tolist() == [[[[1, 0, 0, 0, 0]]], [[[1, 1, 1, 1, 0]]]]
    assert window.visible_B11S(2).int().tolist() == [[[[1, 0, 0, 0, 0]]], [[[0, 0, 1, 1, 0]]]]
    both = window.masks(Layout((2, None), masks_by_type=True, additive=True), torch.float32)
    assert isinstance(both, dict)
    assert set(both) == {"sliding_attention", "full_attention"}
    assert both["sliding_attention"][1, 0, 0].tolist()[2:4] == [0, 0]
    assert both["sliding_attention"].min() == torch.finfo(torch.float32).min


def test_a_model_that_keeps_something_else_than_keys_has_no_layout() -> None:
    values: dict[str, Any] = {**FAMILIES["qwen3_moe"], "layer_types": ["linear_attention", "full_attention"]}
    model = build("qwen3_moe")
    assert layout_of(model) is not None
    model.config.layer_types = values["layer_types"]
    assert layout_of(model) is None
