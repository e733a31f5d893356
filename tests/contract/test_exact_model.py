"""The model that `moe-cluster chaos --dtype float64` compares losses with: they do not depend on who computes what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from actors.optim import OptimizerSettings
from actors.trunk.model import ModelSource
from cluster.chaos.run import EXACT_MODEL
from cluster.configfile import find_config, load_model
from tests.local import LocalCluster, cluster

MODEL = load_model(find_config(EXACT_MODEL, "models"))
BATCHES = [torch.randint(97, 123, (4, 32), generator=torch.Generator().manual_seed(t)) for t in range(30)]


def source(dtype: str = "float64") -> ModelSource:
    return ModelSource(values=MODEL.values, seed=MODEL.seed, dtype=dtype)


def train(local: LocalCluster, between: Mapping[int, Callable[[], object]] | None = None) -> list[float]:
    local.router.begin_run(OptimizerSettings())
    losses = []
    for number, batch in enumerate(BATCHES):
        if between and number in between:
            between[number]()
        losses.append(local.router.train_step([batch], lr=1e-2, clip_norm=1.0).loss)
    return losses


def test_losses_are_the_same_whoever_computes_which_expert() -> None:
    with cluster(source(), 1, group_size=1, gate=MODEL.gate) as alone:
        expected = train(alone)
    with cluster(source(), 3, group_size=1, gate=MODEL.gate, redundancy=2, heals=True) as local:
        losses = train(local, {10: local.members["expert-1"].kill})
    assert losses[-1] < losses[0] - 0.5
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)


def test_norms_do_not_round_to_float32() -> None:
    """What sets it apart from other families: there these bits of the input are gone after the first norm."""
    with cluster(source(), 1, gate=MODEL.gate) as local:
        trunk = local.router.learner.trunk
        norms = [m for n, m in trunk.named_modules() if n.endswith("norm")]
        assert norms
        x_TD = torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for norm in norms:
            assert norm(x_TD).ne(norm(x_TD.float().double())).float().mean() > 0.9


def test_its_export_can_be_imported(tmp_path: Path) -> None:
    ids = BATCHES[0]
    with cluster(source(), 2, gate=MODEL.gate) as local:
        train(local)
        trained = local.router.serving.logits(ids)
        local.router.export(tmp_path / "out")
    with cluster(ModelSource(path=str(tmp_path / "out"), dtype="float64"), 1, gate=MODEL.gate) as again:
        torch.testing.assert_close(again.router.serving.logits(ids), trained, rtol=0, atol=1e-12)
