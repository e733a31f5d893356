"""Captured decode: the tokens of whole forwards, whatever moves meanwhile. Here with graphs that are none; the same
tests run with those of CUDA in `tests.gpu.test_decode`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from actors.moe.settings import GateSettings
from actors.optim import OptimizerSettings
from actors.router import captured
from actors.router.captured import CapturedForward
from actors.router.inplace import ExpertsInPlace
from actors.trunk.model import ModelSource
from actors.values import Growth, Sampling, VersionChoice
from tests.fakes.graphs import use_fake_graphs
from tests.families import FAMILIES
from tests.local import LocalCluster, cluster

BATCHES = [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(t)) for t in range(4)]
LENGTHS = (5, 30, 1, 12)
PROMPTS = [torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
SAMPLING = Sampling(max_tokens=24)


def source(family: str) -> ModelSource:
    return ModelSource(values={"model_type": family, **FAMILIES[family], "eos_token_id": None})


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "SEEN_BEFORE", 0)
    monkeypatch.setattr(captured, "SETTLED_AFTER", 5)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    use_fake_graphs(monkeypatch)
    return "cpu"


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[CapturedForward]:
    """Those that are made."""
    found: list[CapturedForward] = []
    before = CapturedForward.__init__

    def init(self: CapturedForward, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(CapturedForward, "__init__", init)
    return found


@contextmanager
def made(device: str, family: str, captured: str, links: str = "local", **more: Any) -> Iterator[LocalCluster]:
    with cluster(source(family), links=links, device=device, decode_batch=4, captured=captured, **more) as local:
        yield local


def tokens(local: LocalCluster, prompts: Sequence[list[int]] = PROMPTS, choice: VersionChoice = VersionChoice()) -> Any:  # noqa: B008
    def one(prompt: list[int]) -> list[int]:
        events = local.router.serving.generate(prompt, SAMPLING, timeout_s=60, choice=choice)
        return [event.token for event in events]

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


def agree(local: LocalCluster, found: Sequence[list[int]], least: float = 0.0) -> None:
    """Each token is, up to rounding, the likeliest by a forward over everything before it."""
    for prompt, text in zip(PROMPTS, found, strict=False):
        logits_SV = local.router.serving.logits(torch.tensor([[*prompt, *text]]))[0].float()
        for number, token in enumerate(text):
            logits_V = logits_SV[len(prompt) + number - 1]
            assert logits_V[token] >= logits_V.max() - 1e-3, (len(prompt), number)


@pytest.mark.parametrize(
    ("family", "links"), [*((family, "local") for family in FAMILIES), ("deepseek_v2", "socket"), ("gpt_oss", "socket")]
)
def test_captured_steps_give_the_tokens_of_whole_forwards(
    device: str, family: str, links: str, forwards: list[CapturedForward]
) -> None:
    with made(device, family, "on", links) as local:
        agree(local, tokens(local))
    assert forwards[0].num_replays >= 23
    assert all(step.is_whole == (links == "local") for step in forwards[0]._steps.values())


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_steps_without_graphs_do_too(device: str, family: str, forwards: list[CapturedForward]) -> None:
    with made(device, family, "off") as local:
        agree(local, tokens(local))
    assert not forwards


def test_in_bfloat16_nearly_all_tokens_are_among_the_likeliest(device: str, forwards: list[CapturedForward]) -> None:
    """Roundings may send a token to another expert."""
    values = {"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"], "eos_token_id": None}
    near: list[bool] = []
    with cluster(ModelSource(values=values, dtype="bfloat16"), device=device, decode_batch=4, captured="on") as local:
        for prompt, text in zip(PROMPTS, tokens(local), strict=True):
            logits_SV = local.router.serving.logits(torch.tensor([[*prompt, *text]]))[0].float()
            for number, token in enumerate(text):
                logits_V = logits_SV[len(prompt) + number - 1]
                near.append(bool(logits_V[token] >= logits_V.max() - 0.03))
    assert sum(near) >= 0.9 * len(near)
    assert all(step.is_whole for step in forwards[0]._steps.values())


def test_gates_of_ours_stay_between_the_graphs(device: str, forwards: list[CapturedForward]) -> None:
    with made(device, "deepseek_v3", "on", gate=GateSettings(kind="top_k", attention=True)) as local:
        local.router.begin_run(OptimizerSettings())
        for batch in BATCHES[:2]:
            local.router.train_step([batch], lr=1e-2, clip_norm=1.0)
        agree(local, tokens(local))
    assert forwards[0].num_replays >= 23
    assert not any(step.is_whole for step in forwards[0]._steps.values())


@pytest.mark.parametrize("experts", ["inside", "between"])
def test_training_growth_and_pins_are_seen(
    device: str, experts: str, forwards: list[CapturedForward], monkeypatch: pytest.MonkeyPatch
) -> None:
    if experts == "between":
        monkeypatch.setattr(ExpertsInPlace, "_hosts", lambda self: [])
    with made(device, "deepseek_v3", "on") as local:
        local.router.begin_run(OptimizerSettings())
        agree(local, tokens(local))
        captures = forwards[0].num_captures
        local.router.train_step([BATCHES[0]], lr=1e-2, clip_norm=1.0)
        agree(local, tokens(local))
        assert forwards[0].num_captures == captures, "updates are made in place"
        local.router.pin("kept")
        kept = tokens(local, choice=VersionChoice(pin="kept"))
        local.router.train_step([BATCHES[1]], lr=1e-2, clip_norm=1.0)  # on copies: the pin keeps the others
        agree(local, tokens(local))
        assert tokens(local, choice=VersionChoice(pin="kept")) == kept
        local.grow(Growth(16))
        agree(local, tokens(local))


def test_experts_that_are_updated_beside_steps_are_not_captured(device: str, forwards: list[CapturedForward]) -> None:
    with made(device, "deepseek_v3", "on") as local:
        local.router.begin_run(OptimizerSettings(staleness=2))
        for batch in BATCHES:
            local.router.train_step([batch], lr=1e-2, clip_norm=1.0)
        found = tokens(local)
        agree(local, found)
    assert not any(step.is_whole for step in forwards[0]._steps.values())


def test_a_group_that_moves_is_computed_where_it_is(device: str, forwards: list[CapturedForward]) -> None:
    with made(device, "deepseek_v3", "on") as local:
        first = tokens(local)
        local.adopt("0", "0", "0", "1")
        agree(local, tokens(local))
        assert first
        assert any(step.is_whole for step in forwards[-1]._steps.values())
