"""The pure parts of `bench async`: its cases, its rows, its picture; and one training that is exactly late."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench import asynchronous
from cluster.bench.asynchronous import (
    STALENESS,
    Extent,
    Run,
    all_runs,
    bench_async,
    cases,
    loss_rows,
    sparse_rows,
    time_rows,
    train_all,
)
from cluster.bench.beside import BesideShape, Timed, rows_of
from cluster.bench.stragglers import Shape
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


def test_losses_are_compared_seed_by_seed() -> None:
    runs = [run for run in _runs(3) if run.staleness <= 1 or run.seed == 1]
    for run in runs:
        run.heldout_loss += run.seed
    rows = {row.case: row for row in loss_rows(runs)}
    assert (rows["loss_s1_muon"].value, rows["loss_s1_muon"].peer_value, rows["loss_s1_muon"].rounds) == (3.5, 3.0, 3)
    assert (rows["loss_s4_muon"].value, rows["loss_s4_muon"].peer_value, rows["loss_s4_muon"].rounds) == (5.0, 3.0, 1)


def test_what_a_bar_is_about_has_every_seed() -> None:
    found = all_runs(3)
    assert [run.seed for run in found if (run.optimizer, run.staleness) == ("muon", 1)] == [0, 1, 2]
    assert [run.seed for run in found if (run.optimizer, run.staleness) == ("muon", 4)] == [0]
    assert {(run.optimizer, run.staleness) for run in found} == set(cases())


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


def test_hidden_is_what_a_step_does_not_wait_for_of_an_update() -> None:
    timed = [Timed(step_s=0.1, beside_s=0.1 - 0.02 * hidden, update_s=0.02) for hidden in (0.5, 0.9, 1.0, 0.8, 0.7)]
    rows = {row.case: row for row in rows_of(timed)}
    row = rows["hidden_optimizer_share"]
    assert (row.value, row.low, row.high) == (pytest.approx(80), pytest.approx(70), pytest.approx(90))
    assert row.peer_value == pytest.approx(20), "the update's share of a step"
    assert rows["step_s1"].peer_value == pytest.approx(100)
    assert rows["update_s0"].value == pytest.approx(20)


def test_all_of_it_says_as_often_as_promised_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough for seconds: every row is there, those at equal time too."""
    monkeypatch.setattr(asynchronous, "SPARSE_MODEL", asynchronous.SPARSE_MODEL | {"moe_intermediate_size": 8})
    tiny = {"hidden_size": 16, "width": 16, "num_layers": 1, "num_experts": 4, "sequence_length": 8, "steps": 1}
    extent = Extent(
        steps=2,
        seeds=1,
        shape=Shape(**tiny, warmups=1, pause_s=0.01, window_s=0.02),  # type: ignore[arg-type]
        beside=BesideShape(**tiny, warmups=1),  # type: ignore[arg-type]
        sparse_rounds=1,
        beside_rounds=1,
        straggler_rounds=1,
    )
    said: list[str] = []
    report, runs, speed = bench_async(extent, said.append)
    found = {row.case for row in report.rows}
    assert len(said) == extent.num_steps()
    assert len(runs) == len(cases())
    assert set(speed) == set(STALENESS)
    assert {f"{kind}_s{s}_{name}" for kind in ("loss", "time_loss") for name, s in cases()} <= found
    assert {"straggler_4x_s4", "hidden_optimizer_share", "sparse_update", "retained_pause_s4_copy"} <= found
