"""What is counted as the streams' own computing."""

from __future__ import annotations

import pytest

from cluster.bench.serve import STEPS_A_ROUND, Phase, _rows, own_share


def test_a_tokens_own_cost_is_what_it_costs_alone_less_what_is_spent_anyway() -> None:
    alone = Phase(seconds=10.0, tokens=40, cpu_s=5.0)
    beside = Phase(seconds=20.0, tokens=60, cpu_s=30.0)
    # (5 - 0.1 * 10) / 40 = 0.1 CPU seconds a token; 6 of the 40 that two cores have in 20 s.
    assert own_share(beside, alone, 0.1, 2) == pytest.approx(0.15)
    assert own_share(beside, Phase(seconds=10.0), 0.1, 2) == 0.0, "no token: nothing is known"
    assert own_share(beside, alone, 1.0, 2) == 0.0


def test_rows_hold_training_against_its_rate_less_that_share() -> None:
    run = {
        "alone": Phase(seconds=8.0),
        "newest": Phase(seconds=10.0, tokens=20, gaps_s=(0.2,)),
        "pinned": Phase(seconds=10.0, tokens=10, gaps_s=(0.1,)),
        "streams": Phase(seconds=10.0, tokens=20, gaps_s=(0.05,), cpu_s=4.0),
    }
    rows = {row.case: row for row in _rows([run], 0.0, 2)}
    assert rows["streams_newest_own"].value == pytest.approx(20.0)
    assert rows["training_newest"].ratio == pytest.approx(0.8 / 0.8)
    assert rows["training_newest_in_all"].ratio == pytest.approx(0.8)
    assert rows["training_pinned"].ratio == pytest.approx(0.8 / 0.9)
    assert rows["token_newest"].ratio == pytest.approx(0.25)
    assert rows["training_newest"].value == pytest.approx(STEPS_A_ROUND * 8 * 255 / 10)
