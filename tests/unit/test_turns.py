"""Requests go before training at an expert actor, and neither starves."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from actors.errors import InvalidInput
from actors.transport.turns import Lane, Turns


def answered(turns: Turns[str], count: int) -> str:
    return "".join(turns.take() for _ in range(count))


@pytest.mark.parametrize("weight", [1, 3])
def test_serving_goes_first_and_training_has_its_turn(weight: int) -> None:
    turns = Turns[str](weight)
    for number in range(8):
        turns.put(f"training {number}", "training", "T")
        turns.put(f"serving {number}", "serving", "s")
    order = answered(turns, 16)
    assert order.startswith(("s" * weight + "T") * (8 // weight))
    assert Counter(order) == {"s": 8, "T": 8}
    assert not turns


def test_who_was_alone_has_no_debt() -> None:
    turns = Turns[str](2)
    for number in range(5):
        turns.put(number, "serving", "s")
    assert answered(turns, 4) == "ssss"
    turns.put("training", "training", "T")
    assert answered(turns, 2) == "sT", "nobody waited during the four before"


def test_a_link_is_answered_in_its_own_order() -> None:
    turns = Turns[int](2)
    turns.put("a", "training", 1)
    turns.put("b", "training", 2)
    turns.put("b", "serving", 3)
    turns.put("c", "serving", 4)
    assert [turns.take() for _ in range(4)] == [4, 1, 2, 3]
    turns.put("b", "serving", 5)
    turns.put("a", "training", 6)
    assert turns.take() == 5, "nothing of b waits in the other lane any more"


@pytest.mark.parametrize("weight", [1, 4])
def test_neither_flood_starves_the_other(weight: int) -> None:
    """Questions arrive faster than they are answered; each lane's longest wait is counted in answers."""
    rng = random.Random(weight)
    for flood, calm in (("serving", "training"), ("training", "serving")):
        turns, waited, longest, done = Turns[tuple[Lane, int]](weight), 0, 0, Counter[str]()
        for now in range(2000):
            for _ in range(rng.randint(1, 3)):
                turns.put(("flood", now), flood, (flood, now))  # type: ignore[arg-type]
            if not waited:
                turns.put("calm", calm, (calm, now))  # type: ignore[arg-type]
                waited = 1
            lane, _ = turns.take()
            done[lane] += 1
            longest = max(longest, waited)
            waited = 0 if lane == calm else waited + 1
        assert longest <= (weight + 1 if calm == "training" else 2)
        assert done[calm] >= 2000 // (weight + 1) - 1
        assert len(turns) > 1000, "it was a flood"


def test_a_weight_must_let_training_go_on() -> None:
    with pytest.raises(InvalidInput, match=r"experts\.serving_weight.*got 0.*1 or more"):
        Turns[str](0)
