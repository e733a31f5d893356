"""A node that joined a moment ago is emptied, and stays empty, though the last look at Ray's nodes does not know it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.backend import OperationState
from cluster.control.coordinator import Coordinator
from cluster.control.model import ModelFacts
from cluster.fabric import draining as module
from cluster.fabric.changes import Changes
from cluster.fabric.draining import Draining
from cluster.fabric.guarded import Guarded
from cluster.fabric.notices import News
from cluster.placement.placement import ActorSlot, spread

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)
OLD = {"aa": "head", "bb": "node-1"}
NEW = {**OLD, "cc": "node-2"}
WAIT_S = 20.0


class Crew:
    """None of whose actors is on the new node."""

    leaving: dict[str, str]

    def on_node(self, node_id: str) -> list[str]:
        return []

    def router_nodes(self) -> set[str]:
        return {"aa"}


def test_a_node_that_has_just_joined_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    notices = SimpleNamespace(latest=News({}, OLD, time.time()))
    monkeypatch.setattr(module, "Notices", lambda: notices)
    monkeypatch.setattr(module, "node_names", lambda: NEW)
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "aa"))
    state, crew = Guarded(Coordinator(MODEL, spread(8, 2, (ActorSlot("e0", "bb"),)))), Crew()
    any_crew: Any = crew
    scaling: Any = None
    draining = Draining(state, any_crew, Changes(state, any_crew), scaling, {})
    operation = draining.drain("node-2", WAIT_S, "mine")
    draining.look()
    assert crew.leaving == {"cc": "node-2"}
    assert state.wait_for(lambda c: c.operations.get(operation.id).state == OperationState.SUCCEEDED, WAIT_S)
    draining.look()
    assert crew.leaving == {"cc": "node-2"}, "nobody starts an actor there"
    assert draining.leaving_if_cut_off == {"cc": "node-2"}
    notices.latest = News({}, NEW, time.time())
    draining.look()
    assert crew.leaving == {"cc": "node-2"}
    notices.latest = News({}, OLD, time.time() + 1.0)
    draining.look()
    assert crew.leaving == draining.leaving_if_cut_off == {}, "it is gone"
