"""Of several tries to return to a saved state the last one holds, whichever an expert actor is done with last."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import StepAborted
from cluster.checkpoint import memory
from cluster.fabric.expertworker import ExpertWorker

WAIT_S = 10.0


class Host:
    """The first return takes until it is let go."""

    def __init__(self) -> None:
        self.exchange = SimpleNamespace(keeper=None)
        self.saving = self
        self.run = 1
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.order: list[str] = []

    def status(self) -> dict[str, int]:
        return {"run": self.run}

    def restore(self, groups: Any, saved: str, run: int) -> None:
        self.run = run
        self.order.append(f"begin {saved}")
        if not self.entered.is_set():
            self.entered.set()
            assert self.go_on.wait(WAIT_S)
        self.order.append(f"end {saved}")


@contextmanager
def saved_experts(found: str, keeper: object, way: object) -> Iterator[str]:
    yield found


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> ExpertWorker:
    monkeypatch.setattr(memory, "saved_experts", saved_experts)
    monkeypatch.setattr(ExpertWorker, "_way", lambda self: None)
    made: Any = ExpertWorker.__new__(ExpertWorker)
    made._name, made._host, made._restoring = "expert-0", Host(), threading.Lock()
    return made  # type: ignore[no-any-return]


def test_the_next_try_waits_for_one_that_is_still_loading(worker: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(worker.restore, [0], "first", 2)
        assert worker._host.entered.wait(WAIT_S)
        second = pool.submit(worker.restore, [0], "second", 3)
        with pytest.raises(TimeoutError):
            second.result(0.2)
        worker._host.go_on.set()
        first.result(WAIT_S)
        second.result(WAIT_S)
    assert worker._host.order == ["begin first", "end first", "begin second", "end second"]


def test_one_that_comes_after_the_next_is_refused(worker: Any) -> None:
    worker._host.go_on.set()
    worker.restore([0], "second", 3)
    with pytest.raises(StepAborted, match="a return to run 2 of expert-0, which is at run 3"):
        worker.restore([0], "first", 2)
    worker.restore([0], "third", 3)
    assert worker._host.order[-1] == "end third"
