"""An expert actor reads its own experts and nothing else."""

from __future__ import annotations

from cluster.bench.memory import bench_memory


def test_a_quarter_of_the_experts_takes_under_40_percent_of_the_model() -> None:
    (row,) = bench_memory(rounds=1).rows
    model_mb = 824
    assert f"{model_mb} MB model" in row.peer
    assert row.value < 0.4 * model_mb
    assert row.value > 0.25 * model_mb * 0.9, "less than its own weights: then nothing was loaded"
