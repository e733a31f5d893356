"""A change of placement: what deaths meanwhile leave of it, and that nothing is left behind to meet the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import PeerLost, StepAborted
from actors.values import Placement
from cluster.backend import GroupMove
from cluster.control.coordinator import Coordinator
from cluster.control.model import ModelFacts
from cluster.control.rebalancing import Proposal, Stage
from cluster.errors import Unavailable
from cluster.fabric import changes as edge
from cluster.fabric.changes import Changes
from cluster.fabric.guarded import Guarded

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)


class Crew:
    """Answers are made when they are waited for."""

    def __init__(self, arrive: Callable[[], int], adopt: Callable[[Placement], float]) -> None:
        self.done: list[str] = []
        self.used: list[Placement] = []
        self._arrive, self._adopt = arrive, adopt
        self.router = SimpleNamespace(adopt=SimpleNamespace(remote=self._asked))

    def contacts(self, placement: object) -> list[str]:
        return []

    def contact(self, name: str) -> str:
        return name

    def handle(self, name: str) -> Any:
        return SimpleNamespace(
            arrive=SimpleNamespace(remote=lambda *args: self._arrive),
            leave_off=SimpleNamespace(remote=lambda groups: lambda: self.done.append(f"{name} gave up {groups}")),
        )

    def _asked(self, placement: Placement, contacts: object) -> Callable[[], float]:
        def adopt() -> float:
            seconds = self._adopt(placement)
            self.used.append(placement)
            self.done.append(f"used {placement.holders[0]}")
            return seconds

        return adopt


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "call", lambda who, ref, timeout_s: ref())
    monkeypatch.setattr(edge, "NOTICED_S", 0.5)


BEFORE = Placement(1, (("e0",), *(("e2",),) * 3), 2)
AFTER = replace(BEFORE, epoch=BEFORE.epoch + 1, holders=(("e0", "e1"), *BEFORE.holders[1:]))
COPY = Proposal(AFTER, (Stage((GroupMove(0, "e0", "e1", 1),), AFTER),), 0.5, 1.0)


class Here:
    """Group 0 is copied from e0 to e1. `at_switch` is called when the router is told, and may raise."""

    def __init__(self, at_switch: Callable[[Here], None], arrive: Callable[[], int] = lambda: 1) -> None:
        self.coordinator = Coordinator(MODEL, BEFORE)
        self.at_switch = at_switch
        crew: Any = Crew(arrive, self._adopt)
        self.crew: Crew = crew
        self.state = Guarded(self.coordinator)
        self._changes = Changes(self.state, crew)

    def carry_out(self) -> float:
        return self._changes.carry_out(COPY, time.monotonic() + 10.0)

    def lose(self, name: str) -> None:
        with self.state.changing() as coordinator:
            coordinator.actor_lost(name, 1.0, "killed", pid=1)

    def _adopt(self, placement: Placement) -> float:
        if placement.epoch > BEFORE.epoch:
            self.at_switch(self)
        return 0.25


def go_on(here: Here) -> None: ...


def test_groups_on_their_way_are_given_up_before_the_change_has_ended() -> None:
    def arrive() -> int:
        raise PeerLost("the owner is gone", peer="e0")

    here = Here(go_on, arrive)
    with pytest.raises(PeerLost):
        here.carry_out()
    assert here.crew.done[1:] == ["e1 gave up [0]"]
    assert here.coordinator.placement == BEFORE


def test_all_use_what_has_come() -> None:
    here = Here(go_on)
    assert here.carry_out() == 0.25
    assert here.crew.used == [BEFORE, AFTER]
    assert (here.coordinator.placement, here.coordinator.is_switching) == (AFTER, False)


def test_the_router_does_not_switch_and_nobody_died() -> None:
    def refuse(here: Here) -> None:
        raise StepAborted("a group has not arrived")

    here = Here(refuse)
    with pytest.raises(StepAborted):
        here.carry_out()
    assert here.coordinator.placement == replace(BEFORE, epoch=AFTER.epoch + 1)
    assert (here.coordinator.is_switching, here.crew.done[1:]) == (False, ["e1 gave up [0]"])


@pytest.mark.parametrize("is_known_at_once", [True, False])
@pytest.mark.parametrize("victim", ["e0", "e1"])
def test_after_a_death_the_holder_that_is_left_goes_on_before_anything_is_given_up(
    victim: str, is_known_at_once: bool
) -> None:
    """A group on its way to an actor may be the only one left."""

    def die(here: Here) -> None:
        here.at_switch = go_on
        if is_known_at_once:
            here.lose(victim)
        else:
            threading.Timer(0.1, here.lose, [victim]).start()
        raise PeerLost("it broke", peer=victim)

    here = Here(die)
    with pytest.raises(Unavailable, match="died meanwhile"):
        here.carry_out()
    left = ("e1",) if victim == "e0" else ("e0",)
    assert [placement.holders[0] for placement in here.crew.used] == [("e0",), left]
    assert here.crew.done == ["used ('e0',)", f"used {left}", "e1 gave up [0]"]
    assert (here.coordinator.placement.holders[0], here.coordinator.is_switching) == (left, False)


def test_the_owner_dies_and_what_came_of_the_group_is_not_whole() -> None:
    """It is said to be lost, so that it comes back from a checkpoint."""

    def refuse(here: Here) -> None:
        raise StepAborted("a group has not arrived")

    def die(here: Here) -> None:
        here.at_switch = refuse
        here.lose("e0")
        raise PeerLost("it broke", peer="e0")

    here = Here(die)
    with pytest.raises(StepAborted):
        here.carry_out()
    assert (here.coordinator.placement.missing, here.coordinator.is_switching) == ((0,), False)
