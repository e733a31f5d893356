"""A CUDA device with room for some of its expert groups: the numbers of one with room for all, in as little memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.expert.homes import FileStore, Home, MemoryStore
from actors.expert.host import ExpertHost
from actors.moe.cache import CacheSettings
from actors.optim import OptimizerSettings
from actors.transport.message import Message, raise_if_error
from actors.trunk.model import ModelSource
from tests.contract.test_copies import copies_agree
from tests.families import FAMILIES, save
from tests.local import cluster

pytestmark = pytest.mark.gpu

BATCHES = [
    [torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(4)
]


@pytest.fixture(params=["memory", "files"])
def behind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "cache") if request.param == "files" else ""


def losses(source: ModelSource, device: str, cache: CacheSettings | None, redundancy: int = 1) -> list[float]:
    with cluster(source, 2, device=device, cache=cache, redundancy=redundancy) as local:
        local.router.begin_run(OptimizerSettings())
        found = []
        for batch in BATCHES:
            found.append(local.router.train_step(batch, lr=1e-3, clip_norm=1.0).loss)
            copies_agree(local)
        return found


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_those_without_a_cache(tmp_path: Path, family: str, behind: str) -> None:
    source = ModelSource(path=str(save(family, tmp_path / "m", torch.float32)))
    got = losses(source, "cuda", CacheSettings(1, behind))
    torch.testing.assert_close(got, losses(source, "cuda", None), rtol=1e-4, atol=0)
    torch.testing.assert_close(got, losses(source, "cpu", None), rtol=1e-3, atol=0)


def test_copies_behind_caches_stay_equal(tmp_path: Path) -> None:
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    got = losses(source, "cuda", CacheSettings(1), redundancy=2)
    torch.testing.assert_close(got, losses(source, "cpu", None), rtol=1e-3, atol=0)


VALUES: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 260,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
GROUP_LAYER_BYTES = 2 * 3 * 256 * 512 * 4
WORK_BYTES = 8 << 20
"""For activations of 64 tokens, and for the gradient of one matrix of one group on its way home."""


def ask(host: ExpertHost, op: str, fields: dict[str, Any], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return raise_if_error(host.handle("test", Message(op, fields, tensors)), host.name).tensors


def steps(host: ExpertHost, number: int) -> list[torch.Tensor]:
    """Every expert gets 4 of 64 tokens in each layer. -> outputs of the forwards."""
    generator = torch.Generator().manual_seed(0)
    ask(host, "begin_run", {"optimizer": OptimizerSettings().to_dict()})
    outputs = []
    for step in range(1, number + 1):
        part = {"step": step, "attempt": 0, "microbatch": 0, "keep": True}
        work = (torch.randn(64, 256, generator=generator), torch.arange(64, dtype=torch.int32), torch.ones(64))
        for layer in range(2):
            outputs += ask(host, "forward", {**part, "layer": layer, "counts_E": [4] * 16}, *work)
        for layer in (1, 0):
            ask(host, "backward", {**part, "layer": layer}, outputs[-1].cpu())
        ask(host, "prepare", {"step": step, "attempt": 0})
        ask(host, "commit", {"step": step, "attempt": 0, "lr": 1e-3, "scale": 1.0})
    return [output.cpu() for output in outputs]


@pytest.mark.parametrize("size", [1, 3])
def test_the_device_never_has_more_than_it_has_room_for(size: int, behind: str) -> None:
    source = ModelSource(values=VALUES)
    plain = ExpertHost("plain", source, range(8), group_size=2, device="cuda")
    expected = steps(plain, 3)
    plain.close()
    del plain
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    host = ExpertHost("host", source, range(8), group_size=2, device="cuda", cache=CacheSettings(size, behind))
    got = steps(host, 3)
    torch.cuda.synchronize()
    room = size * 2 * GROUP_LAYER_BYTES
    counters = host.status()["cache"]
    assert counters["device_bytes"] == room
    assert counters["misses"] > 0
    assert torch.cuda.max_memory_allocated() - before <= room + WORK_BYTES < 16 * GROUP_LAYER_BYTES
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    host.close()


def test_weights_in_host_memory_are_pinned_while_they_are_there(tmp_path: Path) -> None:
    device, shapes = torch.device("cuda"), [{"a": (3, 1000, 1000)}]
    for _ in range(3):  # the same addresses again: what is not given back cannot be pinned anew
        home = Home(MemoryStore(device), shapes, torch.float32, "group 0")
        assert home.weights[0]["a"].is_pinned()
        home.train()
        assert not home.training(0)["a"].gradient.is_pinned()
        del home
    assert not Home(FileStore(str(tmp_path)), shapes, torch.float32, "group 0").weights[0]["a"].is_pinned()
