"""What the bench of slow actors measures, on the smallest model that there can be."""

from __future__ import annotations

import math
from dataclasses import replace

from actors.expert.updates import Brake
from cluster.bench.stragglers import STALENESS, Shape, _fleet, straggler_rows

TINY = Shape(
    hidden_size=32,
    width=32,
    num_layers=1,
    num_experts=4,
    sequence_length=16,
    warmups=5,
    steps=2,
    pause_s=0.02,
    window_s=0.05,
)


def test_a_slow_actor_is_waited_for_and_the_bound_holds() -> None:
    shape = replace(TINY, steps=6)
    with _fleet(shape, copies=False) as fleet:
        slow = fleet.rate(0, Brake(sleep_s=0.05))
        most = shape.tokens / 0.05 * shape.steps / (shape.steps - 1)  # what the first waits for may be made before
        assert slow <= most, "without staleness every step waits for every update"
        assert fleet.max_staleness == 0
        assert fleet.rate(4, Brake(sleep_s=0.3)) > 0
        assert 1 <= fleet.max_staleness <= 4


def test_every_way_has_a_row() -> None:
    rows = {row.case: row for row in straggler_rows(rounds=1, shape=TINY)}
    assert {"straggler_4x_s4", "straggler_2x_s1"} <= set(rows)
    for what in ("2x", "4x", "pause"):
        for staleness in STALENESS:
            assert {f"retained_{what}_s{staleness}", f"retained_{what}_s{staleness}_copy"} <= set(rows)
    assert all(math.isfinite(row.value) and row.value > 0 and row.rounds == 1 for row in rows.values())
