"""The table of long-running operations: one at a time, known by request id, with one end each."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.errors import InvalidInput
from cluster.backend import Operation, OperationState
from cluster.control.operations import OperationTable
from cluster.errors import AlreadyExists, FailedPrecondition, NotFound

KIND = "scale_experts"


@pytest.fixture
def table() -> OperationTable:
    return OperationTable()


def start(table: OperationTable, request_id: str = "r", target: int = 4, now: float = 10.0) -> str:
    return table.start(KIND, target, request_id, now).id


def finish(table: OperationTable, request_id: str) -> str:
    operation_id = start(table, request_id)
    table.succeeded(operation_id, 20.0, 1.0, 0.1)
    return operation_id


def test_from_the_request_to_the_end(table):
    operation = table.start(KIND, 4, "r", 10.0)
    assert operation == Operation("operation-1", "r", KIND, OperationState.RUNNING, 4, 0.0, "", created_s=10.0)
    table.progress(operation.id, 0.5, "2 of 4 groups are there")
    seen = table.get(operation.id)
    assert (seen.progress, seen.message, seen.ended_s) == (0.5, "2 of 4 groups are there", None)
    table.succeeded(operation.id, 17.0, 6.5, 0.02)
    done = table.get(operation.id)
    assert (done.state, done.progress, done.ended_s) == (OperationState.SUCCEEDED, 1.0, 17.0)
    assert (done.prepare_s, done.stall_s, done.error) == (6.5, 0.02, "")
    assert operation.state is OperationState.RUNNING, "what was given out does not change"


def test_a_failure_keeps_how_far_it_came(table):
    operation_id = start(table)
    table.progress(operation_id, 0.5, "copying")
    table.failed(operation_id, "node-1 is full", 12.0)
    failed = table.get(operation_id)
    assert (failed.state, failed.error, failed.ended_s) == (OperationState.FAILED, "node-1 is full", 12.0)
    assert (failed.progress, failed.message, failed.prepare_s) == (0.5, "copying", 0.0)


class TestStart:
    def test_a_request_stands_for_one_node(self, table):
        operation = table.start("drain_node", 0, "r", 10.0, "node-1")
        assert operation.node == "node-1"
        assert table.start("drain_node", 0, "r", 11.0, "node-1") == operation
        with pytest.raises(AlreadyExists, match="drain_node node-1"):
            table.start("drain_node", 0, "r", 11.0, "node-2")
        with pytest.raises(FailedPrecondition, match="drain_node node-1"):
            table.start(KIND, 4, "r2", 11.0)

    def test_the_same_request_gives_the_same_operation_also_after_its_end(self, table):
        first = start(table)
        assert start(table, now=11.0) == first
        table.failed(first, "why", 12.0)
        assert table.start(KIND, 4, "r", 13.0) == table.get(first)
        assert len(table.all()) == 1

    def test_a_request_id_with_something_else_is_refused(self, table):
        start(table)
        with pytest.raises(AlreadyExists, match=r"'r'.*operation-1.*to 4"):
            start(table, target=5)
        with pytest.raises(AlreadyExists):
            table.start("another", 4, "r", 11.0)

    def test_one_runs_at_a_time_and_the_refusal_names_it(self, table):
        first = start(table)
        with pytest.raises(FailedPrecondition, match=r"operation-1 \(scale_experts to 4\) is running"):
            start(table, "other")
        table.cancel(first, 11.0)
        with pytest.raises(FailedPrecondition, match=r"operation-1.*is cancelling"):
            start(table, "other")
        table.cancelled(first, 12.0)
        assert table.active() is None
        second = start(table, "other")
        assert table.active() == table.get(second)

    def test_a_request_without_an_id(self, table):
        with pytest.raises(InvalidInput, match="request_id"):
            start(table, "")
        assert not table.all()

    def test_an_id_that_nobody_knows(self, table):
        for call in (
            table.get,
            table.is_cancelling,
            lambda unknown: table.cancel(unknown, 1.0),
            lambda unknown: table.progress(unknown, 0.5, ""),
            lambda unknown: table.succeeded(unknown, 1.0, 0.0, 0.0),
        ):
            with pytest.raises(NotFound, match="operation-9"):
                call("operation-9")


class TestProgress:
    @given(st.lists(st.floats(), max_size=10))
    def test_it_stays_in_its_range_and_never_falls(self, fractions):
        table = OperationTable()
        operation_id, reached = start(table), 0.0
        for number, fraction in enumerate(fractions):
            table.progress(operation_id, fraction, f"part {number}")
            seen = table.get(operation_id)
            assert reached <= seen.progress <= 1.0
            assert seen.message == f"part {number}"
            assert seen.progress >= min(1.0, fraction) or math.isnan(fraction)
            reached = seen.progress

    def test_a_late_report_changes_nothing(self, table):
        operation_id = start(table)
        table.cancel(operation_id, 11.0)
        table.progress(operation_id, 0.75, "one more group")
        assert table.get(operation_id).progress == 0.75
        table.cancelled(operation_id, 12.0)
        before = table.get(operation_id)
        table.progress(operation_id, 0.9, "late")
        assert table.get(operation_id) == before


class TestCancel:
    def test_it_is_asked_for_once_and_carried_out_later(self, table):
        operation_id = start(table)
        assert not table.is_cancelling(operation_id)
        cancelling = table.cancel(operation_id, 11.0)
        assert (cancelling.state, cancelling.ended_s) == (OperationState.CANCELLING, None)
        assert table.cancel(operation_id, 12.0) == cancelling
        assert table.is_cancelling(operation_id)
        table.cancelled(operation_id, 13.0)
        ended = table.get(operation_id)
        assert (ended.state, ended.ended_s) == (OperationState.CANCELLED, 13.0)
        assert not table.is_cancelling(operation_id)

    @pytest.mark.parametrize("end", ["succeeded", "failed"])
    def test_another_end_may_come_first(self, table, end):
        operation_id = start(table)
        table.cancel(operation_id, 11.0)
        if end == "succeeded":
            table.succeeded(operation_id, 12.0, 1.0, 0.0)
        else:
            table.failed(operation_id, "why", 12.0)
        assert table.get(operation_id).state.value == end

    def test_what_nobody_asked_to_end_is_not_cancelled(self, table):
        operation_id = start(table)
        with pytest.raises(FailedPrecondition, match="is running, it cannot become cancelled"):
            table.cancelled(operation_id, 11.0)

    def test_a_final_one_is_refused_and_unchanged(self, table):
        done = table.get(finish(table, "r"))
        for call in (
            lambda: table.cancel(done.id, 21.0),
            lambda: table.cancelled(done.id, 21.0),
            lambda: table.failed(done.id, "why", 21.0),
            lambda: table.succeeded(done.id, 21.0, 0.0, 0.0),
        ):
            with pytest.raises(FailedPrecondition, match="operation-1 is succeeded"):
                call()
        assert table.get(done.id) == done


class TestKept:
    def test_the_newest_ones_newest_first(self):
        table = OperationTable(max_operations=2)
        for request_id in "abc":
            finish(table, request_id)
        assert [operation.id for operation in table.all()] == ["operation-3", "operation-2"]
        with pytest.raises(NotFound):
            table.get("operation-1")

    def test_a_forgotten_request_starts_anew_under_a_new_id(self):
        table = OperationTable(max_operations=1)
        finish(table, "a")
        finish(table, "b")
        assert start(table, "a") == "operation-3"

    def test_100_unless_said_otherwise(self, table):
        for number in range(101):
            finish(table, str(number))
        assert len(table.all()) == 100

    def test_none_is_too_few(self):
        with pytest.raises(InvalidInput, match="max_operations"):
            OperationTable(0)


class AnyOrder(RuleBasedStateMachine):
    """Whatever is called in whatever order: one active operation, all ends final, times in order."""

    def __init__(self) -> None:
        super().__init__()
        self.table = OperationTable(max_operations=3)
        self.now = 0.0
        self.final: dict[str, Operation] = {}

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    @rule(request_id=st.sampled_from("abcdef"), wanted=st.integers(1, 2))
    def start(self, request_id: str, wanted: int) -> None:
        busy = self.table.active()
        known = {operation.request_id: operation for operation in self.table.all()}
        try:
            operation = self.table.start(KIND, wanted, request_id, self.tick())
        except AlreadyExists:
            assert known[request_id].target != wanted
        except FailedPrecondition:
            assert busy
            assert request_id not in known
        else:
            assert (operation.target, operation.request_id) == (wanted, request_id)
            assert (request_id in known) == (operation in known.values())

    @precondition(lambda self: self.table.active())
    @rule(end=st.sampled_from(["succeeded", "failed", "cancelled", "cancel", "progress"]), fraction=st.floats())
    def act(self, end: str, fraction: float) -> None:
        active = self.table.active()
        assert active is not None
        if end == "succeeded":
            self.table.succeeded(active.id, self.tick(), 1.0, 0.0)
        elif end == "failed":
            self.table.failed(active.id, "why", self.tick())
        elif end == "cancel":
            self.table.cancel(active.id, self.tick())
        elif end == "progress":
            self.table.progress(active.id, fraction, "on the way")
        elif self.table.is_cancelling(active.id):
            self.table.cancelled(active.id, self.tick())

    @invariant()
    def holds(self) -> None:
        operations = self.table.all()
        assert len(operations) <= 3
        assert all(operation.state.is_final for operation in operations[1:])
        for operation in operations:
            assert operation.state.is_final == (operation.ended_s is not None)
            assert operation.ended_s is None or operation.ended_s > operation.created_s
            if operation.state.is_final:
                assert self.final.setdefault(operation.id, operation) == operation


TestAnyOrder = AnyOrder.TestCase
