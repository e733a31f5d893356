"""While Ray's head is away nothing of the coordinator's loop waits for it. The crew is simulated; no Ray starts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.backend import ActorStatus
from cluster.config import ExpertsConfig
from cluster.control.coordinator import Coordinator
from cluster.control.model import ModelFacts
from cluster.fabric import loops
from cluster.fabric.changes import Changes
from cluster.fabric.guarded import Guarded
from cluster.fabric.scaling import ROOM_LOOK_S, Scaling
from cluster.placement.placement import ActorSlot, spread

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)
WAIT_S = 20.0


class Crew:
    """Two expert actors on one node. Whoever asks for room waits until the head is `back`."""

    def __init__(self) -> None:
        self.leaving: dict[str, str] = {}
        self.back = threading.Event()
        self.num_asked = 0
        self.rooms: list[set[str] | Exception] = []
        """What is answered; the last one from then on."""

    def experts(self) -> list[Any]:
        return [(SimpleNamespace(name=name), None) for name in ("e0", "e1")]

    def occupied_nodes(self) -> set[str]:
        return {"n0"}

    def may_have_room(self) -> bool:
        return True

    def open_nodes(self) -> set[str]:
        self.num_asked += 1
        assert self.back.wait(WAIT_S)
        room = self.rooms.pop(0) if len(self.rooms) > 1 else self.rooms[0]
        if isinstance(room, Exception):
            raise room
        return room


class Stage:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, redundancy: int) -> None:
        """As many copies as `redundancy` says; two nodes are to carry them. Answers grow old with each look, however
        long it takes."""
        self.now_s = 0.0
        monkeypatch.setattr(loops, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        slots = ActorSlot("e0", "n0"), ActorSlot("e1", "n1")
        coordinator = Coordinator(MODEL, spread(8, 2, slots, redundancy=redundancy), redundancy=2)
        for name, node in (("e0", "n0"), ("e1", "n1")):
            coordinator.actor_seen(ActorStatus(name, "expert", node, 1, "ready", device="cpu", version=0), 0.0)
        coordinator.actor_seen(ActorStatus("r0", "router", "n0", 1, "ready", device="cpu", version=0), 0.0)
        self.crew = Crew()
        crew: Any = self.crew
        state = Guarded(coordinator)
        self.scaling = Scaling(state, crew, Changes(state, crew), ExpertsConfig(redundancy=2), 2)
        self.healed = threading.Event()
        monkeypatch.setattr(self.scaling, "_resize", lambda wanted, report: self.healed.set())

    def looks(self, is_enough: Any) -> None:
        """As the loop does, until it is enough."""
        deadline = time.monotonic() + WAIT_S
        while not is_enough():
            assert time.monotonic() < deadline
            self.now_s += ROOM_LOOK_S / 16
            begun = time.monotonic()
            self.scaling.heal()
            assert time.monotonic() - begun < WAIT_S / 2, "all else of the loop has waited with it"
            time.sleep(0.005)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """All copies are there, but on too few nodes."""
    stage = Stage(monkeypatch, 2)
    yield stage
    stage.crew.back.set()


def test_the_loop_does_not_wait_for_room(whole: Stage) -> None:
    whole.crew.rooms = [{"n2"}]
    whole.looks(lambda: whole.crew.num_asked)
    for _ in range(20):
        whole.scaling.heal()
    assert (whole.crew.num_asked, whole.healed.is_set()) == (1, False), "one asks, and it is not healed without room"
    whole.crew.back.set()
    whole.looks(whole.healed.is_set)


def test_room_is_looked_for_again_where_there_was_none_or_no_answer(whole: Stage) -> None:
    whole.crew.back.set()
    whole.crew.rooms = [set(), RuntimeError("the head is away"), set(), {"n2"}]
    whole.looks(whole.healed.is_set)
    assert whole.crew.num_asked == 4


def test_missing_copies_do_not_wait_for_it_either(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, 1)
    stage.crew.rooms = [set()]
    try:
        stage.looks(stage.healed.is_set)
    finally:
        stage.crew.back.set()
