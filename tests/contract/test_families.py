"""Every model family in and out: logits equal, two steps trained, the export loads in plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.optim import OptimizerSettings
from actors.trunk.model import ModelSource
from tests.families import FAMILIES, plain, save
from tests.local import cluster


@pytest.mark.parametrize("family", FAMILIES)
def test_family_round_trip(family: str, tmp_path: Path) -> None:
    directory = save(family, tmp_path / "in")
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    with cluster(ModelSource(path=str(directory)), num_actors=3) as local, torch.no_grad():
        before = local.router.serving.logits(ids)
        torch.testing.assert_close(before, plain(directory)(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        with torch.enable_grad():
            local.router.begin_run(OptimizerSettings())
            for _ in range(2):
                local.router.train_step([ids], lr=1e-2, clip_norm=1.0)
        trained = local.router.serving.logits(ids)
        assert (trained - before).abs().max() > 1e-3, "two steps must change the model"
        local.router.export(tmp_path / "out")
        exported = plain(tmp_path / "out")(input_ids=ids).logits
        torch.testing.assert_close(exported, trained, atol=1e-5, rtol=1e-5)
