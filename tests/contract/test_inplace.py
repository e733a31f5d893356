"""Experts of the router's own process: computed there, they give the logits that their actors give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actors.moe.cache import CacheSettings
from actors.optim import OptimizerSettings
from actors.router.captured import _instead_of_experts
from actors.router.inplace import ExpertsInPlace
from actors.trunk.model import ModelSource
from actors.values import Growth
from tests.families import FAMILIES
from tests.local import LocalCluster, cluster

SOURCE = ModelSource(values={"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]})
BATCHES = [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(t)) for t in range(4)]


def train(local: LocalCluster) -> None:
    local.router.train_step([BATCHES[local.router.version % 4]], lr=1e-2, clip_norm=1.0)


def experts_of(local: LocalCluster) -> ExpertsInPlace:
    return ExpertsInPlace(local.router.state.requests, torch.device("cpu"))


def is_here(local: LocalCluster) -> bool:
    with local.router.serving.reading(), experts_of(local).holding() as standing:
        return standing is not None


def check(local: LocalCluster) -> Any:
    """-> how they stand."""
    serving, experts = local.router.serving, experts_of(local)
    expected_BSV = serving.logits(BATCHES[0])
    with serving.reading(16), experts.holding() as standing:
        assert standing is not None
        computed = standing.inside()

        def inside(
            layer: int, module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, meanwhile: Any = None, /
        ) -> Tensor:
            return computed.layer(layer, x, ids, weights, meanwhile)

        view = local.router.learner.view
        with torch.no_grad(), _instead_of_experts(view, inside):
            torch.testing.assert_close(view(input_ids=BATCHES[0], use_cache=False).logits, expected_BSV)
    torch.testing.assert_close(serving.logits(BATCHES[0]), expected_BSV, rtol=0, atol=0)
    return standing


def test_they_are_found_wherever_they_go() -> None:
    with cluster(SOURCE, redundancy=2) as local:
        local.router.begin_run(OptimizerSettings())
        before = check(local)
        train(local)
        assert check(local).is_as(before), "updates are made in place"
        local.router.pin("kept")
        train(local)
        on_copies = check(local)
        assert not on_copies.is_as(before)
        local.adopt("1", "1", "1", "0")
        moved = check(local)
        assert not moved.is_as(on_copies)
        local.grow(Growth(16))
        assert not check(local).is_as(moved)


@pytest.mark.parametrize("how", ["over sockets", "behind a cache", "updated beside steps", "dead"])
def test_they_are_not_there(how: str) -> None:
    links = "socket" if how == "over sockets" else "local"
    cache = CacheSettings(1) if how == "behind a cache" else None
    with cluster(SOURCE, links=links, cache=cache) as local:
        local.router.begin_run(OptimizerSettings(staleness=2 if how == "updated beside steps" else 0))
        if how == "dead":
            assert is_here(local)
            local.router.state.requests.links.close_some(["expert-1"])
            local.members["expert-1"].kill()
        assert not is_here(local)
