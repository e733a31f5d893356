"""Who writes a snapshot owns it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from actors.optim import OptimizerSettings
from actors.snapshots import Snapshot, taken_over


@pytest.mark.parametrize(("version", "is_left"), [(3, False), (2, True)])
def test_only_a_snapshot_of_the_version_is_taken_over(version: int, is_left: bool) -> None:
    snapshot: Snapshot[str] = Snapshot(3, 1, 0, OptimizerSettings(), {})
    place = SimpleNamespace(snapshot=snapshot)
    assert taken_over(place, version) is snapshot
    assert place.snapshot is (snapshot if is_left else None)
