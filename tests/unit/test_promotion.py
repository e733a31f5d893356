"""Which router takes the lead after a death, and what those who wait are told. With a crew of names alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from actors.errors import InvalidInput, MoeClusterError, StepAborted
from actors.values import Course, Placement, Promotion, StepReport
from cluster.backend import Job, JobState
from cluster.config import JobConfig, OptimizerConfig, RouterConfig
from cluster.control.coordinator import Coordinator
from cluster.control.model import ModelFacts
from cluster.errors import Unavailable
from cluster.fabric import jobs
from cluster.fabric import routers as module
from cluster.fabric.guarded import Guarded
from cluster.fabric.routers import Routers
from cluster.fabric.standing import Following

PLACEMENT = Placement(1, (("expert-0",),), 2)


def promotion(version: int, report: StepReport | None = None, placement: Placement = PLACEMENT) -> Promotion:
    return Promotion(version, report, placement, num_parameters=placement.num_experts)


class Cast:
    """A crew and the changes to it: routers by name, and what each does when it is promoted."""

    def __init__(self, **fates: Promotion | MoeClusterError) -> None:
        self.leader = ""
        self.left = dict(fates)
        self.asked: list[tuple[str, list[str], int]] = []
        self.switched: list[Placement] = []
        self.num_experts = 0
        self.dies = ""
        """Right after it was promoted."""

    def routers(self) -> dict[str, tuple[str, Any]]:
        return {name: (name, SimpleNamespace(promote=self._promoter(name))) for name in self.left}

    def _promoter(self, name: str) -> Any:
        def remote(others: list[str], term: int) -> Promotion | MoeClusterError:
            self.asked.append((name, others, term))
            return self.left[name]

        return SimpleNamespace(remote=remote)

    def lead(self, name: str) -> None:
        if self.dies == name:
            del self.left[name]
            raise Unavailable(f"{name} has ended meanwhile; try again")
        self.leader = name

    def bury(self, name: str, reason: str) -> None:
        del self.left[name]

    def switch(self, placement: Placement) -> None:
        self.switched.append(placement)


def answer_of(who: str, answer: Any, timeout_s: float) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


def of(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> Routers:
    monkeypatch.setattr(module, "call", answer_of)
    state = Guarded(Coordinator(ModelFacts("m", 1, 2, 1, 1, 8, 8), PLACEMENT))
    crew: Any = cast
    return Routers(state, crew, crew, None, RouterConfig(actors=2, max_actors=3), 2)


def promoted(routers: Routers) -> None:
    routers.look()
    assert routers._promoting is not None
    routers._promoting.join(10)
    assert not routers._promoting.is_alive()


def test_the_first_that_can_leads_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    cast = Cast(a=StepAborted("behind the others"), b=promotion(7), c=promotion(7))
    routers = of(cast, monkeypatch)
    promoted(routers)
    assert cast.asked == [("a", ["b", "c"], 1), ("b", ["c"], 2)]
    assert (cast.leader, list(cast.left)) == ("b", ["b", "c"])
    assert [placement.epoch for placement in cast.switched] == [1]
    assert routers.after("dead", Unavailable("it died")).version == 7


def test_an_heir_that_dies_before_anybody_knows_of_it_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    cast = Cast(a=promotion(7), b=promotion(8))
    cast.dies = "a"
    routers = of(cast, monkeypatch)
    promoted(routers)
    assert (cast.leader, list(cast.left)) == ("b", ["b"])
    assert routers.after("dead", Unavailable("it died")).version == 8


def test_who_waits_is_told_that_nobody_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    cast = Cast(a=Unavailable("dead as well"))
    routers = of(cast, monkeypatch)
    promoted(routers)
    assert not cast.left
    with pytest.raises(Unavailable, match="it died"):
        routers.after("dead", Unavailable("it died"))


def test_an_heir_says_how_many_experts_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader before may have died right after a growth, and another heir may undo what the first has told."""
    grown = Placement(2, (("expert-0",), ("expert-0",)), 2)
    cast = Cast(a=promotion(7, placement=grown), b=promotion(7))
    routers = of(cast, monkeypatch)

    def sees(epoch: int, num_experts: int) -> None:
        promoted(routers)
        with routers._state.reading() as coordinator:
            assert (coordinator.placement.epoch, coordinator.placement.num_experts) == (epoch, num_experts)
            assert (coordinator.model.num_experts, coordinator.model.num_parameters) == (num_experts, num_experts)
        assert cast.num_experts == num_experts
        assert cast.switched[-1].epoch == epoch

    sees(2, 4)
    cast.bury("a", "killed")
    cast.leader = ""
    sees(3, 2)


def test_terms_go_on_after_those_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    cast: Any = Cast(a=promotion(7))
    monkeypatch.setattr(module, "call", answer_of)
    state = Guarded(Coordinator(ModelFacts("m", 1, 2, 1, 1, 8, 8), PLACEMENT))
    promoted(Routers(state, cast, cast, None, RouterConfig(), 1, term=4))
    assert cast.asked == [("a", [], 5)]


@pytest.mark.parametrize(("wanted", "is_off"), [(1, True), (2, False), (3, True)])
def test_more_routers_than_wanted_are_as_wrong_as_fewer(
    monkeypatch: pytest.MonkeyPatch, wanted: int, is_off: bool
) -> None:
    """A coordinator may have died while it changed their number."""
    cast: Any = Cast(a=promotion(7), b=promotion(7))
    state = Guarded(Coordinator(ModelFacts("m", 1, 2, 1, 1, 8, 8), PLACEMENT))
    routers = Routers(state, cast, cast, None, RouterConfig(), wanted)
    cast.leader = "a"
    resized: list[int] = []
    monkeypatch.setattr(routers, "_resize", lambda count, report: resized.append(count))
    routers.look()
    assert routers._turn.acquire(timeout=10)
    assert resized == ([wanted] if is_off else [])


def test_one_that_only_seems_dead_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    cast = Cast(a=promotion(1))
    cast.leader = "a"
    monkeypatch.setattr(module, "NOTICED_S", 0.1)
    with pytest.raises(Unavailable, match="it died"):
        of(cast, monkeypatch).after("a", Unavailable("it died"))


@pytest.mark.parametrize("count", [0, 4])
def test_numbers_that_cannot_be(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    with pytest.raises(
        InvalidInput, match=rf"routers: is outside 1 to router\.max_actors 3 \(got {count}\); use 1 to 3"
    ):
        of(Cast(), monkeypatch).scale(count, "r")


JOB = Job("job-1", "mine", JobConfig(), JobState.RUNNING, 0, 1.0)
REPORT = StepReport(step=4, loss=2.0, grad_norm=1.0, num_tokens=8, seconds=0.1, retries=0, load_LE=[[1]])


class Stage:
    """A leader that dies at its first step, one that takes its place, and what the job asks them."""

    def __init__(self, promotion: Promotion) -> None:
        self.leader = "first"
        self.promotion = promotion
        self.asked: list[str] = []

    @property
    def router(self) -> Any:
        name = self.leader

        def train_step(*args: object) -> StepReport | Unavailable:
            self.asked.append(name)
            return death() if name == "first" else REPORT

        return SimpleNamespace(
            begin_run=SimpleNamespace(remote=lambda *args: Course(run=1, version=3)),
            continue_run=SimpleNamespace(remote=lambda *args: Course(run=1, version=3)),
            train_step=SimpleNamespace(remote=train_step),
        )

    def after(self, leader: str, error: Unavailable) -> Promotion:
        self.leader = "second"
        return self.promotion

    def follow(self, following: Following) -> None:
        self.following = following

    def job_begins(self, job_id: str, begin: Callable[[], Course], step: int) -> Course:
        return begin()


def death() -> Unavailable:
    error = Unavailable("the router is not there")
    error.__cause__ = RayActorError()
    return error


@pytest.mark.parametrize(
    ("told", "asked", "retries"),
    [
        (promotion(3), ["first", "second"], 1),
        (promotion(3, replace(REPORT, step=3)), ["first", "second"], 1),
        (promotion(4, REPORT), ["first"], 0),
    ],
)
def test_a_step_that_counts_already_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch, told: Promotion, asked: list[str], retries: int
) -> None:
    stage: Any = Stage(told)
    monkeypatch.setattr(jobs, "call", answer_of)
    router = jobs._JobRouter(stage, stage, stage, JOB)
    router.begin_run(OptimizerConfig())
    report = router.train_step([[[1, 2]]], lr=1e-3, clip_norm=1.0)
    assert (report.step, report.retries, stage.asked) == (4, retries, asked)


@pytest.mark.parametrize("step", [0, 5])
def test_all_routers_learn_whose_steps_they_do(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    stage: Any = Stage(promotion(3))
    monkeypatch.setattr(jobs, "call", answer_of)
    job = replace(JOB, step=step)
    jobs._JobRouter(stage, stage, stage, job).begin_run(OptimizerConfig())
    assert stage.following == Following(job, Course(run=1, version=3 - step))


def test_a_step_that_nobody_can_tell_of_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stage: Any = Stage(promotion(4))
    monkeypatch.setattr(jobs, "call", answer_of)
    router = jobs._JobRouter(stage, stage, stage, JOB)
    router.begin_run(OptimizerConfig())
    with pytest.raises(MoeClusterError, match="step to version 4"):
        router.train_step([[[1, 2]]], lr=1e-3, clip_norm=1.0)


def test_of_promotions_the_last_alone_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits asks for the leader of now. Each has a whole placement and a step's report."""
    cast = Cast(a=promotion(7), b=promotion(9))
    routers = of(cast, monkeypatch)
    promoted(routers)
    assert cast.leader == "a"
    del cast.left["a"]
    cast.leader = ""
    promoted(routers)
    assert cast.leader == "b"
    assert routers.after("a", Unavailable("gone")) == promotion(9)
    assert routers._promoted == ("b", promotion(9))
