"""The pure parts of `bench async`: its cases, its rows, its picture; and one training that is exactly late."""

from __future__ import annotations

from collections.abc import Callable
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
from cluster.bench.beside import SpreadRow, Timed, num_rounds, rows_of
from cluster.bench.result import Advance, Row
from cluster.bench.steady import TrainingShape
from cluster.bench.stragglers import Shape, num_runs
from cluster.bench.stragglers import rows_of as straggler_rows_of
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


def round_of(hidden: float, *, noise_s: float = 0.0) -> Timed:
    """An update takes 20 ms, of which 3 are hidden anyway; others on the cores lengthen all of the round."""
    return Timed(0.1 + noise_s, 0.083 + 0.02 * (1 - hidden) + noise_s, 0.083 + noise_s, 0.02)


def test_hidden_is_what_a_step_does_not_wait_for_of_an_update() -> None:
    timed = [round_of(hidden) for hidden in (0.5, 0.9, 1.0, 0.8, 0.7)]
    rows = {row.case: row for row in rows_of(timed)}
    row = rows["hidden_optimizer_share"]
    assert row.value == pytest.approx(80)
    assert 49.9 < row.low < row.value < row.high < 100.1
    assert row.peer_value == pytest.approx(15), "with s = 0"
    assert rows["step_s1"].peer_value == pytest.approx(100)
    assert rows["step_without_updates"].value == pytest.approx(83)
    assert (rows["update_s0"].value, rows["update_s0"].ratio) == (pytest.approx(20), pytest.approx(5))


def test_hidden_is_of_steps_of_one_round() -> None:
    """However differently long the rounds are."""
    quiet = [round_of(0.85) for _ in range(9)]
    noisy = [round_of(0.85, noise_s=0.3 * number) for number in range(9)]
    assert rows_of(noisy)[0].value == pytest.approx(rows_of(quiet)[0].value)
    spoilt = [*noisy, Timed(0.9, 0.1, 0.1, 0.02), Timed(0.1, 0.9, 0.1, 0.02)]
    assert rows_of(spoilt)[0].value == pytest.approx(85), "two of eleven say nothing"


def test_all_of_it_says_as_often_as_promised_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long is not made."""

    def hidden(*, rounds: int, shape: TrainingShape, advance: Advance) -> list[SpreadRow]:
        for _ in range(num_rounds(rounds)):
            advance("hidden")
        return rows_of([round_of(0.5)] * rounds)

    def stragglers(*, rounds: int, shape: Shape, advance: Advance) -> list[Row]:
        for _ in range(num_runs(rounds)):
            advance("stragglers")
        return [Row(f"straggler_4x_s{s}", 2.0, "tokens/s", "s0", 1.0, 1.0 + s / 10, rounds) for s in STALENESS if s]

    def train(*, seeds: int, steps: int, after_step: Callable[[Run], None]) -> list[Run]:
        runs = all_runs(seeds)
        for run in runs:
            run.heldout_loss = 2.0
            for _ in range(steps):
                run.losses.append(3.0)
                after_step(run)
        return runs

    monkeypatch.setattr(asynchronous, "SPARSE_MODEL", asynchronous.SPARSE_MODEL | {"moe_intermediate_size": 8})
    for name, made in (("hidden_rows", hidden), ("straggler_rows", stragglers), ("train_all", train)):
        monkeypatch.setattr(asynchronous, name, made)
    extent = Extent(steps=2, seeds=3, sparse_rounds=1, beside_rounds=2, straggler_rounds=2)
    said: list[str] = []
    report, _, speed = bench_async(extent, said.append)
    found = {row.case for row in report.rows}
    assert len(said) == extent.num_steps()
    assert speed == {0: 1.0, 1: 1.1, 2: 1.2, 4: 1.4}
    assert {f"{kind}_s{s}_{name}" for kind in ("loss", "time_loss") for name, s in cases()} <= found
    assert {"straggler_4x_s4", "hidden_optimizer_share", "sparse_update"} <= found


def test_stragglers_are_compared_with_the_same_one_without_delay() -> None:
    rates = {"1x_s0": [10.0, 20.0], "1x_s1": [10.0, 20.0], "4x_s0": [4.0, 5.0], "4x_s4": [8.0, 10.0], "pause_s4": [5.0]}
    rows = {row.case: row for row in straggler_rows_of(rates | {"4x_s4_copy": [9.0, 9.0]})}
    assert [case for case in rows if case.startswith("straggler")] == ["straggler_4x_s4"]
    assert (rows["straggler_4x_s4"].ratio, rows["retained_pause_s4"].ratio) == (2.0, 0.5)
    assert (rows["retained_pause_s4"].rounds, rows["retained_4x_s4_copy"].rounds) == (1, 2)
    assert "retained_1x_s0" not in rows
