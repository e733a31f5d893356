"""A batch divided over routers: nothing is lost or done twice, the fast get more, and gradients travel in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actors.errors import InvalidInput
from actors.router.division import Speeds, divide, parts_of
from actors.router.pieces import GradientPieces


def test_by_speed() -> None:
    assert divide([8, 8], [1.0, 3.0]) == [[2, 6], [2, 6]]
    assert divide([8], [0.0, 0.0]) == [[4, 4]], "not known yet"
    assert divide([6], [2.0, 0.0, 4.0]) == [[1, 2, 3]], "the unknown one is taken for the mean"


def test_what_rounding_takes_comes_back() -> None:
    assert divide([3, 3], [1.0, 1.0]) == [[2, 1], [1, 2]]
    total = [sum(counts) for counts in zip(*divide([5] * 7, [1.0, 1.5]), strict=True)]
    assert total == [14, 21]


def test_everybody_gets_one_where_there_are_enough() -> None:
    assert divide([4, 2, 1], [1000.0, 1.0, 1.0]) == [[2, 1, 1], [2, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("sizes", [[1], [2, 3], [7, 1, 5, 2], [64] * 5])
@pytest.mark.parametrize("speeds", [[1.0], [1.0, 1e-6], [0.0, 5.0, 3.0], [1.0] * 9])
def test_every_sequence_once(sizes: list[int], speeds: list[float]) -> None:
    counts = divide(sizes, speeds)
    assert counts == divide(sizes, speeds)
    assert [sum(row) for row in counts] == sizes
    assert all(count >= (size >= len(speeds)) for row, size in zip(counts, sizes, strict=True) for count in row)
    batch = [torch.arange(size * 2).view(size, 2) for size in sizes]
    parts = parts_of(batch, counts)
    numbers = [part.number for each in parts for part in each]
    assert len(set(numbers)) == len(numbers)
    assert sum(len(part.ids_BS) for each in parts for part in each) == sum(sizes)
    for number, ids_BS in enumerate(batch):
        own = [part for each in parts for part in each if part.number // len(speeds) == number]
        assert torch.equal(torch.cat([part.ids_BS for part in own]), ids_BS)
        assert sum(part.share for part in own) == pytest.approx(1)


@pytest.mark.parametrize("speeds", [[], [-1.0], [float("nan"), 1.0], [float("inf")]])
def test_speeds_that_cannot_be(speeds: list[float]) -> None:
    with pytest.raises(InvalidInput, match="speed"):
        divide([4], speeds)


def test_speeds_follow_the_last_steps() -> None:
    speeds = Speeds()
    assert speeds.of(["a"]) == [0.0]
    speeds.note("a", 100, 1.0)
    assert speeds.of(["a"]) == [100.0]
    speeds.note("a", 0, 1.0)
    for _ in range(50):
        speeds.note("a", 200, 1.0)
    assert speeds.of(["a", "b"]) == [pytest.approx(200), 0.0]
    speeds.forget("a")
    assert speeds.of(["a"]) == [0.0]


def parameters() -> list[nn.Parameter]:
    shapes = [(5, 3), (1,), (4,), (2, 2)]
    dtypes = [torch.float64, torch.float64, torch.float32, torch.float64]
    return [nn.Parameter(torch.zeros(s, dtype=d)) for s, d in zip(shapes, dtypes, strict=True)]


@pytest.mark.parametrize("max_bytes", [1, 8, 24, 100, 1 << 20])
def test_gradients_in_pieces_are_the_same_gradients(max_bytes: int) -> None:
    here, there = parameters(), parameters()
    for parameter in here[:3]:
        parameter.grad = torch.rand_like(parameter)
    here[0].grad = torch.rand(3, 5, dtype=torch.float64).T  # not contiguous
    expected = [None if p.grad is None else p.grad.clone() for p in here]
    mine, theirs = GradientPieces(here, max_bytes), GradientPieces(there, max_bytes)
    assert all(mine.read(i).numel() * mine.read(i).element_size() <= max(8, max_bytes) for i in range(len(mine)))
    theirs.make_exactly(mine.present_P())
    for piece in range(len(mine)):
        theirs.write(piece, mine.read(piece))
    for parameter, gradient in zip(there, expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    there[3].grad = torch.ones_like(there[3])
    there[1].grad = None
    mine.make_present(theirs.present_P())
    for piece in range(len(mine)):
        mine.add(piece, theirs.read(piece))
    assert torch.equal(here[0].grad, 2 * expected[0])
    assert torch.equal(here[1].grad, expected[1])
    assert torch.equal(here[3].grad, torch.ones(2, 2, dtype=torch.float64))


def test_gradients_of_another_model_are_refused() -> None:
    pieces = GradientPieces(parameters())
    with pytest.raises(InvalidInput, match="need"):
        pieces.add(0, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="present_P"):
        pieces.make_present(torch.ones(9, dtype=torch.uint8))
