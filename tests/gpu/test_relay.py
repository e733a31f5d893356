"""Router and experts on a CUDA device, with tokens over relays: the numbers of the same without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.moe.fp8 import Payload
from actors.optim import OptimizerSettings
from actors.trunk.model import ModelSource
from tests.families import save
from tests.local import cluster

pytestmark = pytest.mark.gpu

BATCHES = [
    [torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(3)
]


@pytest.mark.parametrize("payload", ["trunk", "fp8"])
def test_losses_are_those_without_relays(tmp_path: Path, payload: Payload) -> None:
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    found = {}
    for relays in (False, True):
        with cluster(source, 4, links="socket", nodes="aabb", device="cuda", payload=payload, relays=relays) as local:
            local.router.begin_run(OptimizerSettings())
            found[relays] = [local.router.train_step(batch, lr=1e-3, clip_norm=1.0).loss for batch in BATCHES]
            assert set(local.relayed_over) == ({"expert-0", "expert-2"} if relays else set())
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=0)
