"""A change of placement: what deaths meanwhile leave of it, and that nothing is left behind to meet the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors.errors import LinkTimeout, PeerLost, StepAborted
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
        self.held: dict[str, list[int]] = {}
        self.takes: Callable[[Placement], Placement] = lambda placement: placement
        self.used: list[Placement] = []
        self._arrive, self._adopt = arrive, adopt
        self.leader = "router-0"
        self._router = SimpleNamespace(
            adopt=SimpleNamespace(remote=self._asked), in_use=SimpleNamespace(remote=lambda: lambda: self.used[-1])
        )

    @property
    def router(self) -> Any:
        if not self.leader:
            raise Unavailable("no router leads")
        return self._router

    def routers(self) -> list[str]:
        return ["router-0", "router-1"]

    def contacts(self, placement: object) -> list[str]:
        return []

    def contact(self, name: str) -> str:
        return name

    def experts(self) -> list[tuple[Any, Any]]:
        def vitals(name: str) -> Any:
            return SimpleNamespace(vitals=SimpleNamespace(remote=lambda: lambda: {"groups": self.held[name]}))

        return [(SimpleNamespace(name=name), vitals(name)) for name in self.held]

    def pid_of(self, name: str) -> int:
        return 1

    def end(self, names: list[str]) -> None: ...

    def handle(self, name: str) -> Any:
        return SimpleNamespace(
            arrive=SimpleNamespace(remote=lambda *args: partial(self._arrive)),
            leave_off=SimpleNamespace(remote=lambda groups: lambda: self.done.append(f"{name} gave up {groups}")),
        )

    def _asked(self, placement: Placement, contacts: object) -> Callable[[], tuple[Placement, float]]:
        def adopt() -> tuple[Placement, float]:
            seconds = self._adopt(placement)
            self.used.append(placement)
            self.done.append(f"used {placement.holders[0]}")
            return self.takes(placement), seconds

        return adopt


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "call", lambda who, ref, timeout_s: ref())
    monkeypatch.setattr(edge, "ended", lambda refs, timeout_s: refs)
    monkeypatch.setattr(edge, "NOTICED_S", 0.5)


BEFORE = Placement(1, (("e0",), *(("e2",),) * 3), 2)
AFTER = replace(BEFORE, epoch=BEFORE.epoch + 1, holders=(("e0", "e1"), *BEFORE.holders[1:]))
COPY = Proposal(AFTER, (Stage((GroupMove(0, "e0", "e1", 1),), AFTER),), 0.5, 1.0)


class Here:
    """Group 0 is copied from e0 to e1. `at_switch` is called when the router is told, and may raise."""

    def __init__(
        self, at_switch: Callable[[Here], None], arrive: Callable[[], int] = lambda: 1, before: Placement = BEFORE
    ) -> None:
        self.coordinator = Coordinator(MODEL, before)
        self.at_switch = at_switch
        crew: Any = Crew(arrive, self._adopt)
        self.crew: Crew = crew
        self.state = Guarded(self.coordinator)
        self.changes = Changes(self.state, crew)

    def carry_out(self, change: Proposal = COPY, *, time_s: float = 10.0) -> float:
        return self.changes.carry_out(change, time.monotonic() + time_s)

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
    assert (here.coordinator.placement, here.coordinator.is_unsettled) == (AFTER, False)


def test_the_router_does_not_switch_and_nobody_died() -> None:
    def refuse(here: Here) -> None:
        raise StepAborted("a group has not arrived")

    here = Here(refuse)
    with pytest.raises(StepAborted):
        here.carry_out()
    assert here.coordinator.placement == replace(BEFORE, epoch=AFTER.epoch + 1)
    assert (here.coordinator.is_unsettled, here.crew.done[1:]) == (False, ["e1 gave up [0]"])


@pytest.mark.parametrize("is_known_at_once", [True, False])
@pytest.mark.parametrize("victim", ["e0", "e1"])
def test_after_a_death_the_holder_that_is_left_goes_on(
    victim: str, is_known_at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has come to an actor may be the only copy left."""
    monkeypatch.setattr(edge, "NOTICED_S", 10.0)

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
    given_up = [] if victim == "e0" else ["e1 gave up [0]"]
    assert here.crew.done == ["used ('e0',)", f"used {left}", *given_up]
    assert (here.coordinator.placement.holders[0], here.coordinator.is_unsettled) == (left, False)


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
    assert (here.coordinator.placement.missing, here.coordinator.is_unsettled) == ((0,), False)


def test_the_owner_dies_when_some_groups_have_come_and_others_have_not() -> None:
    before = Placement(1, (("e0",), ("e0", "e2"), ("e2",), ("e2",)), 2)
    after = Placement(2, (("e0", "e1"), ("e0", "e1"), ("e2",), ("e2",)), 2)
    copies = (GroupMove(0, "e0", "e1", 1), GroupMove(1, "e0", "e1", 1))
    change = Proposal(after, (Stage(copies, after),), 0.5, 1.0)

    def arrive() -> int:
        come.append(1)
        if len(come) == 2:
            here.lose("e0")
            raise PeerLost("it broke", peer="e0")
        return 1

    come: list[int] = []
    here = Here(go_on, arrive, before)
    with pytest.raises(PeerLost):
        here.carry_out(change)
    assert here.coordinator.placement == Placement(2, (("e1",), ("e2",), ("e2",), ("e2",)), 2)
    assert here.crew.used == [before, here.coordinator.placement]
    assert here.crew.done[2:] == ["e1 gave up [1]"], "group 0 is in use"


def test_another_router_leads_and_is_told() -> None:
    """Who led may have died before or after it took the new placement over."""

    def die(here: Here) -> None:
        here.at_switch = go_on
        here.crew.leader = ""
        threading.Timer(0.1, setattr, [here.crew, "leader", "router-1"]).start()
        raise Unavailable("router-0 is not there") from ActorDiedError()

    here = Here(die)
    assert here.carry_out() == 0.25
    assert (here.coordinator.placement, here.coordinator.is_unsettled) == (AFTER, False)


@pytest.mark.parametrize(("held_by_e1", "then"), [([0], AFTER.holders), ([], BEFORE.holders)])
def test_nobody_leads_any_more(held_by_e1: list[int], then: object) -> None:
    """What the actors hold tells whether the switch was over."""

    def die(here: Here) -> None:
        here.crew.leader, here.crew.routers = "", list  # type: ignore[method-assign]
        raise Unavailable("router-0 is not there") from ActorDiedError()

    here = Here(die)
    here.crew.held = {"e0": [0], "e1": held_by_e1, "e2": [1, 2, 3]}
    with pytest.raises(Unavailable):
        here.carry_out()
    assert (here.coordinator.placement.holders, here.coordinator.is_unsettled) == (then, False)


def test_an_error_after_the_switch_does_not_take_it_back() -> None:
    def fail(here: Here) -> None:
        here.crew.used.append(AFTER)
        raise StepAborted("of what came behind it")

    here = Here(fail)
    with pytest.raises(StepAborted):
        here.carry_out()
    assert (here.coordinator.placement, here.coordinator.is_unsettled) == (AFTER, False)
    assert here.crew.done[1:] == [], "what is in use is not given up"


def test_who_asks_says_what_is_in_use() -> None:
    """The router has switched, and asks for a placement without the dead before its answer is known here."""

    def ask(here: Here) -> None:
        here.at_switch = go_on
        placement, _ = here.changes.without(["e0"], AFTER)
        assert placement.holders[0] == ("e1",), "of what it uses, not of what was there"

    here = Here(ask)
    with pytest.raises(Unavailable, match="died meanwhile"):
        here.carry_out()
    assert here.coordinator.placement.holders[0] == ("e1",)


def test_copies_that_come_too_late_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Here(go_on, lambda: time.sleep(0.2) or 1)  # type: ignore[func-returns-value]
    with pytest.raises(LinkTimeout, match="no time was left"):
        here.carry_out(time_s=0.1)
    assert (here.coordinator.placement, here.crew.used) == (BEFORE, [BEFORE])


def test_an_answer_that_a_death_has_overtaken_does_not_count() -> None:
    """Who leads may have been told of that death too: it is asked again, and says then what it uses."""

    def die(here: Here) -> None:
        here.at_switch = go_on
        here.lose("e2")

    before = replace(BEFORE, holders=(("e0",), *(("e2", "e0"),) * 3))
    after = replace(AFTER, holders=(("e0", "e1"), *before.holders[1:]))
    here = Here(die, before=before)
    with pytest.raises(Unavailable, match="died meanwhile"):
        here.carry_out(Proposal(after, (Stage((GroupMove(0, "e0", "e1", 1),), after),), 0.5, 1.0))
    assert here.crew.used[1:] == [after, here.coordinator.placement]
    assert here.coordinator.placement.holders == (("e0",),) * 4


def test_a_death_ends_the_wait_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a lost node nothing is heard: what was to come from there would be awaited for an hour."""
    looks: list[int] = []

    def nothing_yet(refs: list[Any], timeout_s: float) -> list[Any]:
        looks.append(len(refs))
        here.lose("e2")
        return []

    monkeypatch.setattr(edge, "ended", nothing_yet)
    before = replace(BEFORE, holders=(("e0",), *(("e2", "e0"),) * 3))
    after = replace(AFTER, holders=(("e0", "e1"), *before.holders[1:]))
    here = Here(go_on, before=before)
    with pytest.raises(Unavailable, match="died meanwhile"):
        here.carry_out(Proposal(after, (Stage((GroupMove(0, "e0", "e1", 1),), after),), 0.5, 1.0))
    assert looks == [1]
    assert here.crew.used == [before, here.coordinator.placement]


@pytest.mark.parametrize("used", [-1, 7])
def test_a_router_that_takes_another_placement_is_asked_once(used: int) -> None:
    """The change ends, whatever that placement is."""
    here = Here(go_on)
    here.crew.takes = lambda placement: placement if placement == BEFORE else replace(placement, epoch=used)
    with pytest.raises(StepAborted, match=f"uses placement {used} "):
        here.carry_out()
    assert len(here.crew.used) == 2
    assert not here.coordinator.is_unsettled
