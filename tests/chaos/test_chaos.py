"""The fault benchmark on a real cluster, as short as it can be: a few faults, and nothing lost, wrong or left over."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.chaos.report import summary
from cluster.chaos.run import Settings, run_chaos
from cluster.commands.chaos import JOB
from tests.integration.test_copies import config_in


@pytest.mark.timeout(600)
def test_a_kill_and_a_stall_cost_nothing_but_time(tmp_path: Path) -> None:
    told: list[str] = []
    settings = Settings(
        cluster=config_in(tmp_path),
        job=JOB,
        output=tmp_path,
        minutes=0.3,
        reference_s=3.0,
        mtbf_s=4.0,
        min_gap_s=2.0,
        kinds=("kill", "stall"),
        seed=0,
        streams=2,
    )
    found = summary(run_chaos(settings, told.append, lambda doing, share: None))
    assert found["problems"] == []
    assert found["faults"] >= 2
    assert set(found["recovery_s"]) == {"kill", "stall"}
    assert found["requests"]["failed"] == 0
    assert found["requests"]["total"] > 4
    assert found["tokens_wrong"] == 0
    assert found["loss_rel_diff_max"] < 1e-6
    assert found["updates_lost"] == 0
    assert found["leaks"]["processes"] == 0
    assert any("whole again" in line for line in told)
