"""Steps without a gradient that are made as few: the same weights and moments, whatever an element's moments are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actors.moe.missed import Owed, Row, Step, gauss, lowered, made_as_few
from actors.optim import OptimizerSettings

SETTINGS = OptimizerSettings()
RATIO = 1.16
"""Of first moments to roots of second ones: all that there can be."""


def row(dtype: torch.dtype, lowest: float = -12.0, size: int = 2000) -> Row:
    """Roots of second moments from 10^lowest to 0.01: far below `eps`, at it, and far above."""
    draw = torch.Generator().manual_seed(0)
    weight, spread, sign = torch.rand(3, size, generator=draw, dtype=torch.float64)
    root = 10 ** (lowest + (-2 - lowest) * spread)
    return (0.1 * weight - 0.05).to(dtype), (RATIO * (2 * sign - 1) * root).to(dtype), (root**2).to(dtype)


def stepped(owed: Owed, state: Row) -> tuple[Row, Row]:
    """-> as few, and each."""
    few, each = ([tensor.clone() for tensor in state] for _ in range(2))
    owed.make([(few[0], few[1], few[2])])
    Owed(owed.settings, owed.before, owed.lrs, owed.decays, is_own=False).make([(each[0], each[1], each[2])])
    return (few[0], few[1], few[2]), (each[0], each[1], each[2])


def furthest(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max())


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30, 200])
@pytest.mark.parametrize("before", [1, 5, 3000])
def test_as_few_do_what_each_does(count: int, before: int) -> None:
    lrs = tuple(3e-3 / (1 + 0.1 * number) for number in range(count))
    for dtype, tolerance in ((torch.float32, 5e-7), (torch.float64, 1e-14)):
        for decays in (True, False):
            for lowest in (-12.0, -6.0):
                few, each = stepped(Owed(SETTINGS, before, lrs, decays, is_own=True), row(dtype, lowest))
                assert furthest(few[0], each[0]) < tolerance
                torch.testing.assert_close(few[1:], each[1:], rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-9)
    before_and_after = row(torch.float64)[0], few[0]
    assert furthest(*before_and_after) > 1e-3, "they did something"


def fewest(count: int, smallest: float, settings: OptimizerSettings = SETTINGS, lr: float = 1e-3) -> int:
    return len(made_as_few(settings, 1000, [lr] * count, weight_decay=0.1, smallest=smallest, tolerance=1.5e-8))


def test_they_are_few() -> None:
    assert [fewest(count, 1e-6) for count in (2, 5, 20, 200)] == [1, 1, 2, 4]
    assert fewest(5, 0.0) == 2
    assert fewest(30, 0.0) < 8


def test_all_are_made_where_few_would_not_do() -> None:
    assert fewest(12, 0.0, OptimizerSettings(beta1=0.99, beta2=0.9)) == 12, "no bound of the first moment"
    assert fewest(200, 0.0, lr=5.0) == 200, "too large to be made as few"


@pytest.mark.parametrize(
    ("settings", "lrs"),
    [
        (OptimizerSettings(eps=0.0), (1e-3,) * 5),
        (OptimizerSettings(weight_decay=0.0), (1e-3,) * 5),
        (OptimizerSettings(beta1=0.0), (1e-3,) * 5),
        (SETTINGS, (0.0,) * 5),
        (SETTINGS, (0.0, 0.0, 1e-3, 0.0)),
        (SETTINGS, (20.0,) * 5),
    ],
)
def test_limits(settings: OptimizerSettings, lrs: tuple[float, ...]) -> None:
    few, each = stepped(Owed(settings, 100, lrs, decays=True, is_own=True), row(torch.float64))
    for mine, theirs in zip(few, each, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-14)


def test_half_precision_loses_no_more_than_each_step_does() -> None:
    owed = Owed(SETTINGS, 50, (1e-2,) * 6, decays=True, is_own=True)
    state = row(torch.bfloat16, lowest=-4.0)
    few, each = stepped(owed, state)
    exact, _ = stepped(owed, (state[0].double(), state[1].double(), state[2].double()))
    assert furthest(few[0].double(), exact[0]) <= furthest(each[0].double(), exact[0])


def test_a_mean_over_many_points_is_one_over_a_few() -> None:
    points = [1 + 0.03 * number for number in range(12)]
    weights = [1 / 12] * 12
    for tolerance in (1e-3, 1e-5, 1e-8):
        found = gauss(points, weights, 0.0, tolerance)
        assert found is not None
        nodes, amounts = found
        assert len(nodes) < 12
        for s in (0.0, 0.01, 0.3, 1.0, 30.0):
            exact = sum(w * s / (s + x) for w, x in zip(weights, points, strict=True))
            few = sum(w * s / (s + x) for w, x in zip(amounts, nodes, strict=True))
            assert abs(exact - few) <= tolerance


def test_a_smallest_moment_is_looked_for_only_where_what_is_known_will_not_do() -> None:
    owed = Owed(SETTINGS, 100, (1e-3,) * 5, decays=True, is_own=True)
    state = row(torch.float32, lowest=-4.0)
    known = float(state[2].min())
    assert owed.make([state], [known / 4]) == [known / 4]
    assert owed.make([state], [0.0]) != [0.0]
    each = Owed(SETTINGS, 105, (1e-3,) * 5, decays=True, is_own=False)
    assert each.make([state], [0.0]) == [0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_no_second_moment_falls_below_the_lowered_floor(dtype: torch.dtype) -> None:
    _, first, second = row(dtype, lowest=-6.0)
    floor, zeros = float(second.min()), torch.zeros_like(second)
    for number in range(1, 60):
        Step(number, 1e-3, 0.9, 0.95, 1e-8, 0.0).make([zeros.clone()], [zeros], [first], [second])
        assert float(second.min()) >= lowered(floor, 0.95, number, dtype) > 0
    assert lowered(1e-30, 0.95, 1000, torch.float32) == 0, "digits are lost there"
