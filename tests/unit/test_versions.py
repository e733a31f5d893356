"""The gate between forwards and updates: who waits for whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from actors.errors import MoeClusterError, StepAborted
from actors.router.versions import VersionGate

WAIT_S = 20.0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def writer(gate: VersionGate, pool: ThreadPoolExecutor) -> tuple[Future[None], threading.Event]:
    """One that waits, or is inside until it is let out."""
    let_out = threading.Event()

    def write() -> None:
        with gate.writing():
            assert let_out.wait(WAIT_S)

    return pool.submit(write), let_out


def until_awaited(gate: VersionGate) -> None:
    deadline = time.monotonic() + WAIT_S
    while not gate.is_awaited:
        assert time.monotonic() < deadline, "no update came"
        time.sleep(0.005)


def test_an_update_waits_for_a_hold_and_other_forwards_do_not_wait_for_it(pool: ThreadPoolExecutor) -> None:
    gate = VersionGate(WAIT_S)
    hold = gate.hold()
    assert not hold.is_awaited
    update, let_out = writer(gate, pool)
    until_awaited(gate)
    assert hold.is_awaited
    with gate.reading():  # a forward that may be in the way of the next of those that hold
        assert not gate._writing
    hold.end()
    let_out.set()
    update.result(WAIT_S)
    assert not gate.is_awaited


def test_an_update_that_waits_comes_before_the_next_hold(pool: ThreadPoolExecutor) -> None:
    gate = VersionGate(WAIT_S)
    hold = gate.hold()
    update, let_out = writer(gate, pool)
    until_awaited(gate)
    gate._timeout_s = 0.05
    with pytest.raises(StepAborted, match="did not end"):
        gate.hold()
    gate._timeout_s = WAIT_S
    after = pool.submit(lambda: gate.hold().end())
    hold.end()
    let_out.set()
    update.result(WAIT_S)
    after.result(WAIT_S)
    with gate.writing():
        assert not gate.is_awaited


def test_who_writes_passes_a_gate_that_is_shut_and_who_reads_waits(pool: ThreadPoolExecutor) -> None:
    gate = VersionGate(WAIT_S)
    with gate.writing():
        gate.shut()
    read, entered = threading.Event(), threading.Event()

    def reader() -> None:
        entered.set()
        with gate.reading():
            read.set()

    forward = pool.submit(reader)
    assert entered.wait(WAIT_S)
    with gate.writing():
        pass
    assert not read.wait(0.1)
    assert gate.is_shut
    gate.open()
    gate.wait_until_open()
    forward.result(WAIT_S)
    assert read.is_set()


def test_no_hold_is_given_while_it_is_shut() -> None:
    """It would keep out who is to open it."""
    gate = VersionGate(0.05)
    gate.shut()
    with pytest.raises(MoeClusterError):
        gate.hold()
    with pytest.raises(StepAborted, match="weights were being replaced"):
        gate.wait_until_open()
    with gate.writing():
        gate.open()
    gate.hold().end()
