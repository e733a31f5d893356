"""An actor may be buried while its first word is on its way through the coordinator's loop: status never shows it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.backend import ActorStatus
from cluster.config import ClusterConfig, ModelConfig
from cluster.control.coordinator import Coordinator
from cluster.control.model import ModelFacts
from cluster.fabric import crew as crew_module
from cluster.fabric.changes import Changes
from cluster.fabric.control import ControlWorker
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.lookout import Signs
from cluster.fabric.scaling import Scaling
from cluster.placement.placement import ActorSlot, spread

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)
CONFIG = ClusterConfig(ModelConfig(values={"model_type": "mixtral", "hidden_size": 8}))
PID = 17
HANDLE: Any = SimpleNamespace(wait_until_death=SimpleNamespace(remote=lambda: "death"))


class Stage:
    """A coordinator's worker without Ray. The expert actor e1 was loaded a moment ago, and nobody has seen it yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(crew_module.ray, "kill", lambda handle: None)
        monkeypatch.setattr(crew_module.ray, "wait", lambda refs, num_returns, timeout: ([], refs))
        self.coordinator = Coordinator(MODEL, spread(8, 2, (ActorSlot("e0", "n0"),)))
        state = Guarded(self.coordinator)
        self.crew: Any = Crew(CONFIG, "abc")
        self.crew._handles["e1"] = HANDLE
        self.crew._experts["e1"] = SimpleNamespace(name="e1", pid=PID, node_id="n1")
        self.crew._lookout.watch("e1", HANDLE)
        self.changes = Changes(state, self.crew)
        self.scaling = Scaling(state, self.crew, self.changes, CONFIG.experts, 2)
        self.desk: Any = SimpleNamespace(state=state, changes=self.changes)
        self.worker = ControlWorker.__new__(ControlWorker)
        self.worker._crew = self.crew

    def look(self, meanwhile: Any) -> None:
        """`meanwhile`: what another thread does between the answer of e1 and its entry into the table."""

        def seen() -> Signs:
            meanwhile()
            status = ActorStatus("e1", "expert", "n1", PID, "ready", device="cpu", version=0)
            return Signs(seen=[status])

        self.crew.look = seen
        self.worker._look(self.desk)


def test_of_one_whose_links_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    stage.look(lambda: stage.changes.bury("e1", "its links broke"))
    assert stage.coordinator.status().actors == stage.coordinator.actors() == ()
    stage.changes.bury("e1", "its links broke")
    assert [entry.kind for entry in stage.coordinator.ledger.entries(0)] == ["actor_death"], "it died once"


def test_of_one_that_was_ended_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    stage.look(lambda: stage.scaling._end(["e1"]))
    assert stage.coordinator.status().actors == stage.coordinator.actors() == ()
