from __future__ import annotations

import threading
from typing import Any

import pytest

from cluster.backend import Rebalance
from cluster.errors import FailedPrecondition
from cluster.fabric.rebalancing import Rebalancer


class FakeChanges:
    def __init__(self, after: float, error: Exception | None = None) -> None:
        self.after, self.error = after, error
        self.asked: list[bool] = []
        self.was_asked = threading.Event()

    def rebalance(self, dry_run: bool, timeout_s: float) -> Rebalance:
        self.asked.append(dry_run)
        self.was_asked.set()
        if self.error:
            raise self.error
        return Rebalance((), 0.5, self.after, 1, not dry_run)


@pytest.mark.parametrize(("after", "asked"), [(0.9, [True, False]), (0.52, [True]), (0.4, [True])])
def test_groups_move_only_if_that_pays(after: float, asked: list[bool]) -> None:
    changes: Any = FakeChanges(after)
    Rebalancer(changes, 60.0).rebalance_if_it_pays()
    assert changes.asked == asked


def test_what_cannot_be_now_is_tried_again_later() -> None:
    now = [0.0]
    changes: Any = FakeChanges(0.9, FailedPrecondition("there is no load to balance yet"))
    rebalancer = Rebalancer(changes, 60.0, clock=lambda: now[0])
    for now[0] in (0.0, 59.0):
        rebalancer.look()
    assert not changes.asked
    for now[0] in (60.0, 120.0):
        changes.was_asked.clear()
        rebalancer.look()
        assert changes.was_asked.wait(10)
    assert changes.asked == [True, True]


def test_zero_is_never() -> None:
    changes: Any = FakeChanges(0.9)
    now = [0.0]
    rebalancer = Rebalancer(changes, 0.0, clock=lambda: now[0])
    now[0] = 1e9
    rebalancer.look()
    assert not changes.was_asked.wait(0.05)
