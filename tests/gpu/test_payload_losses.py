"""A router and expert hosts on one GPU, a process each, whose payloads stay on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from actors.optim import OptimizerSettings
from actors.router.roster import Peer, Roster
from actors.router.router import Router
from actors.transport.socket import SocketLink
from actors.trunk.model import ModelSource
from actors.values import Placement
from tests.families import save
from tests.gpu.hosts import serve_host
from tests.gpu.test_cuda import BATCHES, losses
from tests.gpu.test_payload import MAX_BYTES, process, settings

pytestmark = pytest.mark.gpu


def test_losses_through_gpu_memory_equal_those_on_the_cpu(tmp_path: Path) -> None:
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    with (
        process(serve_host, source, "a", (0, 1), settings("cuda_ipc", "cuda:0")) as (_, a),
        process(serve_host, source, "b", (2, 3), settings("cuda_ipc", "cuda:0")) as (_, b),
    ):
        peers = {
            name: Peer(
                partial(
                    SocketLink,
                    name,
                    at,
                    name="router",
                    max_bytes=MAX_BYTES,
                    timeout_s=60,
                    payload=settings("cuda_ipc", "cuda:0"),
                )
            )
            for name, at in (("a", a), ("b", b))
        }
        placement = Placement(1, (("a",), ("a",), ("b",), ("b",)), 2)
        router = Router(source, Roster(placement, peers), device="cuda", timeout_s=60)
        router.begin_run(OptimizerSettings())
        got = [router.train_step(batch, lr=1e-3, clip_norm=1.0).loss for batch in BATCHES]
        assert {link.kind for link in router.state.training.links.values()} == {"socket/ipc+cuda_ipc"}
        router.close()
    torch.testing.assert_close(got, losses(source, "cpu"), rtol=1e-3, atol=0)
