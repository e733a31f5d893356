"""The window of loads against sums over all steps, and its measures against plain loops."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import InvalidInput
from actors.moe.measures import max_vio, sparse_layers, utilisation_std
from actors.values import Placement
from cluster.backend import LoadReport
from cluster.control.load import LoadLE, LoadWindow

L, E = 2, 4
PLACEMENT = Placement(1, (("b",), ("a",)), 2)
COUNTS = st.integers(0, 200)
LOADS = st.lists(st.lists(COUNTS, min_size=E, max_size=E), min_size=L, max_size=L)


def reported(loads: Sequence[LoadLE], *, max_steps: int = 3, tokens: int = 64, microbatches: int = 1) -> LoadReport:
    window = LoadWindow(max_steps, L, E)
    for number, load_LE in enumerate(loads, start=1):
        window.add(load_LE, number, 100.0 + number, tokens, microbatches)
    return window.report(len(loads), PLACEMENT, {"a": "n0", "b": "n0"})


@given(st.lists(LOADS, min_size=1, max_size=9), st.integers(1, 4))
def test_the_sum_is_that_of_the_newest_steps(loads: list[list[list[int]]], max_steps: int) -> None:
    kept = np.array(loads[-max_steps:])
    report = reported(loads, max_steps=max_steps)
    assert report.load_LE == tuple(map(tuple, kept.sum(0).tolist()))
    assert [step.load_E for step in report.history] == [tuple(load_E) for load_E in kept.sum(1).tolist()]
    newest = list(range(1, len(loads) + 1))[-max_steps:]
    assert [(step.version, step.time_s) for step in report.history] == [(n, 100.0 + n) for n in newest]
    assert (report.version, report.window_steps) == (len(loads), len(kept))
    assert sum(report.actors.values()) == sum(report.nodes.values()) == kept.sum()


@given(LOADS)
def test_measures_are_those_of_each_layer_alone(load_LE: list[list[int]]) -> None:
    for load_E, vio, std in zip(load_LE, max_vio(load_LE).tolist(), utilisation_std(load_LE).tolist(), strict=True):
        mean = sum(load_E) / E
        assert vio == pytest.approx(max(load_E) / mean - 1 if mean else 0)
        assert std == pytest.approx(statistics.pstdev(n / mean for n in load_E) if mean else 0)


@given(LOADS, st.integers(1, 1000), st.integers(1, 130))
def test_the_warning_is_that_of_each_layer_alone(load_LE: list[list[int]], tokens: int, minimum: int) -> None:
    found = {sparse.layer: str(sparse) for sparse in sparse_layers(load_LE, tokens, minimum)}
    assert set(found) == {layer for layer, load_E in enumerate(load_LE) if sum(load_E) and min(load_E) < minimum}
    assert found == {layer: str(*sparse_layers([load_LE[layer]], tokens, minimum)) for layer in found}


def test_a_report_of_known_numbers() -> None:
    report = reported([[[10, 20, 30, 40], [0, 0, 60, 60]], [[10, 20, 30, 40], [0, 0, 0, 80]]], microbatches=2)
    assert report.load_LE == ((20, 40, 60, 80), (0, 0, 60, 140))
    assert report.actors == {"b": 60, "a": 340}
    assert report.nodes == {"n0": 400}
    assert report.max_vio_L == pytest.approx((0.6, 1.8))
    assert report.max_vio == pytest.approx(1.8)
    assert report.utilisation_std_L == pytest.approx((np.std([20, 40, 60, 80]) / 50, np.std([0, 0, 60, 140]) / 50))
    assert report.utilisation_std == max(report.utilisation_std_L)
    assert (report.microbatch_tokens_per_expert, report.step_tokens_per_expert) == (12.5, 25.0)
    assert report.warning == (
        "2 of 2 MoE layers give experts few tokens a micro-batch; the worst, layer 1: 4 of 4 experts got fewer than 64 "
        "tokens of a batch of 32 (the least: 0); every expert reaches it with a batch of 164 tokens if evenly used "
        "(an expert got none at all)"
    )


def test_the_batch_that_the_warning_names_is_enough() -> None:
    even = reported([[[32] * E] * L], tokens=64)
    assert "a batch of 128 tokens if evenly used (128 as routed now)" in even.warning
    assert reported([[[64] * E] * L], tokens=128).warning == ""


def test_an_expert_that_is_rarely_used_is_not_said_to_get_nothing() -> None:
    report = reported([[[100] * E, [1, 199, 100, 100]]], tokens=100, microbatches=4)
    assert "the least: 0.25" in report.warning
    assert "6400 as routed now" in report.warning


def test_steps_without_any_pair() -> None:
    report = reported([[[0] * E] * L])
    assert (report.max_vio, report.utilisation_std, report.warning) == (0.0, 0.0, "")
    assert (report.window_steps, report.load_LE) == (1, ((0,) * E,) * L)


def test_a_groups_load_is_split_over_its_holders_to_the_last_pair() -> None:
    window = LoadWindow(1, 1, 4)
    window.add([[5, 6, 20, 0]], 1, 1.0, 31, 1)
    report = window.report(1, Placement(1, (("b", "a", "c"), ("a",)), 2), {"a": "n0", "b": "n1", "c": "n1"})
    assert report.actors == {"b": 4, "a": 4 + 20, "c": 3}
    assert report.nodes == {"n1": 7, "n0": 24}
    lost = window.report(1, Placement(2, (("a",), ()), 2), {"a": "n0"})
    assert lost.actors == {"a": 11}


def test_no_step_yet() -> None:
    report = reported([])
    assert report == LoadReport(0, 0, 2, (), {}, {}, (), 0.0, (), 0.0, 0.0, 0.0, "", ())
    assert LoadWindow(3, L, E).load_LE == ()


@pytest.mark.parametrize(
    "load_LE", [[[1] * E], [[1] * 3] * L, [[1] * E, [1] * 3], [], [[1, 2, 3, -1], [1] * E], [[[1] * E] * L]]
)
def test_what_is_no_load_of_this_model_changes_nothing(load_LE: LoadLE) -> None:
    window = LoadWindow(3, L, E)
    window.add([[1] * E] * L, 1, 1.0, 64, 1)
    before = window.report(1, PLACEMENT, {})
    with pytest.raises(InvalidInput, match="load_LE: is not 2 rows of 4 counts"):
        window.add(load_LE, 2, 2.0, 64, 1)
    assert window.report(1, PLACEMENT, {}) == before


def test_the_control_plane_imports_no_torch() -> None:
    code = "import sys, cluster.control.coordinator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
