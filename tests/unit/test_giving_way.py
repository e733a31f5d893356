"""Updates beside forwards stop between two pieces while a router waits for an answer, unless they are waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest
import torch

from actors.expert import updates as module
from actors.expert.holdings import Holdings, TakenGradients
from actors.expert.updates import PendingUpdate, Updates
from actors.moe.experts import Between
from actors.optim import OptimizerSettings

PIECES = 6
WAIT_S = 30.0


class Stack:
    weights: Mapping[str, torch.Tensor] = {}

    def switch(self, weights: Mapping[str, torch.Tensor]) -> None:
        pass


class FakeHoldings:
    """An update of as many pieces; the first waits until the test lets it go."""

    settings = OptimizerSettings(staleness=4)

    def __init__(self) -> None:
        self.stacks = [Stack()]
        self.started, self.may_go = threading.Event(), threading.Event()
        self.made = 0

    def updated(self, layer: int, steps: Any, between: Between) -> dict[str, torch.Tensor]:
        self.started.set()
        assert self.may_go.wait(WAIT_S)
        for _ in range(PIECES):
            self.made += 1
            between()
        return {}

    def give_back(self, layer: int, taken: TakenGradients, between: Between) -> None:
        pass


@pytest.fixture
def holdings() -> FakeHoldings:
    return FakeHoldings()


@pytest.fixture
def updates(holdings: FakeHoldings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Updates]:
    monkeypatch.setattr(module, "GIVE_WAY_S", WAIT_S)
    made = Updates("expert-0", lambda: cast(Holdings, holdings), torch.device("cpu"), timeout_s=WAIT_S)
    yield made
    made.close()


def put(updates: Updates) -> None:
    updates.put(PendingUpdate(1, 1e-3, 1.0, [TakenGradients({}, {})], frozenset()))


def begin(updates: Updates, holdings: FakeHoldings) -> None:
    """One update is at its first piece."""
    put(updates)
    assert holdings.started.wait(WAIT_S)


def is_stopped(updates: Updates) -> bool:
    with updates._changed:
        return bool(updates._changed.wait_for(lambda: updates._gives_way, 0.01))


def stop(updates: Updates, holdings: FakeHoldings) -> None:
    holdings.may_go.set()
    for _ in range(int(WAIT_S / 0.01)):
        if is_stopped(updates):
            break
    assert holdings.made == 1


def test_it_stops_after_the_piece_at_hand_and_goes_on_behind_the_question(
    updates: Updates, holdings: FakeHoldings
) -> None:
    begin(updates, holdings)
    with updates.first():
        stop(updates, holdings)
        assert updates.lag(0) == 1
    updates.wait(0, 0)
    assert holdings.made == PIECES


def test_who_drains_need_not_wait_for_the_question(updates: Updates, holdings: FakeHoldings) -> None:
    begin(updates, holdings)
    with updates.first():
        stop(updates, holdings)
        updates.drain()
        assert holdings.made == PIECES


def test_who_waits_for_a_layer_need_not_wait_for_the_question(updates: Updates, holdings: FakeHoldings) -> None:
    begin(updates, holdings)
    with updates.first():
        stop(updates, holdings)
        updates.wait(0, 0)
        assert holdings.made == PIECES


def test_a_question_that_is_to_come_again_later_is_waited_for(updates: Updates, holdings: FakeHoldings) -> None:
    begin(updates, holdings)
    with updates.first():
        stop(updates, holdings)
        assert not updates.admits(0, 0)
        for _ in range(int(WAIT_S / 0.01)):
            if updates.lag(0) == 0:
                break
            holdings.started.wait(0.01)
            threading.Event().wait(0.01)
        assert holdings.made == PIECES
    assert updates.admits(0, 0)


def test_late_updates_go_on_before_anybody_has_to_wait_for_them(updates: Updates, holdings: FakeHoldings) -> None:
    """Later than half of what is allowed."""
    begin(updates, holdings)
    with updates.first():
        stop(updates, holdings)
        put(updates)
        assert is_stopped(updates)
        assert holdings.made == 1
        put(updates)
        with updates._changed:
            assert updates._changed.wait_for(lambda: updates.max_lag == 2, WAIT_S)
        assert holdings.made >= PIECES


def test_it_ends_while_it_gives_way(updates: Updates, holdings: FakeHoldings) -> None:
    begin(updates, holdings)
    with updates.first():
        stop(updates, holdings)
        updates.close()
        assert updates._thread is not None
        assert not updates._thread.is_alive()


def test_it_is_not_put_off_for_ever(updates: Updates, holdings: FakeHoldings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GIVE_WAY_S", 0.001)
    begin(updates, holdings)
    with updates.first():
        holdings.may_go.set()
        for _ in range(int(WAIT_S / 0.01)):
            if holdings.made == PIECES:
                break
            threading.Event().wait(0.01)
        assert holdings.made == PIECES


def test_who_waits_for_the_core_gets_it_after_each_piece(
    updates: Updates, holdings: FakeHoldings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no question is known of: the thread that takes it in may be what waits."""
    yielded: list[int] = []
    monkeypatch.setattr(module.os, "sched_yield", lambda: yielded.append(holdings.made))
    begin(updates, holdings)
    holdings.may_go.set()
    with updates._changed:
        assert updates._changed.wait_for(lambda: not updates.max_lag, WAIT_S)
    assert yielded == list(range(1, PIECES + 1))


def test_while_somebody_waits_for_updates_the_core_is_kept(
    updates: Updates, holdings: FakeHoldings, monkeypatch: pytest.MonkeyPatch
) -> None:
    yielded: list[int] = []
    monkeypatch.setattr(module.os, "sched_yield", lambda: yielded.append(holdings.made))
    begin(updates, holdings)
    waits = threading.Thread(target=updates.drain)
    waits.start()
    for _ in range(int(WAIT_S / 0.01)):
        if updates._draining:
            break
        threading.Event().wait(0.01)
    holdings.may_go.set()
    waits.join(WAIT_S)
    assert not waits.is_alive()
    assert holdings.made == PIECES
    assert not yielded
