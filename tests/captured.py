"""Streams whose steps are captured, and what must hold of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from actors.optim import OptimizerSettings
from actors.router.captured import CapturedForward
from actors.router.router import Router
from actors.trunk.model import ModelSource
from actors.values import Growth, Sampling, VersionChoice
from tests.families import FAMILIES
from tests.local import LocalCluster

BATCHES = [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(t)) for t in range(4)]
PROMPTS = [torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 30, 1, 12)]
NEWEST = VersionChoice()


def source(family: str) -> ModelSource:
    return ModelSource(values={"model_type": family, **FAMILIES[family], "eos_token_id": None})


def wholes(forward: CapturedForward) -> list[bool]:
    """Of each captured step: whether experts are computed inside."""
    return [step.is_whole for step in forward._steps.values()]


def tokens(
    router: Router,
    max_tokens: int = 24,
    *,
    choice: VersionChoice = NEWEST,
    at: int = 0,
    then: Callable[[], object] | None = None,
) -> list[list[int]]:
    """Of a stream for each prompt, all at once. `then` is called once the first has `at` of them."""

    def one(number: int) -> list[int]:
        found: list[int] = []
        sampling = Sampling(max_tokens=max_tokens)
        for event in router.serving.generate(PROMPTS[number], sampling, timeout_s=60, choice=choice):
            found.append(event.token)
            if then is not None and number == 0 and len(found) == at:
                then()
        return found

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(one, range(len(PROMPTS))))


def agree(router: Router, found: Sequence[Sequence[int]]) -> None:
    """Each token is, up to rounding, the likeliest by a forward over everything before it."""
    for prompt, text in zip(PROMPTS, found, strict=True):
        logits_SV = router.serving.logits(torch.tensor([[*prompt, *text]]))[0].float()
        for number, token in enumerate(text):
            logits_V = logits_SV[len(prompt) + number - 1]
            assert logits_V[token] >= logits_V.max() - 1e-3, (len(prompt), number)


def training_pins_and_growth_are_seen(local: LocalCluster, forwards: Sequence[CapturedForward]) -> None:
    router = local.router
    router.begin_run(OptimizerSettings())
    agree(router, tokens(router))
    captures = forwards[0].num_captures
    router.train_step([BATCHES[0]], lr=1e-2, clip_norm=1.0)
    agree(router, tokens(router))
    assert forwards[0].num_captures == captures, "updates are made in place"
    router.pin("kept")
    kept = tokens(router, choice=VersionChoice(pin="kept"))
    router.train_step([BATCHES[1]], lr=1e-2, clip_norm=1.0)  # on copies: the pin keeps the others
    agree(router, tokens(router))
    assert tokens(router, choice=VersionChoice(pin="kept")) == kept
    local.grow(Growth(16))
    agree(router, tokens(router))
