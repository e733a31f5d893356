"""Compression of gradients: what each codec loses, that error feedback loses nothing, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actors.compress.codecs import BLOCK, LowRank, Plain, Scaled, Sparse, codec_for
from actors.compress.compressor import Compressor
from actors.compress.pieces import CompressedPieces, pieces_of
from actors.compress.settings import CompressionSettings
from actors.errors import InvalidInput, StepAborted
from actors.router.pieces import GradientPieces

SETTINGS = [
    CompressionSettings("powersgd", rank=2),
    CompressionSettings("powersgd", rank=1, quantised=True),
    CompressionSettings("topk", share=0.05),
    CompressionSettings("topk", share=0.02, quantised=True),
    CompressionSettings("int8"),
    CompressionSettings("fp8"),
]
SHAPES = ((40, 64), (64,), (96, 32), (1,))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def compressor(settings: CompressionSettings, dtype: torch.dtype = torch.float64) -> Compressor:
    return Compressor(SHAPES, [dtype] * len(SHAPES), settings)


def compress(sender: Compressor, found: Sequence[Tensor | None]) -> list[Tensor]:
    return [sender.compress(number, gradient) for number, gradient in enumerate(found)]


def decoded(sender: Compressor, raws: Sequence[Tensor]) -> list[Tensor]:
    return [sender.decompress(number, raw) for number, raw in enumerate(raws)]


# -- error feedback ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_sent_sums_to_the_gradients_less_the_last_error(
    settings: CompressionSettings, dtype: torch.dtype
) -> None:
    sender = compressor(settings, dtype)
    sent, true = ([torch.zeros(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(2))
    for step in range(12):
        found = gradients(step, dtype)
        raws = compress(sender, found)
        sender.keep()
        for total, value in zip(sent + true, [*decoded(sender, raws), *found], strict=True):
            total += value.double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for memory, total, expected in zip(sender._memory, sent, true, strict=True):
        assert memory.error is not None
        torch.testing.assert_close(total + memory.error.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_error_stays_bounded_under_a_constant_gradient(settings: CompressionSettings) -> None:
    """So its mean over the steps, which is what is missing of the update, falls as 1 / steps."""
    sender, constant = compressor(settings), gradients(0)
    errors = []
    for _ in range(300):
        compress(sender, constant)
        sender.keep()
        errors.append(max(float(m.error.norm()) for m in sender._memory if m.error is not None))
    assert max(errors[150:]) < 1.3 * max(errors[:150]) + 1e-12


@pytest.mark.parametrize("settings", SETTINGS)
def test_only_a_kept_step_is_remembered(settings: CompressionSettings) -> None:
    sender, other = compressor(settings), compressor(settings)
    for each in (sender, other):
        compress(each, gradients(0))
        each.keep()
    compress(sender, gradients(7))
    sender.drop()
    compress(sender, gradients(8))  # the next takes its place
    retried, undisturbed = compress(sender, gradients(1)), compress(other, gradients(1))
    assert all(torch.equal(a, b) for a, b in zip(retried, undisturbed, strict=True))
    other.forget()
    fresh = compress(compressor(settings), gradients(1))
    assert all(torch.equal(a, b) for a, b in zip(compress(other, gradients(1)), fresh, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(retried, fresh, strict=True))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_gradient_that_is_missing_goes_as_zeros_and_keeps_its_error(settings: CompressionSettings) -> None:
    sender = compressor(settings)
    compress(sender, gradients(0))
    sender.keep()
    before = list(sender._memory)
    raws = compress(sender, [None] * len(SHAPES))
    sender.keep()
    assert all(not value.any() for value in decoded(sender, raws))
    assert all(a is b for a, b in zip(before, sender._memory, strict=True))


# -- codecs -----------------------------------------------------------------------------------------------------------


def round_trip(codec: Any, x: Tensor) -> Tensor:
    raw, _ = codec.encode(x, None)
    assert (raw.dtype, tuple(raw.shape)) == (torch.uint8, (codec.num_bytes,))
    value: Tensor = codec.decode(raw)
    assert value.shape == x.shape
    return value


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_powersgd_is_exact_for_matrices_of_its_rank(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(*s, rank, generator=generator, dtype=torch.float64) for s in ((30,), (50,)))
    x = left @ right.T
    torch.testing.assert_close(round_trip(LowRank((30, 50), torch.float64, rank, False), x), x, rtol=1e-11, atol=1e-11)
    more = round_trip(LowRank((30, 50), torch.float64, rank + 4, False), x)
    torch.testing.assert_close(more, x, rtol=1e-11, atol=1e-11)


def test_powersgd_comes_to_the_best_approximation_as_it_starts_from_the_step_before() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 48, generator=generator, dtype=torch.float64)
    singular = torch.linalg.svdvals(x)
    best = float(singular[4:].square().sum().sqrt())
    codec, warm, errors = LowRank((32, 48), torch.float64, 4, False), None, []
    for _ in range(60):
        raw, warm = codec.encode(x, warm)
        errors.append(float((x - codec.decode(raw)).norm()))
    assert errors[0] > 1.02 * best
    assert errors[-1] == pytest.approx(best, rel=1e-3)


def test_powersgd_goes_on_after_a_gradient_of_zeros() -> None:
    codec = LowRank((8, 8), torch.float32, 2, False)
    _, warm = codec.encode(torch.zeros(8, 8), None)
    x = torch.ones(8, 8)
    raw, _ = codec.encode(x, warm)
    torch.testing.assert_close(codec.decode(raw), x)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_int8_is_off_by_half_a_scale_of_its_row(scale: float) -> None:
    x = scale * torch.randn(20, 70, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    error = (round_trip(Scaled(x.shape, torch.float32, torch.int8), x) - x).abs()
    assert (error <= 0.5001 * x.abs().amax(1, keepdim=True) / 127).all()
    assert not error[3].any()


def test_fp8_is_off_by_a_sixteenth_of_each_value() -> None:
    """Three bits after the leading one; below the smallest normal number by half its last place."""
    x = torch.randn(20, 70, generator=torch.Generator().manual_seed(0))
    error = (round_trip(Scaled(x.shape, torch.float32, torch.float8_e4m3fn), x) - x).abs()
    scale = x.abs().amax(1, keepdim=True) / 448
    assert (error <= (x.abs() / 16).maximum(scale * 2**-10) * 1.0001).all()


@pytest.mark.parametrize("size", [2000, BLOCK, 2 * BLOCK + 1001])
def test_topk_sends_the_largest_of_each_block(size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    value = round_trip(Sparse((size,), torch.float32, 0.01, False), x)
    chosen = value != 0
    assert torch.equal(value[chosen], x[chosen])
    blocks = math.ceil(size / BLOCK)
    length = math.ceil(size / blocks)
    for block, mask in zip(x.split(length), chosen.split(length), strict=True):
        assert int(mask.sum()) == math.ceil(0.01 * length)
        assert block[mask].abs().min() >= block[~mask].abs().max()


def test_topk_refuses_an_index_beyond_the_gradient() -> None:
    codec = Sparse((2000,), torch.float32, 0.01, False)
    raw, _ = codec.encode(torch.ones(2000), None)
    raw[1] = 127
    with pytest.raises(InvalidInput, match=r"index: must be below 2000"):
        codec.decode(raw)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_does_not_get_lost(settings: CompressionSettings, bad: float) -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    x[5, 7] = bad
    codec = codec_for((40, 64), torch.float32, settings)
    assert not round_trip(codec, x).isfinite().all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_steps_give_the_same_bytes(settings: CompressionSettings) -> None:
    senders = [compressor(settings, torch.float32) for _ in range(2)]
    for step in range(4):
        first, second = (compress(s, gradients(step, torch.float32)) for s in senders)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for sender in senders:
            sender.keep()


def test_small_ones_go_as_they_are() -> None:
    powersgd, topk = CompressionSettings("powersgd", rank=4), CompressionSettings("topk")
    assert isinstance(codec_for((64,), torch.float32, powersgd), Plain)
    assert isinstance(codec_for((4, 8), torch.float32, powersgd), Plain)
    assert isinstance(codec_for((64, 64), torch.float32, powersgd), LowRank)
    assert isinstance(codec_for((512,), torch.bfloat16, topk), Plain)
    assert isinstance(codec_for((64, 64), torch.bfloat16, topk), Sparse)
    assert isinstance(codec_for((1,), torch.float32, CompressionSettings("int8")), Plain)
    assert isinstance(codec_for((64,), torch.float32, CompressionSettings("topk", quantised=True)), Scaled)


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        (CompressionSettings("int8"), 3.9),
        (CompressionSettings("fp8"), 3.9),
        (CompressionSettings("powersgd", rank=4), 63),
        (CompressionSettings("powersgd", rank=1, quantised=True), 1000),
        (CompressionSettings("topk", share=0.01), 66),
        (CompressionSettings("topk", share=0.01, quantised=True), 132),
    ],
)
def test_how_many_times_fewer_bytes(settings: CompressionSettings, least: float) -> None:
    assert 512 * 512 * 4 / codec_for((512, 512), torch.float32, settings).num_bytes > least


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"method": "gzip"}, "method"),
        ({"rank": 0}, "rank"),
        ({"rank": 1000}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"rank": True}, "rank"),
        ({"share": 0.0}, "share"),
        ({"share": 1.5}, "share"),
        ({"share": math.nan}, "share"),
        ({"quantised": "yes"}, "quantised"),
        ({"copies": 1}, "copies"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput, match=rf"compression\.{field}: .*got.*; use") as caught:
        CompressedPieces([], CompressionSettings(**values))
    assert caught.value.field == f"compression.{field}"


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e5m2])
def test_a_dtype_that_cannot_be_compressed_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidInput, match=r"dtype: .*got 'torch\..*; use float64, float32, bfloat16, float16"):
        Compressor([(4, 4)], [dtype], CompressionSettings("int8"))


def test_gradients_of_another_kind_are_refused() -> None:
    sender = compressor(SETTINGS[0])
    with pytest.raises(InvalidInput, match=r"gradients\[1\]: need \(64,\) of torch.float64"):
        sender.compress(1, gradients(0, torch.float32)[1])
    with pytest.raises(InvalidInput, match=r"gradients\[0\]: need \[\d+\] of uint8"):
        sender.decompress(0, torch.zeros(3, dtype=torch.uint8))


# -- in messages ------------------------------------------------------------------------------------------------------


def parameters(step: int | None = None) -> list[nn.Parameter]:
    shapes = ((40, 64), (64,), (), (0, 8), (6, 32, 16), (96, 32))
    generator = torch.Generator().manual_seed(step or 0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in made if step is not None else []:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("max_bytes", [1 << 26, 2000, 64])
def test_everybody_has_what_the_leader_has(settings: CompressionSettings, max_bytes: int) -> None:
    mine, theirs = parameters(1), parameters()
    leader, replica = (CompressedPieces(p, settings, max_bytes) for p in (mine, theirs))
    leader.squeeze()
    pieces = [leader.read(piece) for piece in range(len(leader))]
    assert sum(piece.numel() for piece in pieces) == leader.num_bytes
    replica.make_exactly(leader.present_P())
    for number, piece in enumerate(pieces):
        assert piece.numel() <= max(max_bytes, 4 * 512 + 4)  # one row cannot be cut
        replica.write(number, piece)
    for ours, other in zip(mine, theirs, strict=True):
        assert ours.grad is not None
        assert other.grad is not None
        assert torch.equal(ours.grad, other.grad)


def test_a_replicas_gradients_are_added() -> None:
    settings = CompressionSettings("int8")
    mine, theirs = parameters(1), parameters(2)
    theirs[0].grad = None
    expected = [m.grad.clone() + (0 if t.grad is None else t.grad) for m, t in zip(mine, theirs, strict=True)]  # type: ignore[union-attr]
    leader, replica = (CompressedPieces(p, settings) for p in (mine, theirs))
    leader.make_present(replica.present_P())
    for piece in range(len(replica)):
        leader.add(piece, replica.pack(piece))
    for parameter, wanted in zip(mine, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=0.02)


def test_pieces_that_were_not_packed_are_not_there() -> None:
    pieces = CompressedPieces(parameters(1), CompressionSettings("int8"))
    with pytest.raises(StepAborted):
        pieces.read(0)
    pieces.pack(0)
    pieces.drop()
    with pytest.raises(StepAborted):
        pieces.read(0)
    with pytest.raises(InvalidInput, match=r"gradients\[0\]: need \[\d+\] of uint8"):
        pieces.add(0, torch.zeros(3, dtype=torch.uint8))


def test_without_compression_pieces_are_the_gradients() -> None:
    assert type(pieces_of(parameters(), CompressionSettings())) is GradientPieces
