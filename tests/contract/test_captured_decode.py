"""Captured decode: the tokens of whole forwards, whatever moves meanwhile. Here with graphs that are none; the same
tests run with those of CUDA in `tests.gpu.test_decode`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from actors.moe.settings import GateSettings
from actors.optim import OptimizerSettings
from actors.router.captured import CapturedForward
from actors.router.inplace import ExpertsInPlace
from actors.trunk.model import ModelSource
from tests.captured import (
    BATCHES,
    PROMPTS,
    agree,
    source,
    tokens,
    training_pins_and_growth_are_seen,
    wholes,
)
from tests.fakes.graphs import use_fake_graphs
from tests.families import FAMILIES
from tests.local import LocalCluster, cluster


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    use_fake_graphs(monkeypatch)
    return "cpu"


@contextmanager
def made(device: str, family: str, captured: str, links: str = "local", **more: Any) -> Iterator[LocalCluster]:
    with cluster(source(family), links=links, device=device, decode_batch=4, captured=captured, **more) as local:
        yield local


@pytest.mark.parametrize(
    ("family", "links"), [*((family, "local") for family in FAMILIES), ("deepseek_v2", "socket"), ("gpt_oss", "socket")]
)
def test_captured_steps_give_the_tokens_of_whole_forwards(
    device: str, family: str, links: str, forwards: list[CapturedForward]
) -> None:
    with made(device, family, "on", links) as local:
        agree(local.router, tokens(local.router))
    assert forwards[0].num_replays >= 23
    assert all(whole == (links == "local") for whole in wholes(forwards[0]))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_steps_without_graphs_do_too(device: str, family: str, forwards: list[CapturedForward]) -> None:
    with made(device, family, "off") as local:
        agree(local.router, tokens(local.router))
    assert not forwards


def test_in_bfloat16_nearly_all_tokens_are_among_the_likeliest(device: str, forwards: list[CapturedForward]) -> None:
    """Roundings may send a token to another expert."""
    values = {"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"], "eos_token_id": None}
    near: list[bool] = []
    with cluster(ModelSource(values=values, dtype="bfloat16"), device=device, decode_batch=4, captured="on") as local:
        for prompt, text in zip(PROMPTS, tokens(local.router), strict=True):
            logits_SV = local.router.serving.logits(torch.tensor([[*prompt, *text]]))[0].float()
            for number, token in enumerate(text):
                logits_V = logits_SV[len(prompt) + number - 1]
                near.append(bool(logits_V[token] >= logits_V.max() - 0.03))
    assert sum(near) >= 0.9 * len(near)
    assert all(wholes(forwards[0]))


def test_gates_of_ours_stay_between_the_graphs(device: str, forwards: list[CapturedForward]) -> None:
    with made(device, "deepseek_v3", "on", gate=GateSettings(kind="top_k", attention=True)) as local:
        local.router.begin_run(OptimizerSettings())
        for batch in BATCHES[:2]:
            local.router.train_step([batch], lr=1e-2, clip_norm=1.0)
        agree(local.router, tokens(local.router))
    assert forwards[0].num_replays >= 23
    assert not any(wholes(forwards[0]))


@pytest.mark.parametrize("experts", ["inside", "between"])
def test_training_growth_and_pins_are_seen(
    device: str, experts: str, forwards: list[CapturedForward], monkeypatch: pytest.MonkeyPatch
) -> None:
    if experts == "between":
        monkeypatch.setattr(ExpertsInPlace, "_hosts", lambda self: [])
    with made(device, "deepseek_v3", "on") as local:
        training_pins_and_growth_are_seen(local, forwards)


def test_experts_that_are_updated_beside_steps_are_not_captured(device: str, forwards: list[CapturedForward]) -> None:
    with made(device, "deepseek_v3", "on") as local:
        local.router.begin_run(OptimizerSettings(staleness=2))
        for batch in BATCHES:
            local.router.train_step([batch], lr=1e-2, clip_norm=1.0)
        found = tokens(local.router)
        agree(local.router, found)
    assert not any(wholes(forwards[0]))


def test_a_group_that_moves_is_computed_where_it_is(device: str, forwards: list[CapturedForward]) -> None:
    with made(device, "deepseek_v3", "on") as local:
        first = tokens(local.router)
        local.adopt("0", "0", "0", "1")
        agree(local.router, tokens(local.router))
        assert first
        assert any(wholes(forwards[-1]))
