"""An import: who dies in the middle, and what becomes of weights of which some are new."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from actors.errors import InvalidInput, PeerLost
from actors.values import Placement
from cluster.control.coordinator import Coordinator
from cluster.errors import Unavailable
from cluster.fabric import importing
from cluster.fabric.guarded import Guarded
from cluster.fabric.importing import Imports
from tests.unit.test_coordinator import MODEL

PLACEMENT = Placement(3, (("expert-0", "expert-1"), ("expert-0", "expert-1"), ("expert-1",), ("expert-1",)), 2)
DIRECTORY = Path("/models/other")
DEATH = Unavailable("the router is not there")
DEATH.__cause__ = RayActorError()
LOST = PeerLost("its process died", peer="expert-0")


class Stage:
    """What an import does, in order; `answers`: what becomes of each try to replace the weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: list[object], is_mixed: object = False) -> None:
        self.told: list[object] = []
        self.coordinator = Coordinator(MODEL, PLACEMENT)
        self.state = Guarded(self.coordinator)
        self.after_try = lambda: None
        self._answers = answers
        monkeypatch.setattr(importing, "call", self._call)
        monkeypatch.setattr(importing, "RETRY_S", 0.01)
        router = {
            "check_same_architecture": SimpleNamespace(remote=lambda path: "checked"),
            "replace_weights": SimpleNamespace(remote=lambda path: answers.pop(0)),
            "is_between_models": SimpleNamespace(remote=lambda: is_mixed),
        }
        parts: Any = {
            "crew": SimpleNamespace(leader="router-0", router=SimpleNamespace(**router)),
            "routers": SimpleNamespace(after=lambda leader, error: self.told.append(f"another leads after {leader}")),
            "checkpoints": SimpleNamespace(after_change=lambda: self.told.append("saved")),
            "snapshots": SimpleNamespace(forget=lambda: self.told.append("forgotten")),
            "keeper": SimpleNamespace(write_now=self._written),
        }
        self.imports = Imports(self.state, **parts)

    def _written(self) -> None:
        self.told.append((self.coordinator.health.is_pristine, self.coordinator.importing))

    def _call(self, who: str, ref: Any, timeout_s: float) -> Any:
        if isinstance(ref, Exception):
            raise ref
        if not isinstance(ref, bool):
            self.told.append(ref)
        self.after_try()
        return ref


@pytest.mark.parametrize("dies", ["nobody", "leader", "expert actor", "last copy"])
def test_it_is_written_down_before_the_first_weight_is_touched(monkeypatch: pytest.MonkeyPatch, dies: str) -> None:
    """A coordinator that dies after it is not to be followed by one that takes the weights for the model's own, nor is
    anybody else's death in the middle to leave half of them."""
    tries: dict[str, list[object]] = {
        "nobody": ["replaced"],
        "leader": [DEATH, "replaced"],
        "expert actor": [LOST, "replaced"],
        "last copy": ["replaced", "replaced"],
    }
    stage = Stage(monkeypatch, answers := tries[dies])

    def back() -> None:
        with stage.state.changing() as coordinator:
            coordinator.is_returning = False

    def returning() -> None:
        if len(answers) == 1 and stage.told[-1] == "replaced":
            stage.coordinator.is_returning = True  # what was loaded is what comes from a checkpoint now
            threading.Timer(0.1, back).start()

    if dies == "last copy":
        stage.after_try = returning
    stage.imports.replace_weights(DIRECTORY, 10.0)
    again = {"leader": ["another leads after router-0"], "last copy": ["replaced"]}.get(dies, [])
    written = (False, str(DIRECTORY))
    assert stage.told == ["checked", written, "forgotten", *again, "replaced", (False, ""), "saved"]
    assert stage.coordinator.placement == PLACEMENT


@pytest.mark.parametrize("is_mixed", [True, DEATH], ids=["said", "nobody can tell"])
@pytest.mark.parametrize("can_restore", [True, False])
def test_one_that_is_cut_off_leaves_weights_of_two_models(
    monkeypatch: pytest.MonkeyPatch, is_mixed: object, can_restore: bool
) -> None:
    """They come back from the last checkpoint, or another import is waited for."""
    stage = Stage(monkeypatch, [LOST] * 1000, is_mixed)
    coordinator = stage.coordinator
    coordinator.health.can_restore = can_restore
    with pytest.raises(PeerLost):
        stage.imports.replace_weights(DIRECTORY, 0.2)
    assert coordinator.health.mixed == f"the import of {DIRECTORY} was cut off"
    assert coordinator.importing == str(DIRECTORY), "the next coordinator is to know"
    assert coordinator.health.can_return == can_restore
    assert coordinator.placement == PLACEMENT
    assert not coordinator.status().ready
    assert "saved" not in stage.told


def test_another_import_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [InvalidInput("is gone", field="path"), "replaced"], is_mixed=True)
    with pytest.raises(InvalidInput):
        stage.imports.replace_weights(DIRECTORY, 10.0)
    stage.imports.replace_weights(Path("/models/third"), 10.0)
    assert (stage.coordinator.importing, stage.coordinator.health.mixed) == ("", "")
    assert stage.told[-2:] == [(False, ""), "saved"]


def test_what_fails_before_a_weight_is_touched_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [InvalidInput("is not readable", field="model.path")])
    stage.coordinator.health.can_restore = True
    with pytest.raises(InvalidInput):
        stage.imports.replace_weights(DIRECTORY, 10.0)
    assert stage.coordinator.placement == PLACEMENT
    assert stage.coordinator.health.mixed == ""
    assert stage.told[-2:] == [(False, ""), "saved"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_next_coordinator_goes_on_with_it(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    answer = InvalidInput("is gone", field="path") if fails else "replaced"
    stage = Stage(monkeypatch, [DEATH, answer], is_mixed=fails)
    stage.coordinator.importing, stage.coordinator.health.is_pristine = str(DIRECTORY), False
    before = set(threading.enumerate())
    stage.imports.go_on(str(DIRECTORY))
    for thread in set(threading.enumerate()) - before:
        thread.join(20.0)
        assert not thread.is_alive()
    again = "another leads after router-0"
    assert stage.told == ([again] if fails else [again, "replaced", (False, ""), "saved"])
    assert bool(stage.coordinator.health.mixed) == fails
