"""What a coordinator that is back makes of what the living actors say, and of its journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import InvalidInput
from actors.values import Address, Course, Placement, StepReport
from cluster.backend import Job, JobState
from cluster.config import ClusterConfig, JobConfig, ModelConfig
from cluster.control.journal import Journal
from cluster.errors import Unavailable
from cluster.fabric import comeback
from cluster.fabric.attaching import check_same
from cluster.fabric.comeback import Findings, find_survivors, on_their_way, tell_losses, weigh, worth_keeping
from cluster.fabric.crew import Survivors
from cluster.fabric.workers import ExpertContact, ExpertStanding, RouterStanding
from tests.unit.test_coordinator import MODEL
from tests.unit.test_journal import JOURNAL

NOWHERE = Address("host", "", "")
PLACEMENT = Placement(3, (("expert-0", "expert-1"), ("expert-0", "expert-1"), ("expert-1",), ("expert-1",)), 2)
JOB = Job("job-2", "b", JobConfig(steps=40), JobState.RUNNING, 0, 1.0)


def expert(name: str, groups: tuple[int, ...], version: int = 20, run: int = 2, heard_s: float = 90.0) -> Any:
    contact = ExpertContact(name, "node", 1, NOWHERE, NOWHERE)
    return name, ExpertStanding(contact, {"version": version, "run": run, "groups": list(groups)}, heard_s)


def router(version: int = 20, run: int = 2, reports: tuple[tuple[float, StepReport], ...] = ()) -> Any:
    vitals = {"version": version, "run": run}
    return "router", RouterStanding("node", 2, PLACEMENT, vitals, JOB, Course(2, 3), reports, 91.0)


def survivors(*experts: Any, has_router: bool = True, **fields: Any) -> Survivors:
    return Survivors(router(**fields) if has_router else None, {name: (name, said) for name, said in experts})


WHOLE = (expert("expert-0", (0, 1)), expert("expert-1", (0, 1, 2, 3)))


def findings(found: Survivors, journal: Journal | None = None, *, saved: bool = False) -> Findings:
    return weigh(found, journal, MODEL, 2, saved=saved)


def test_all_live() -> None:
    found = findings(survivors(*WHOLE))
    assert found.placement == PLACEMENT
    assert found.lost == {}
    assert found.since_s == 91.0
    standing = found.standing
    assert (standing.version, standing.job, standing.step) == (20, JOB, 17)
    assert (standing.has_router, standing.is_pristine, standing.can_restore) == (True, False, False)


def test_the_last_commit_may_be_on_its_way_to_an_expert_actor() -> None:
    assert findings(survivors(WHOLE[0], expert("expert-1", (0, 1, 2, 3), version=19))).lost == {}


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (None, "died while the coordinator was away"),
        (expert("expert-1", (0, 1, 2, 3), version=18), "is at version 18 of run 2, the others at 20 of 2"),
        (expert("expert-1", (0, 1, 2, 3), version=21), "is at version 21"),
        (expert("expert-1", (0, 1, 2, 3), run=3), "of run 3"),
        (expert("expert-1", (0, 1, 2)), r"does not hold expert groups \[3\]"),
    ],
)
def test_an_actor_that_cannot_hold_its_groups_is_lost(second: Any, reason: str) -> None:
    found = survivors(*([WHOLE[0], second] if second else [WHOLE[0]]))
    lost = findings(found).lost
    assert list(lost) == ["expert-1"]
    assert reason.replace("\\", "") in lost["expert-1"]


def test_the_journal_says_who_held_what_where_the_router_died_too() -> None:
    journal = replace(JOURNAL, placement=replace(PLACEMENT, epoch=9), written_s=95.0)
    found = findings(survivors(*WHOLE, has_router=False), journal, saved=True)
    assert found.placement.epoch == 9
    assert (found.standing.version, found.standing.job, found.standing.has_router) == (20, None, False)
    assert found.standing.can_restore
    assert found.since_s == 90.0


def test_without_router_and_journal_the_expert_actors_say_what_they_hold() -> None:
    found = findings(survivors(*WHOLE, has_router=False))
    assert found.placement.holders == PLACEMENT.holders
    assert found.lost == {}
    gone = findings(survivors(WHOLE[0], has_router=False))
    assert gone.placement.missing == (2, 3)


def test_a_cluster_that_has_not_trained_is_pristine() -> None:
    fresh = (expert("expert-0", (0, 1), 0, 0), expert("expert-1", (0, 1, 2, 3), 0, 0))
    assert findings(survivors(*fresh, version=0, run=0)).standing.is_pristine
    assert findings(survivors(*fresh, version=0, run=0)).standing.job is None, "steps of another run"


def test_last_steps_are_told_as_the_job_would_have_told_them() -> None:
    report = StepReport(20, 1.25, 0.5, 64, 0.125, 1, [[3, 1]])
    (told,) = findings(survivors(*WHOLE, reports=((99.0, report),))).standing.reports
    assert (told.time_s, told.seconds) == (99.0, 0.125)
    assert told.metrics["loss"] == 1.25
    assert told.metrics["retries"] == 1
    assert 0 < told.metrics["lr"] <= JOB.config.optimizer.lr


def kept(monkeypatch: pytest.MonkeyPatch, found: Survivors, wanted: int) -> tuple[list[str], list[str]]:
    """-> kept, ended."""
    ended: list[str] = []
    monkeypatch.setattr(comeback.ray, "kill", ended.append)
    return list(worth_keeping(found, findings(found), wanted).experts), sorted(ended)


def test_actors_that_hold_nothing_end_where_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = (expert("expert-2", ()), expert("expert-3", (), version=0, run=0))
    assert kept(monkeypatch, survivors(*WHOLE, *idle), 2) == (["expert-0", "expert-1"], ["expert-2", "expert-3"])
    assert kept(monkeypatch, survivors(*WHOLE, *idle), 3) == (["expert-0", "expert-1", "expert-2"], ["expert-3"])
    flawed = expert("expert-1", (), version=3)
    assert kept(monkeypatch, survivors(WHOLE[0], flawed, idle[0]), 2) == (["expert-0", "expert-2"], ["expert-1"])


class Handle:
    """An actor whose calls are carried out at once, and noted."""

    def __init__(self, name: str, calls: list[str], answer: Any) -> None:
        def called(method: str, result: Any) -> Any:
            calls.append(f"{name} {method}")
            return result

        self.standing = SimpleNamespace(remote=lambda: called("standing", answer))
        self.ping = SimpleNamespace(remote=lambda: called("ping", None))


def test_expert_actors_are_asked_after_the_step_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    silent = Unavailable("frozen")
    answers = {
        "router-0/old": None,
        "expert-10": WHOLE[1][1],
        "expert-9": WHOLE[0][1],
        "router-0/new": router()[1],
        "expert-11": None,
        "expert-12": silent,
    }
    handles = {name: Handle(name, calls, answer) for name, answer in answers.items()}
    waits = iter([True, False, False, True])
    ended: list[Any] = []

    def answered(who: str, ref: Any, timeout_s: float) -> Any:
        if ref is silent:
            raise ref
        return ref

    monkeypatch.setattr(comeback, "_handles", lambda cluster: handles)
    monkeypatch.setattr(comeback, "call", answered)
    monkeypatch.setattr(comeback.ray, "wait", lambda refs, timeout: (refs if next(waits) else [], []))
    monkeypatch.setattr(comeback.ray, "kill", ended.append)
    found = find_survivors("abc", None)
    assert found.router == (handles["router-0/new"], router()[1])
    assert list(found.experts) == ["expert-9", "expert-10"]
    assert ended == [handles["router-0/old"], handles["expert-11"], handles["expert-12"]]
    asked = [call for call in calls if call.endswith("standing")]
    assert asked[:2] == ["router-0/old standing", "router-0/new standing"]
    assert calls.index("expert-9 standing") > max(i for i, call in enumerate(calls) if call.endswith("ping"))
    assert calls.count("expert-9 ping") == 2, "so that nobody takes the coordinator for gone"


def test_groups_on_their_way_are_those_that_an_actor_does_not_hold() -> None:
    assert on_their_way(survivors(*WHOLE), PLACEMENT) == {"expert-0": [2, 3], "expert-1": []}


class Told:
    def __init__(self) -> None:
        self.lost: list[str] = []

    def actor_lost(self, name: str, now: float, reason: str) -> None:
        self.lost.append(name)

    def actor_seen(self, status: Any, now: float) -> None: ...


def test_the_coordinator_is_told_who_is_gone() -> None:
    told = Told()
    tell_losses(told, findings(survivors(WHOLE[1], has_router=False), JOURNAL), 100.0)  # type: ignore[arg-type]
    assert told.lost == ["expert-0", "router-0"]


# A front that joins a cluster.

CONFIG = ClusterConfig(ModelConfig(values={"model_type": "mixtral", "hidden_size": 8}))


def with_values(**sections: Mapping[str, Any]) -> ClusterConfig:
    return replace(CONFIG, **{name: replace(getattr(CONFIG, name), **values) for name, values in sections.items()})


def test_a_front_may_be_anywhere() -> None:
    check_same(CONFIG, with_values(front={"port": 7}, ray={"address": "there", "start_timeout_s": 9.0}))


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (with_values(experts={"actors": 5}), r"experts\.actors: .* has 2 .*got 5"),
        (with_values(model={"values": {"model_type": "mixtral", "hidden_size": 9}}), r"model\.values\.hidden_size"),
        (with_values(model={"values": {**CONFIG.model.values, "more": 1}}), r"model\.values\.more: .* has None"),
    ],
)
def test_any_other_difference_is_named(wanted: ClusterConfig, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        check_same(CONFIG, wanted)
