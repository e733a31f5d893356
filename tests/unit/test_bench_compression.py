"""`bench compression`: what it counts, its rows, its picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from actors.compress.settings import CompressionSettings
from cluster.bench.compression import (
    COPIES,
    SETTINGS,
    UNCOMPRESSED,
    CompressionRow,
    Run,
    bench_compression,
    label,
    report_of,
)
from cluster.report import draw_compression

INT8 = CompressionSettings("int8")


def test_two_routers_train_and_the_link_counts() -> None:
    runs = bench_compression(rounds=1, steps=2, settings=(UNCOMPRESSED, INT8))
    plain, compressed = report_of(runs).rows
    assert isinstance(plain, CompressionRow)
    assert isinstance(compressed, CompressionRow)
    num_parameters = plain.value / 2 / 4  # there and back, float32
    assert num_parameters == 88_960
    assert (plain.ratio, plain.loss_difference) == (1, 0)
    assert 3.5 < compressed.ratio < 4
    assert compressed.link_ratio < compressed.ratio
    assert all(math.isfinite(run.heldout_loss) and run.steps == 2 for run in runs)
    assert abs(compressed.loss_difference) < 0.01


def test_copies_train_and_what_hosts_send_each_other_is_counted() -> None:
    runs = bench_compression(rounds=1, steps=2, settings=(COPIES[0], COPIES[1]))
    plain, compressed = report_of(runs).rows
    assert isinstance(compressed, CompressionRow)
    assert (plain.case, compressed.case, compressed.peer) == ("copies_none", "copies_int8", "copies_none")
    num_parameters = 2 * 16 * 3 * 64 * 64  # layers, experts, matrices
    assert 0.9 * num_parameters < plain.value / 2 / 4 <= num_parameters, "there and back; float32"
    assert 3 < compressed.ratio < 4.5, "an expert without tokens is not sent"
    assert all(math.isfinite(run.heldout_loss) and run.steps == 2 for run in runs)


def test_rows_are_means_over_the_seeds_beside_the_first_setting() -> None:
    runs = [
        Run(each, seed, steps=10, gradient_bytes=size, link_bytes=size + 100, heldout_loss=loss + seed)
        for seed in (0, 1)
        for each, size, loss in ((UNCOMPRESSED, 1000, 1.5), (INT8, 250, 2.5))
    ]
    first, row = report_of(runs).rows
    assert isinstance(row, CompressionRow)
    assert (first.case, row.case, row.peer) == ("none", "int8", "none")
    assert (row.value, row.peer_value, row.ratio, row.rounds) == (25, 100, 4, 2)
    assert (row.heldout_loss, row.loss_difference) == (3.0, pytest.approx(0.5))
    assert row.link_ratio == pytest.approx(1100 / 350)


def test_every_setting_has_its_own_name() -> None:
    assert len({label(settings) for settings in (*SETTINGS, *COPIES)}) == len(SETTINGS) + len(COPIES)
    assert label(CompressionSettings("powersgd", rank=2, quantised=True)) == "powersgd_rank_2_int8"
    assert label(CompressionSettings("topk", share=0.05)) == "topk_0.05"


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    runs = [
        Run(each, 0, steps=1, gradient_bytes=1000 // (number + 1), link_bytes=1000, heldout_loss=2 + 0.01 * number)
        for number, each in enumerate((*SETTINGS, *COPIES))
    ]
    draw_compression(tmp_path / "compression.png", report_of(runs))
    assert (tmp_path / "compression.png").stat().st_size > 10_000
