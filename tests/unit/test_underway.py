"""Operations tell how far they are, and how they end, whatever happens to them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from actors.errors import InvalidInput
from cluster.backend import Operation, OperationState
from cluster.control.coordinator import Coordinator
from cluster.control.model import ModelFacts
from cluster.fabric.guarded import Guarded
from cluster.fabric.underway import UnderWay
from cluster.placement.placement import ActorSlot, spread

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)


class Bench:
    def __init__(self) -> None:
        self.state = Guarded(Coordinator(MODEL, spread(8, 2, (ActorSlot("e0", "n0"),))))
        with self.state.changing() as coordinator:
            self.id = coordinator.operations.start("scale", 2, "mine", time.time()).id
        self.under_way = UnderWay(self.state, self.operation)
        self.calls: list[str] = []

    @property
    def operation(self) -> Operation:
        with self.state.reading() as coordinator:
            return coordinator.operations.get(self.id)

    def run(self, work: Callable[[], float]) -> bool:
        return self.under_way.run(
            work,
            done=lambda: self.calls.append("done"),
            cancelled=lambda: self.calls.append("cancelled"),
            failed=lambda: self.calls.append("failed"),
        )


def test_it_succeeds_with_what_it_cost() -> None:
    bench = Bench()

    def work() -> float:
        bench.under_way.report(0.5, "half")
        assert (bench.operation.progress, bench.operation.message) == (0.5, "half")
        return 0.25

    assert bench.run(work)
    assert bench.calls == ["done"]
    assert (bench.operation.state, bench.operation.stall_s) == (OperationState.SUCCEEDED, 0.25)


def test_it_stops_at_the_next_report_once_it_is_cancelled() -> None:
    bench = Bench()

    def work() -> float:
        with bench.state.changing() as coordinator:
            coordinator.operations.cancel(bench.id, time.time())
        bench.under_way.report(0.5, "half")
        raise AssertionError("it went on")

    assert not bench.run(work)
    assert bench.calls == ["cancelled"]
    assert bench.operation.state is OperationState.CANCELLED


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InvalidInput("is too much", field="actors", value=9), "actors"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError in the coordinator; see its log"),
    ],
)
def test_a_failure_is_undone_first_and_told(error: Exception, told: str) -> None:
    bench = Bench()

    def work() -> float:
        raise error

    assert not bench.run(work)
    assert bench.calls == ["failed"]
    assert bench.operation.state is OperationState.FAILED
    assert told in bench.operation.error


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_the_end_is_told_though_it_cannot_be_undone(is_cancelled: bool) -> None:
    bench = Bench()

    def work() -> float:
        if is_cancelled:
            with bench.state.changing() as coordinator:
                coordinator.operations.cancel(bench.id, time.time())
            bench.under_way.report(0.5, "half")
        raise InvalidInput("is too much", field="actors", value=9)

    def stumble() -> None:
        raise OSError("no such actor")

    assert not bench.under_way.run(work, cancelled=stumble, failed=stumble)
    assert bench.operation.state is (OperationState.CANCELLED if is_cancelled else OperationState.FAILED)
    with bench.state.changing() as coordinator:
        coordinator.operations.start("scale", 3, "another", time.time())
