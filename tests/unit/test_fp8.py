"""Rows as FP8 e4m3 with a scale each."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from actors.errors import InvalidInput
from actors.moe.fp8 import LARGEST, pack, packed, relative_error, unpack, unpacked
from actors.optim import OptimizerSettings
from actors.router.router import Router
from actors.transport.message import Message, decode, encode
from actors.trunk.model import ModelSource
from cluster.bench.fp8 import fp8_row
from tests.families import save
from tests.local import cluster

ROWS = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))


def test_every_value_is_within_a_sixteenth() -> None:
    """Half of the last of three bits of mantissa; below the smallest normal number the step is fixed."""
    sizes = torch.logspace(-3, 3, 64).unsqueeze(1)
    rows = ROWS * sizes
    got = unpack(*pack(rows), torch.float32)
    step = rows.abs().amax(1, keepdim=True) / LARGEST * 2**-9
    assert ((got - rows).abs() <= torch.maximum(rows.abs() / 16, step / 2) * 1.001).all()
    largest = rows.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(got.gather(1, largest), rows.gather(1, largest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_the_stated_one(dtype: torch.dtype) -> None:
    assert relative_error(ROWS.to(dtype)) == pytest.approx(0.026, abs=0.002)
    assert relative_error(torch.zeros(3, 8)) == 0
    assert relative_error(torch.full((3, 8), -5.0)) == pytest.approx(0, abs=1e-6)
    row = fp8_row()
    assert row.relative_error == pytest.approx(0.026, abs=0.002)
    assert row.ratio > 1.99


def test_rows_that_are_special() -> None:
    rows = torch.tensor([[0.0, 0.0], [math.inf, 1.0], [math.nan, 1.0], [1e-30, -1e-30], [3e38, 1.0]])
    got = unpack(*pack(rows), torch.float32)
    assert got[0].tolist() == [0, 0]
    assert not got[1].isfinite().all()
    assert not got[2].isfinite().all()
    torch.testing.assert_close(got[3], rows[3], rtol=1e-3, atol=0)
    torch.testing.assert_close(got[4], torch.tensor([3e38, 0.0]), rtol=1e-3, atol=1e36)
    assert unpack(*pack(torch.zeros(0, 4)), torch.float32).shape == (0, 4)


def test_they_cross_a_link_as_they_are() -> None:
    rows, scales = pack(ROWS)
    frames = [bytes(frame) for frame in encode(Message("forward", {}, (rows, scales)))]
    assert len(frames[1]) == ROWS.numel()
    got = decode(frames, peer="test", max_bytes=1 << 20)
    assert torch.equal(unpacked(got.tensors, torch.float32), unpack(rows, scales, torch.float32))
    assert unpacked(packed(ROWS, "trunk"), torch.float32) is ROWS


@pytest.mark.parametrize(
    "tensors",
    [(ROWS, torch.ones(64)), (pack(ROWS)[0], torch.ones(63)), (pack(ROWS)[0], torch.ones(64).double())],
    ids=["not packed", "a scale is missing", "another dtype"],
)
def test_what_does_not_fit_is_refused(tensors: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(InvalidInput, match="x_TD"):
        unpacked(tensors, torch.float32)


def losses(router: Router) -> list[float]:
    batch = [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(m)) for m in range(2)]
    router.begin_run(OptimizerSettings())
    return [router.train_step(batch, lr=1e-2, clip_norm=1.0).loss for _ in range(6)]


def test_a_model_learns_as_without_it(tmp_path: Path) -> None:
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    with cluster(source, 2) as plain, cluster(source, 2, payload="fp8") as packed:
        expected, got = losses(plain.router), losses(packed.router)
        ids = torch.arange(24).view(1, 24)
        assert not torch.equal(plain.router.serving.logits(ids), packed.router.serving.logits(ids))
    assert got != expected, "the experts saw rounded tokens"
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0)
    assert got[-1] < got[0] - 0.3
