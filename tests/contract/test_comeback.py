"""What a coordinator that is back makes of what the living actors say, and of its journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import InvalidInput, StepAborted
from actors.values import Address, Course, Placement, StepReport
from cluster.backend import Job, JobState
from cluster.config import ClusterConfig, JobConfig, ModelConfig
from cluster.control.journal import Journal, Process
from cluster.errors import Unavailable
from cluster.fabric import comeback
from cluster.fabric import crew as crew_module
from cluster.fabric.attaching import check_same
from cluster.fabric.comeback import find_survivors, link_keys_of
from cluster.fabric.contacts import ExpertContact, RouterContact
from cluster.fabric.crew import Crew, Survivors
from cluster.fabric.findings import Findings, on_their_way, tell_losses, weigh, worth_keeping
from cluster.fabric.standing import ExpertStanding, Following, RouterStanding
from tests.unit.test_coordinator import MODEL
from tests.unit.test_journal import JOURNAL

NOWHERE = Address("host", "", "")
PLACEMENT = Placement(3, (("expert-0", "expert-1"), ("expert-0", "expert-1"), ("expert-1",), ("expert-1",)), 2)
JOB = Job("job-2", "b", JobConfig(steps=40), JobState.RUNNING, 0, 1.0)
CONFIG = ClusterConfig(ModelConfig(values={"model_type": "mixtral", "hidden_size": 8}))
FOLLOWING = Following(JOB, Course(2, 3))


def expert(name: str, groups: tuple[int, ...], version: int = 20, run: int = 2, heard_s: float = 90.0) -> Any:
    contact = ExpertContact(name, "node", 1, NOWHERE, NOWHERE)
    return name, ExpertStanding(contact, {"version": version, "run": run, "groups": list(groups)}, heard_s)


def router(
    name: str = "router-0", version: int = 20, run: int = 2, following: Following = FOLLOWING, **fields: Any
) -> RouterStanding:
    """One that leads, and that nobody follows."""
    contact = RouterContact(name, "node", 20 + int(name[-1]), NOWHERE)
    vitals = {"version": version, "run": run, "left_out": []}
    standing = RouterStanding(contact, True, 0, (), PLACEMENT, vitals, following, (), 91.0)
    return replace(standing, **fields)


def survivors(*experts: Any, has_router: bool = True, **fields: Any) -> Survivors:
    routers = {"router-0": ("router-0", router(**fields))} if has_router else {}
    return Survivors(routers, "router-0" if has_router else "", {name: (name, said) for name, said in experts})


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


@pytest.mark.parametrize("is_pristine", [True, False])
def test_what_was_imported_or_has_grown_is_not_pristine(is_pristine: bool) -> None:
    fresh = (expert("expert-0", (0, 1), 0, 0), expert("expert-1", (0, 1, 2, 3), 0, 0))
    journal = replace(JOURNAL, is_pristine=is_pristine, model=MODEL)
    found = survivors(*fresh, version=0, run=0)
    assert findings(found, journal).standing.is_pristine == is_pristine
    grown = replace(PLACEMENT, holders=(*PLACEMENT.holders, ("expert-1",)))
    assert not findings(survivors(*fresh, version=0, run=0, placement=grown), journal).standing.is_pristine


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


class Stage:
    """Actors whose calls are carried out at once, and noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
        """What each says of itself: a value, or one after the other; an error where it does not answer."""
        self.calls: list[str] = []
        self.ended: list[str] = []
        self.fenced: list[int] = []
        self.answers = answers
        self.handles = {name.replace("_", "-"): self._handle(name) for name in answers}
        self.waits = iter([False, False])
        """Whether the answers are there; later ones are."""
        monkeypatch.setattr(comeback, "_handles", lambda cluster: self.handles)
        monkeypatch.setattr(comeback, "call", self._call)
        monkeypatch.setattr(comeback.ray, "wait", self._wait)
        monkeypatch.setattr(comeback.ray, "kill", lambda handle: self.ended.append(handle.name))
        monkeypatch.setattr(comeback, "end_process", lambda node_id, pid: self.fenced.append(pid))

    def _handle(self, key: str) -> Any:
        name = key.replace("_", "-")

        def noted(method: str, answer: Any) -> Any:
            self.calls.append(f"{name} {method}")
            return answer

        def standing() -> Any:
            said = self.answers[key]
            return noted("standing", said.pop(0) if isinstance(said, list) and len(said) > 1 else said)

        def promote(others: list[RouterContact], term: int) -> Any:
            return noted(f"promote {[other.name for other in others]} {term}", FATES.get(name))

        remotes = {
            "standing": standing,
            "promote": promote,
            "ping": lambda: noted("ping", self.answers[key] if isinstance(self.answers[key], Exception) else None),
            "link_keys": lambda: noted("link_keys", self.answers[key]),
            "replace_weights": lambda path: noted(f"replace_weights {path}", FATES.get(name)),
        }
        return SimpleNamespace(name=name, **{m: SimpleNamespace(remote=remote) for m, remote in remotes.items()})

    def _wait(self, refs: list[Any], timeout: float, num_returns: int = 1) -> tuple[list[Any], list[Any]]:
        is_ready = next(self.waits, True)
        return [ref for ref in refs if is_ready and not isinstance(ref, Exception)], []

    @staticmethod
    def _call(who: str, ref: Any, timeout_s: float) -> Any:
        answer = ref[0] if isinstance(ref, list) else ref
        if isinstance(answer, Exception):
            raise answer
        return answer

    def find(self, journal: Journal | None = None) -> Survivors:
        return find_survivors("abc", journal, 1.0)


FATES: dict[str, Any] = {}
"""What comes of a promotion, or an import."""
SILENT = Unavailable("frozen")
REPLICAS = {
    f"router_{number}": router(f"router-{number}", leads=False, following=Following(None, Course(0, 0)))
    for number in (1, 2, 3)
}


def test_expert_actors_are_asked_after_the_step_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(
        monkeypatch,
        router_0=router(),
        router_1=None,
        expert_10=WHOLE[1][1],
        expert_9=WHOLE[0][1],
        expert_11=None,
        expert_12=SILENT,
    )
    found = stage.find()
    assert found.leader == "router-0"
    assert found.lead == router()
    assert list(found.experts) == ["expert-9", "expert-10"]
    assert stage.ended == ["router-1", "expert-11", "expert-12"]
    first = stage.calls.index("expert-9 standing")
    assert all(stage.calls.index(f"{name} standing") < first for name in ("router-0", "router-1"))
    assert stage.calls.count("expert-9 ping") == 2, "so that nobody takes the coordinator for gone"


def test_those_that_follow_are_found_and_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One was joining, in the leader's turn; one was left out; one has frozen; and one led before."""
    leader = router(leads=True, term=4, followers=("router-1", "router-2"), contact=REPLICAS["router_3"].contact)
    deposed = router("router-0", term=1)
    answers = {**REPLICAS, "router_2": [None, REPLICAS["router_2"]], "router_3": leader}
    stage = Stage(monkeypatch, router_0=deposed, **answers, router_4=SILENT, router_5=REPLICAS["router_1"])
    found = stage.find()
    assert found.leader == "router-3"
    assert set(found.routers) == {"router-1", "router-2", "router-3"}
    assert stage.ended == ["router-0", "router-4", "router-5"]
    assert not any("promote" in call for call in stage.calls)


def test_without_a_leader_the_furthest_that_can_is_promoted(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = replace(REPLICAS["router_2"], vitals={"version": 21, "run": 2, "left_out": []}, term=3)
    followed = replace(REPLICAS["router_3"], leads=True, term=5, followers=("router-1",))
    stage = Stage(
        monkeypatch, router_1=REPLICAS["router_1"], router_2=[ahead, ahead], router_3=[REPLICAS["router_3"], followed]
    )
    monkeypatch.setitem(FATES, "router-2", StepAborted("behind the expert actors"))
    found = stage.find()
    promoted = [call for call in stage.calls if "promote" in call]
    assert promoted == ["router-2 promote ['router-1', 'router-3'] 4", "router-3 promote ['router-1'] 5"]
    assert (found.leader, set(found.routers)) == ("router-3", {"router-1", "router-3"})
    assert stage.ended == ["router-2"]


def test_where_nobody_can_lead_no_router_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, router_1=REPLICAS["router_1"], expert_0=WHOLE[0][1])
    monkeypatch.setitem(FATES, "router-1", StepAborted("behind the expert actors"))
    found = stage.find()
    assert (found.leader, found.routers, found.lead) == ("", {}, None)
    assert list(found.experts) == ["expert-0"]
    assert stage.ended == ["router-1"]


def test_a_frozen_process_is_ended_by_its_number_and_no_living_one(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = (Process("expert-0", "node", 5), Process("expert-1", "node", 1), Process("router-0", "node", 20))
    stage = Stage(monkeypatch, router_0=router(), expert_0=SILENT, expert_1=WHOLE[1][1])
    stage.find(replace(JOURNAL, actors=actors))
    assert stage.fenced == [5]


def test_the_keys_are_those_of_any_actor_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def told_by(**keys: Any) -> Any:
        handles = Stage(monkeypatch, **keys).handles
        found = survivors(*WHOLE)
        routers = {"router-0": (handles["router-0"], router())}
        experts = {name: (handles[name], said) for name, (_, said) in found.experts.items()}
        return link_keys_of(Survivors(routers, "router-0", experts))

    assert told_by(router_0="keys", expert_0=SILENT, expert_1=SILENT) == "keys"
    assert told_by(router_0=SILENT, expert_0=SILENT, expert_1="keys") == "keys"
    assert told_by(router_0=None, expert_0=None, expert_1=None) is None
    with pytest.raises(Unavailable, match="tells the keys"):
        told_by(router_0=SILENT, expert_0=SILENT, expert_1=SILENT)


def test_whom_an_import_had_reached_is_not_given_up() -> None:
    """It is repeated at all of them."""
    ahead = survivors(expert("expert-0", (0, 1), run=3), expert("expert-1", (0, 1, 2, 3)))
    journal = replace(JOURNAL, importing="/models/other")
    assert weigh(ahead, journal, MODEL, 2, saved=True).lost == {}
    assert list(weigh(ahead, replace(JOURNAL, importing=""), MODEL, 2, saved=True).lost) == ["expert-0"]


def test_a_crew_goes_on_with_those_that_were_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = SimpleNamespace(remote=lambda: "death")
    handles = {
        name: SimpleNamespace(wait_until_death=wait) for name in ("router-1", "router-3", "expert-0", "expert-1")
    }
    said = replace(REPLICAS["router_1"], leads=True, vitals={"left_out": ["router-6"]})
    routers = {"router-3": (handles["router-3"], REPLICAS["router_3"]), "router-1": (handles["router-1"], said)}
    experts = {name: (handles[name], standing) for name, standing in WHOLE}
    monkeypatch.setattr(crew_module, "node_names", lambda: {"node": "one"})
    crew: Any = Crew(CONFIG, "abc")
    keys: Any = object()
    crew.take_over(Survivors(routers, "router-1", experts), (5, 2), 12, keys)
    assert (crew.leader, crew.router) == ("router-1", handles["router-1"])
    assert {name: handle for name, (_, handle) in crew.routers().items()} == {n: h for n, (h, _) in routers.items()}
    assert crew.next_numbers == (5, 7), "the leader would take a new router-6 for the one that it has left out"
    assert crew.num_experts == 12
    assert crew.link_keys is keys
    known = {process.name: process.pid for process in crew.processes()}
    assert known == {"router-1": 21, "router-3": 23, "expert-0": 1, "expert-1": 1}


def test_a_crew_without_a_router_has_no_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "node_names", dict)
    crew = Crew(CONFIG, "abc")
    crew.take_over(Survivors({}, "", {}), (0, 1), 8, None)
    assert (crew.leader, crew.routers(), crew.next_numbers) == ("", {}, (0, 1))
    with pytest.raises(Unavailable, match="no router leads"):
        _ = crew.router


def test_nobody_leads_who_has_died_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "node_names", dict)
    handle: Any = SimpleNamespace(wait_until_death=SimpleNamespace(remote=lambda: "death"))
    crew = Crew(CONFIG, "abc")
    crew.take_over(Survivors({"router-3": (handle, REPLICAS["router_3"])}, "router-3", {}), (0, 1), 8, None)
    monkeypatch.setattr(crew_module.ray, "kill", lambda handle: None)
    crew.end(["router-3"])
    with pytest.raises(Unavailable, match="router-3 has ended meanwhile"):
        crew.lead("router-3")
    assert crew.leader == "", "another heir is looked for"


# What the coordinator is told.


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
