"""What an operation says of a growth whose leader died, and what the coordinator makes of it. Actors are simulated; no
Ray starts."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from actors.errors import InvalidInput, PeerLost
from actors.values import Grown, Growth, Placement, Promotion
from cluster.backend import ActorStatus, Operation, OperationState
from cluster.config import RouterConfig
from cluster.control.coordinator import Coordinator
from cluster.control.model import ModelFacts
from cluster.errors import Unavailable
from cluster.fabric import changes as changes_module
from cluster.fabric import growing as module
from cluster.fabric import routers as routers_module
from cluster.fabric.changes import Changes
from cluster.fabric.growing import Growing
from cluster.fabric.guarded import Guarded
from cluster.fabric.routers import Routers

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)
PLACEMENT = Placement(3, (("e0",),) * 4, 2)
GROWN = replace(PLACEMENT, epoch=4, holders=PLACEMENT.holders * 2)
WAIT_S = 20.0


def death() -> Unavailable:
    error = Unavailable("the router is not there")
    error.__cause__ = RayActorError()
    return error


class Crew:
    """Routers whose remote calls give functions, which `call` calls. `dies`: leaders end at a growth, before or after
    all have grown, or (`unheard`) live on and only their answer is lost, or (`unasked`) the question."""

    def __init__(self, *dies: str) -> None:
        self.names = [f"r{number}" for number in range(len(dies) + 1)]
        self.leader, self.num_experts = "r0", 0
        self.placement = PLACEMENT
        self.dies = list(dies)
        self.asked: list[str] = []
        self.saved = 0
        self.unreachable = 0
        """Questions after the growth that are lost as well."""

    @property
    def router(self) -> Any:
        if not self.leader:
            raise Unavailable("no router leads at the moment; try again")
        return self._handle(self.leader)

    def _handle(self, name: str) -> Any:
        return SimpleNamespace(
            prepare_growth=SimpleNamespace(remote=lambda growth: lambda: None),
            adopt=SimpleNamespace(remote=lambda placement, contacts: lambda: (placement, 0.0)),
            grow=SimpleNamespace(remote=lambda growth: lambda: self._grow(name)),
            standing=SimpleNamespace(remote=lambda: self._standing),
            facts=SimpleNamespace(remote=lambda num_experts: lambda: replace(MODEL, num_parameters=100 * num_experts)),
            promote=SimpleNamespace(remote=lambda others, term: lambda: Promotion(7, None, self.placement, 1600)),
        )

    def _grow(self, name: str) -> Grown:
        self.asked.append(name)
        if self.placement is GROWN:
            raise InvalidInput("the model has 16 experts a layer, and experts are only added", field="num_experts")
        when = self.dies.pop(0) if self.dies else ""
        if when not in ("before", "unasked"):
            self.placement = GROWN
        if when in ("unheard", "unasked"):
            raise death()
        if when:
            self.names.remove(name)
            self.leader = ""
            raise death()
        return Grown(GROWN, 1600, "split", 0.25, 0.0)

    def _standing(self) -> Any:
        if self.unreachable > 0:
            self.unreachable -= 1
            raise death()
        return SimpleNamespace(placement=self.placement)

    def routers(self) -> dict[str, Any]:
        return {name: (name, self._handle(name)) for name in self.names}

    def lead(self, name: str) -> None:
        self.leader = name

    def contacts(self, placement: Placement) -> list[str]:
        return []

    def owe(self) -> None: ...

    def after_change(self) -> None:
        self.saved += 1


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for edge in (changes_module, module, routers_module):
        monkeypatch.setattr(edge, "call", lambda who, ref, timeout_s: ref())
    monkeypatch.setattr(module, "AGAIN_S", 0.01)


def grown(crew: Any) -> tuple[Operation, Coordinator]:
    """Beside the coordinator's loop."""
    coordinator = Coordinator(MODEL, PLACEMENT)
    for name, role in (("r0", "router"), ("e0", "expert")):
        status = ActorStatus(name, role, "n0", 1, "ready", device="cpu", version=0)
        coordinator.actor_seen(status, 0.0)
    state = Guarded(coordinator)
    changes = Changes(state, crew)
    routers = Routers(state, crew, changes, None, RouterConfig(actors=3, max_actors=3), len(crew.names))
    routers._heal_at_s = math.inf  # nobody starts others
    operation = Growing(state, crew, changes, crew, routers).grow(Growth(16), "mine")
    deadline = time.monotonic() + WAIT_S
    while changes.is_under_way:
        assert time.monotonic() < deadline
        routers.look()
        time.sleep(0.005)
    return coordinator.operations.get(operation.id), coordinator


def test_all_have_grown_when_the_leader_dies_before_it_has_said_so() -> None:
    crew = Crew("after")
    operation, coordinator = grown(crew)
    assert (operation.state, operation.error) == (OperationState.SUCCEEDED, "")
    assert "gone before it could say more" in operation.message
    status = coordinator.status()
    assert (status.num_experts, status.num_parameters, len(status.owners)) == (16, 1600, 8)
    assert crew.num_experts == 16, "routers and expert actors that start now are of this model"
    assert (crew.asked, crew.saved) == (["r0"], 1)


@pytest.mark.parametrize("then", ["", "after"])
def test_nobody_had_grown_and_the_next_leader_does_it(then: str) -> None:
    crew = Crew("before", *([then] if then else []))
    operation, coordinator = grown(crew)
    assert operation.state == OperationState.SUCCEEDED
    assert crew.asked == ["r0", "r1"]
    assert coordinator.status().num_experts == crew.num_experts == 16


@pytest.mark.parametrize("unreachable", [0, 2])
@pytest.mark.parametrize("lost", ["unheard", "unasked"])
def test_a_leader_that_lives_is_asked_what_came_of_it(
    monkeypatch: pytest.MonkeyPatch, lost: str, unreachable: int
) -> None:
    """Ray could not reach it for a moment: it has grown, and would refuse to do it again, or has never heard of it."""
    monkeypatch.setattr(routers_module, "NOTICED_S", 0.05)
    crew = Crew(lost)
    crew.unreachable = unreachable
    operation, coordinator = grown(crew)
    assert (operation.state, operation.error) == (OperationState.SUCCEEDED, "")
    assert crew.asked == (["r0"] if lost == "unheard" else ["r0", "r0"])
    assert coordinator.status().num_experts == crew.num_experts == 16
    assert coordinator.status().num_parameters == 1600
    assert crew.leader == "r0"


def test_without_an_heir_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    crew = Crew("before")
    crew.names = ["r0"]
    operation, coordinator = grown(crew)
    assert operation.state == OperationState.FAILED
    assert coordinator.status().num_experts == 8


def test_what_an_expert_actors_death_undid_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    crew: Any = Crew()
    errors = [PeerLost("gone", peer="e0")]
    grow = crew._grow
    crew._grow = lambda name: grow(name) if not errors else (_ for _ in ()).throw(errors.pop())
    operation, coordinator = grown(crew)
    assert operation.state == OperationState.SUCCEEDED
    assert operation.message == "split: 25.00% of the tried gate weight went to other experts"
    assert coordinator.status().num_experts == 16
