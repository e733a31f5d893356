"""What the benchmark of micro-batches in flight measures with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.optim import OptimizerSettings
from actors.transport.message import Message
from cluster.bench import overlap
from cluster.bench.local import local_cluster
from cluster.bench.overlap import IN_FLIGHT, Travel, rows_of


class Host:
    def __init__(self) -> None:
        self.is_ready, self.handled = True, list[str]()

    def ready(self, question: Message) -> bool:
        return self.is_ready

    def handle(self, peer: str, question: Message) -> Message:
        self.handled.append(question.op)
        return Message("ok")


def test_questions_travel_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(overlap, "time", SimpleNamespace(monotonic=lambda: clock.now))
    host: Any = Host()
    travel = Travel(host)
    travel.delay_s = 0.5
    first, second = Message("forward", {}, (), 1), Message("forward", {}, (), 2)
    assert not travel.ready(first)
    clock.now += 0.3
    assert not travel.ready(second)
    clock.now += 0.2
    assert travel.ready(first)
    assert not travel.ready(second)
    travel.handle("router", first)
    clock.now += 0.3
    host.is_ready = False
    assert not travel.ready(second), "the host itself is not ready"
    host.is_ready = True
    assert travel.ready(second)
    travel.handle("router", second)
    assert not travel._due


def test_every_number_in_flight_trains_the_same_batches() -> None:
    batches = [[torch.randint(0, 256, (1, 8)) for _ in range(3)]]
    tokens = 3 * 7
    with local_cluster(seed=0) as local:
        local.router.begin_run(OptimizerSettings())
        rows = rows_of("overlap", local.router, batches, tokens, 0.01, rounds=2)
        assert local.router.version == len(IN_FLIGHT) * 3, "two rounds and one to warm up"
    assert [row.case for row in rows] == ["overlap_m2_10ms", "overlap_m3_10ms"]
    assert all(row.value > 0 and row.ratio > 0 and row.rounds == 2 for row in rows)
    assert all("10 ms" in row.peer for row in rows)
