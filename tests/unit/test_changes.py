"""A change of placement that fails leaves nothing behind that could meet the next one."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import PeerLost
from cluster.backend import GroupMove
from cluster.control.coordinator import Coordinator
from cluster.control.model import ModelFacts
from cluster.control.rebalancing import Proposal, Stage
from cluster.fabric import changes as edge
from cluster.fabric.changes import Changes
from cluster.fabric.guarded import Guarded
from cluster.placement.placement import ActorSlot, spread

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)


class Crew:
    """One expert actor to which a group cannot come. Answers are made when they are waited for."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.router = SimpleNamespace(adopt=SimpleNamespace(remote=lambda *args: lambda: 0.0))

    def contacts(self, placement: object) -> list[str]:
        return []

    def contact(self, name: str) -> str:
        return name

    def handle(self, name: str) -> Any:
        return SimpleNamespace(
            arrive=SimpleNamespace(remote=lambda *args: self._arrive),
            leave_off=SimpleNamespace(remote=lambda groups: lambda: self.done.append(f"{name} gave up {groups}")),
        )

    def _arrive(self) -> int:
        raise PeerLost("the owner is gone", peer="e0")


def test_groups_on_their_way_are_given_up_before_the_change_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "call", lambda who, ref, timeout_s: ref())
    placement = spread(8, 2, (ActorSlot("e0", "n0"),))
    holders = (("e1",), *placement.holders[1:])
    then = replace(placement, epoch=placement.epoch + 1, holders=holders)
    proposal = Proposal(then, (Stage((GroupMove(0, "e0", "e1", 1),), then),), 0.5, 1.0)
    crew: Any = Crew()
    changes = Changes(Guarded(Coordinator(MODEL, placement)), crew)
    with pytest.raises(PeerLost):
        changes.carry_out(proposal, time.monotonic() + 10.0)
    assert crew.done == ["e1 gave up [0]"]
