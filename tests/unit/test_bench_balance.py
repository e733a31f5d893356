"""The pure parts of `bench balance`: its measures, its rows, its synthetic documents, its picture."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from cluster.bench.balance import RULES, TASKS, UNBALANCED, Run, report_of, zipf_documents
from cluster.report import CURVE_STEPS, draw_balance

EVEN, ONE_SIDED = [[4, 4, 4, 4]], [[16, 0, 0, 0]]


def test_measures_look_at_the_last_fifth_only() -> None:
    run = Run("zipf", "bias", 0, [ONE_SIDED] * 8 + [EVEN] * 2)
    assert (run.max_vio, run.std) == (0, 0)
    run = Run("zipf", "bias", 0, [EVEN] * 8 + [ONE_SIDED] * 2)
    assert (run.max_vio, run.std) == (3, pytest.approx(3**0.5))


def test_load_is_summed_over_the_window_and_averaged_over_the_layers() -> None:
    swinging = [[[8, 0], [8, 0]], [[0, 8], [8, 0]]]
    assert Run("zipf", "bias", 0, swinging * 5).max_vio == pytest.approx(0.5)


def test_rows_compare_means_over_the_seeds_with_the_unbalanced_run() -> None:
    report = report_of(_runs({UNBALANCED: (1.0, 3.0)}, otherwise=(1.0, 1.0)))
    rows = {row.case: row for row in report.rows}
    assert len(rows) == 3 * len(TASKS) * len(RULES)
    row = rows["text_bias_heldout_loss"]
    assert (row.value, row.peer_value, row.ratio, row.rounds) == (1.0, 2.0, 2.0, 2)
    assert rows[f"text_{UNBALANCED}_max_vio"].ratio == 1.0


def test_synthetic_documents_repeat_with_the_seed_and_are_uneven() -> None:
    first, again, heldout = (
        np.stack(list(islice(zipf_documents(3, split), 100))) for split in ("train", "train", "heldout")
    )
    assert (first == again).all()
    assert not (first == heldout).all()
    counts = np.sort(np.bincount(first.ravel(), minlength=256))
    assert counts[-10:].sum() > 4 * counts.sum() * 10 / 256


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw_balance(tmp_path / "balance.png", _runs({}, otherwise=(2.0, 2.1)))
    assert (tmp_path / "balance.png").stat().st_size > 10_000


def _runs(losses: dict[str, tuple[float, ...]], otherwise: tuple[float, ...]) -> list[Run]:
    return [
        Run(task, rule, seed, [ONE_SIDED] * (2 * CURVE_STEPS), loss)
        for task in TASKS
        for rule in RULES
        for seed, loss in enumerate(losses.get(rule, otherwise))
    ]
