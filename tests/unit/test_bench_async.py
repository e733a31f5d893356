"""The pure parts of `bench async`: its cases, its rows, its picture; and one training that is exactly late."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench import asynchronous
from cluster.bench.asynchronous import STALENESS, Run, cases, loss_rows, sparse_rows, time_rows, train_all
from cluster.report import draw_async


def _runs(seeds: int = 2) -> list[Run]:
    """Losses fall by 0.1 a step; held out they are 2, and 0.5 more for each step of delay."""
    losses = [10 - 0.1 * step for step in range(80)]
    return [Run(name, s, seed, list(losses), 2.0 + 0.5 * s) for seed in range(seeds) for name, s in cases()]


def test_what_is_not_late_is_not_corrected() -> None:
    assert [s for name, s in cases() if name == "adamw"] == list(STALENESS)
    assert [s for name, s in cases() if name == "muon_corrected"] == [s for s in STALENESS if s]


def test_rows_compare_with_the_same_optimizer_without_delay() -> None:
    rows = {row.case: row for row in loss_rows(_runs())}
    assert len(rows) == len(cases())
    assert (rows["loss_s1_muon"].value, rows["loss_s1_muon"].peer_value, rows["loss_s1_muon"].rounds) == (2.5, 2.0, 2)
    assert rows["loss_s4_adamw_corrected"].ratio == 0.5
    assert rows["loss_s0_adamw"].ratio == 1.0


def test_at_equal_time_the_faster_has_made_more_steps() -> None:
    rows = {row.case: row for row in time_rows(_runs(), {0: 1.0, 4: 1.5})}
    assert set(rows) == {f"time_loss_s{s}_{name}" for name, s in cases() if s in (0, 4)}
    # 60 steps against 40, each loss the mean of the last 20.
    row = rows["time_loss_s4_muon"]
    assert (row.value, row.peer_value) == (pytest.approx(10 - 4.95), pytest.approx(10 - 2.95))


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw_async(tmp_path / "async.png", _runs(), {0: 1.0, 4: 1.5})
    assert (tmp_path / "async.png").stat().st_size > 10_000


def test_every_training_is_as_late_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asynchronous, "OPTIMIZERS", {"adamw": asynchronous.OPTIMIZERS["adamw"]})
    monkeypatch.setattr(asynchronous, "STALENESS", (0, 2))
    seen: dict[int, list[float]] = {}
    for _ in range(2):
        runs = train_all(seeds=1, steps=5)
        for run in runs:
            assert len(run.losses) == 5
            assert seen.setdefault(run.staleness, run.losses) == run.losses, "it is the same each time"
    # The second batch meets experts without the first update.
    assert seen[0][0] == seen[2][0]
    assert seen[0][1] != seen[2][1]


def test_sparse_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asynchronous, "SPARSE_MODEL", asynchronous.SPARSE_MODEL | {"moe_intermediate_size": 8})
    rows = list(sparse_rows(rounds=2))
    assert [row.case for row in rows] == list(asynchronous.SPARSE_CASES)
    assert all(row.value > 0 and row.rounds == 2 for row in rows)
