"""Gradients of expert groups between their copies, compressed: what is sent, what is remembered, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actors.compress.settings import CompressionSettings
from actors.errors import InvalidInput
from actors.expert.squeezing import Squeezer

SETTINGS = [
    CompressionSettings("powersgd", rank=2),
    CompressionSettings("powersgd", rank=1, quantised=True),
    CompressionSettings("topk", share=0.05),
    CompressionSettings("int8"),
    CompressionSettings("fp8"),
]
KEY = (3, 1)
E = 3
SHAPES = ((E, 40, 32), (E, 32, 40), (E, 40))
"""Two matrices and a bias of each expert."""


def gradients(step: int, without: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    found = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if without is not None:
        for gradient in found:
            gradient[without] = 0.0
    return found


def zeros() -> list[Tensor]:
    return [torch.zeros(shape) for shape in SHAPES]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_left_out_of_an_expert_goes_with_its_next_gradient(settings: CompressionSettings) -> None:
    sender, receiver = Squeezer(settings), Squeezer(settings)
    sent, true = zeros(), zeros()
    for step in range(9):
        found = gradients(step, without=step % E)
        receiver.add(KEY, sent, sender.pack(KEY, found))
        sender.keep()
        for total, gradient in zip(true, found, strict=True):
            total += gradient
    memory = sender._compressors[KEY]._memory
    for number, (total, expected) in enumerate(zip(sent, true, strict=True)):
        errors = torch.stack([memory[expert * len(SHAPES) + number].error for expert in range(E)])
        torch.testing.assert_close(total + errors, expected, rtol=0, atol=1e-4)
    assert sender.num_bytes() >= sum(total.nbytes for total in sent)
    assert receiver.num_bytes() == 0


@pytest.mark.parametrize("settings", SETTINGS)
def test_who_writes_the_bytes_has_what_they_stand_for_and_nothing_else(settings: CompressionSettings) -> None:
    sender = Squeezer(settings)
    packed = sender.pack(KEY, gradients(0, without=1))
    assert packed[0].tolist() == [0, 2], "an expert without a token must not be sent"
    ours, theirs = gradients(1), gradients(2)
    sender.write(KEY, ours, packed)
    Squeezer(settings).write(KEY, theirs, packed)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not any(gradient[1].any() for gradient in ours)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in packed)
    assert num_bytes < sum(gradient.nbytes for gradient in ours) / 3


def test_nothing_to_send_is_sent_as_nothing() -> None:
    sender = Squeezer(SETTINGS[0])
    packed = sender.pack(KEY, zeros())
    assert [tensor.numel() for tensor in packed] == [0, 0]
    written = gradients(0)
    sender.write(KEY, written, packed)
    assert not any(gradient.any() for gradient in written)


def test_only_a_step_that_counts_is_remembered_and_a_group_may_go() -> None:
    sender, undisturbed = Squeezer(SETTINGS[0]), Squeezer(SETTINGS[0])
    for each in (sender, undisturbed):
        each.pack(KEY, gradients(0))
        each.keep()
    sender.pack(KEY, gradients(7))
    sender.drop()
    again, expected = sender.pack(KEY, gradients(1)), undisturbed.pack(KEY, gradients(1))
    assert torch.equal(again[1], expected[1])
    sender.forget_but(lambda group: group != KEY[0])
    assert sender.num_bytes() == 0
    assert not torch.equal(sender.pack(KEY, gradients(1))[1], expected[1])


def test_what_is_not_finite_comes_out_as_such() -> None:
    sender = Squeezer(CompressionSettings("int8"))
    found = gradients(0)
    found[0][1, 2, 3] = float("nan")
    written = zeros()
    sender.write(KEY, written, sender.pack(KEY, found))
    assert not written[0][1].isfinite().all()


def test_a_dtype_that_cannot_be_compressed_is_refused_by_name() -> None:
    with pytest.raises(
        InvalidInput, match=r"dtype: .*cannot be compressed \(got 'torch.int32'\); use float64, float32"
    ):
        Squeezer(SETTINGS[0]).pack(KEY, [torch.ones(2, 4, 4, dtype=torch.int32)])


@pytest.mark.parametrize(
    ("experts", "raw", "text"),
    [
        ([0, 3], 8, r"experts: need rising numbers below 3 \(got \[0, 3\]\)"),
        ([1, 1], 8, "need rising numbers"),
        ([0], 8, r"gradients\[3, 1\]: need \[\d+\] of uint8"),
    ],
)
def test_bytes_that_cannot_be_are_refused(experts: list[int], raw: int, text: str) -> None:
    written = gradients(0)
    with pytest.raises(InvalidInput, match=text):
        Squeezer(SETTINGS[0]).write(KEY, written, (torch.tensor(experts), torch.zeros(raw, dtype=torch.uint8)))
    assert all(torch.equal(a, b) for a, b in zip(written, gradients(0), strict=True)), "nothing was written"
    with pytest.raises(InvalidInput, match="need experts and their bytes"):
        Squeezer(SETTINGS[0]).add(KEY, written, written)
