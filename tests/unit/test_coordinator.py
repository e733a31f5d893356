"""The coordinator, single-stepped: the tests are its clock, its clients and its cluster."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.backend import ActorStatus, Job, JobEvent, JobState
from cluster.config import BatchConfig, EvalConfig, JobConfig
from cluster.control.coordinator import Coordinator, Limits
from cluster.control.decisions import ActorLost, Decision, StartJob, StopJob
from cluster.control.jobtable import job_of_dict, job_to_dict
from cluster.control.load import LoadLE
from cluster.control.model import ModelFacts
from cluster.errors import AlreadyExists, ConfigError, FailedPrecondition, NotFound, ResourceExhausted
from cluster.placement.placement import ActorSlot, spread

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)
SLOTS = (ActorSlot("e0", "n0"), ActorSlot("e1", "n1"))
PLACEMENT = spread(8, 2, SLOTS)
DOUBLE = spread(8, 2, SLOTS, redundancy=2)
ACTORS = ("r0", "e0", "e1")
SHORT = JobConfig(steps=3)


def report(actor_id: str, state: str = "ready", pid: int = 1) -> ActorStatus:
    role = "router" if actor_id.startswith("r") else "expert"
    return ActorStatus(actor_id, role, f"n{actor_id[1:]}", pid, state, device="cpu", version=0)


def beat(coordinator: Coordinator, now: float, actors: Sequence[str] = ACTORS) -> None:
    for actor_id in actors:
        coordinator.actor_seen(report(actor_id), now)


def make(limits: Limits | None = None) -> Coordinator:
    coordinator = Coordinator(MODEL, PLACEMENT, limits)
    beat(coordinator, 0.0)
    return coordinator


def make_double() -> Coordinator:
    """Both actors hold every group."""
    coordinator = Coordinator(MODEL, DOUBLE, redundancy=2)
    beat(coordinator, 0.0)
    return coordinator


@pytest.fixture
def coordinator() -> Coordinator:
    return make()


def start(coordinator: Coordinator, request_id: str = "q", config: JobConfig = SHORT, now: float = 1.0) -> str:
    job = coordinator.jobs.submit(config, request_id, now)
    assert StartJob(job.id, config) in coordinator.step(now)
    return job.id


def commit(coordinator: Coordinator, job_id: str, steps: int, now: float = 2.0) -> None:
    for step in range(1, steps + 1):
        coordinator.step_committed(job_id, step, {"loss": 1.0}, now)


def commit_loads(coordinator: Coordinator, job_id: str, loads: Sequence[LoadLE]) -> None:
    """Steps from 1 on, step n at 100 + n seconds."""
    for step, load_LE in enumerate(loads, start=1):
        coordinator.step_committed(job_id, step, {"loss": 1.0}, 100.0 + step, load_LE)


def kinds(coordinator: Coordinator, job_id: str) -> list[tuple[str, str]]:
    events, _ = coordinator.jobs.events(job_id, 0, 1000)
    return [(event.kind, event.state.value) for event in events]


# --- Jobs ----------------------------------------------------------------------------------------------------------


def test_a_job_from_submit_to_success(coordinator: Coordinator) -> None:
    job = coordinator.jobs.submit(SHORT, "q", 1.0)
    assert (job.state, job.step, job.created_s, job.last_event) == (JobState.QUEUED, 0, 1.0, 1)
    assert coordinator.step(2.0) == [StartJob(job.id, SHORT)]
    assert coordinator.step(2.5) == [], "a decision is given out once"
    commit(coordinator, job.id, 3, now=3.0)
    coordinator.jobs.evaluated(job.id, {"heldout_loss": 0.5}, 3.5)
    coordinator.jobs.finished(job.id, 4.0)
    job = coordinator.jobs.get(job.id)
    assert (job.state, job.step, job.started_s, job.ended_s, job.error) == (JobState.SUCCEEDED, 3, 2.0, 4.0, "")
    assert kinds(coordinator, job.id) == [
        ("state", "queued"),
        ("state", "running"),
        ("step", "running"),
        ("step", "running"),
        ("step", "running"),
        ("eval", "running"),
        ("state", "succeeded"),
    ]
    assert coordinator.status().version == 3


def test_jobs_run_one_at_a_time_in_order(coordinator: Coordinator) -> None:
    first, second, third = (coordinator.jobs.submit(SHORT, request, 1.0).id for request in "abc")
    assert coordinator.step(1.0) == [StartJob(first, SHORT)]
    commit(coordinator, first, 3)
    coordinator.jobs.finished(first, 3.0)
    assert coordinator.step(3.0) == [StartJob(second, SHORT)]
    assert [job.id for job in coordinator.jobs.newest_first()] == [third, second, first]
    assert coordinator.status().jobs == {
        "queued": 1,
        "running": 1,
        "cancelling": 0,
        "succeeded": 1,
        "failed": 0,
        "cancelled": 0,
    }


def test_a_request_id_means_one_job(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    again = coordinator.jobs.submit(JobConfig(steps=3), "q", 9.0)
    assert (again.id, again.state, again.created_s) == (job_id, JobState.RUNNING, 1.0)
    assert len(coordinator.jobs.newest_first()) == 1
    with pytest.raises(AlreadyExists, match="'q' was used for job-1"):
        coordinator.jobs.submit(JobConfig(steps=4), "q", 9.0)
    with pytest.raises(InvalidInput, match="request_id: is empty"):
        coordinator.jobs.submit(SHORT, "", 9.0)


def test_the_queue_has_a_limit_which_retries_do_not_meet() -> None:
    coordinator = make(Limits(max_queued_jobs=2))
    start(coordinator, "running")
    for request in "ab":
        coordinator.jobs.submit(SHORT, request, 1.0)
    with pytest.raises(ResourceExhausted, match="2 jobs are queued"):
        coordinator.jobs.submit(SHORT, "c", 1.0)
    assert coordinator.jobs.submit(SHORT, "b", 1.0).request_id == "b"


def test_a_job_must_fit_the_model(coordinator: Coordinator) -> None:
    with pytest.raises(ConfigError, match=r"batch\.sequence_length: is beyond the model's 256 positions \(got 257\)"):
        coordinator.jobs.submit(JobConfig(batch=BatchConfig(sequence_length=257)), "q", 1.0)
    with pytest.raises(ConfigError, match=r"eval\.batches"):
        coordinator.jobs.submit(JobConfig(eval=EvalConfig(batches=0)), "q", 1.0)
    assert coordinator.jobs.newest_first() == []


def test_cancel_of_a_queued_job_ends_it_at_once(coordinator: Coordinator) -> None:
    start(coordinator, "running")
    job = coordinator.jobs.cancel(coordinator.jobs.submit(SHORT, "queued", 1.0).id, 2.0)
    assert (job.state, job.started_s, job.ended_s) == (JobState.CANCELLED, None, 2.0)
    assert coordinator.step(2.0) == []


def test_cancel_of_a_running_job_waits_for_its_step(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    coordinator.jobs.submit(SHORT, "next", 1.0)
    assert coordinator.jobs.cancel(job_id, 2.0).state is JobState.CANCELLING
    assert coordinator.jobs.cancel(job_id, 2.0).state is JobState.CANCELLING
    assert coordinator.step(2.0) == [StopJob(job_id, "cancelled")], "and the next job waits"
    commit(coordinator, job_id, 1)
    coordinator.jobs.stopped(job_id, 3.0)
    assert (coordinator.jobs.get(job_id).state, coordinator.jobs.get(job_id).step) == (JobState.CANCELLED, 1)
    assert coordinator.step(3.0) == [StartJob("job-2", SHORT)]
    with pytest.raises(FailedPrecondition, match="job-1 is cancelled"):
        coordinator.jobs.cancel(job_id, 4.0)


def test_a_job_that_ends_before_the_cancel_reaches_it_has_succeeded(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    coordinator.jobs.cancel(job_id, 2.0)
    commit(coordinator, job_id, 3)
    coordinator.jobs.finished(job_id, 3.0)
    coordinator.jobs.stopped(job_id, 3.1)
    assert coordinator.jobs.get(job_id).state is JobState.SUCCEEDED


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails_the_job_and_nothing_else(coordinator: Coordinator, loss: float) -> None:
    job_id = start(coordinator)
    commit(coordinator, job_id, 1)
    coordinator.step_committed(job_id, 2, {"loss": loss}, 3.0)
    job = coordinator.jobs.get(job_id)
    assert (job.state, job.step, job.error) == (JobState.FAILED, 1, f"loss of step 2 is {loss}")
    coordinator.jobs.submit(SHORT, "next", 4.0)
    assert coordinator.step(4.0) == [StopJob(job_id, job.error)], "the next job waits for the steps to stop"
    with pytest.raises(FailedPrecondition, match="comes to its stop"):
        coordinator.jobs.require_idle("x")
    coordinator.jobs.stopped(job_id, 5.0)
    assert coordinator.step(5.0) == [StartJob("job-2", SHORT)]


def test_a_failed_job_frees_the_cluster(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    coordinator.jobs.failed(job_id, "data.source: no file matches", 2.0)
    assert (coordinator.jobs.get(job_id).state, coordinator.jobs.get(job_id).error) == (
        JobState.FAILED,
        "data.source: no file matches",
    )
    assert start(coordinator, "next", now=3.0) == "job-2"


def test_late_and_repeated_reports_change_nothing(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    commit(coordinator, job_id, 2)
    coordinator.step_committed(job_id, 2, {"loss": 9.0}, 3.0)
    assert coordinator.jobs.get(job_id).step == 2
    coordinator.jobs.failed(job_id, "why", 4.0)
    before = coordinator.jobs.get(job_id)
    coordinator.step_committed(job_id, 3, {"loss": 1.0}, 5.0)
    coordinator.jobs.evaluated(job_id, {}, 5.0)
    coordinator.jobs.note(job_id, "late", 5.0)
    coordinator.jobs.finished(job_id, 5.0)
    coordinator.jobs.failed(job_id, "again", 5.0)
    coordinator.jobs.stopped(job_id, 5.0)
    assert coordinator.jobs.get(job_id) == before
    assert coordinator.status().version == 2


def test_reports_that_cannot_be_true_are_refused(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    with pytest.raises(InvalidInput, match="step 1 of job-1 was never committed"):
        coordinator.step_committed(job_id, 2, {}, 2.0)
    with pytest.raises(FailedPrecondition, match="committed 0 of 3 steps"):
        coordinator.jobs.finished(job_id, 2.0)
    queued = coordinator.jobs.submit(SHORT, "next", 2.0).id
    with pytest.raises(FailedPrecondition, match="never started"):
        coordinator.step_committed(queued, 1, {}, 2.0)
    for call in (
        coordinator.jobs.get,
        lambda job: coordinator.jobs.cancel(job, 2.0),
        lambda job: coordinator.jobs.events(job, 0, 1),
    ):
        with pytest.raises(NotFound, match="'job-9'"):
            call("job-9")


# --- Events --------------------------------------------------------------------------------------------------------


def test_events_resume_from_a_number(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    commit(coordinator, job_id, 3)
    page, job = coordinator.jobs.events(job_id, 2, 2)
    assert [(event.number, event.kind, event.step) for event in page] == [(3, "step", 1), (4, "step", 2)]
    assert job.last_event == 5
    assert coordinator.jobs.events(job_id, 5, 10)[0] == ()
    assert coordinator.jobs.events(job_id, 99, 10)[0] == ()


def test_history_is_bounded_and_its_numbers_show_what_is_gone() -> None:
    coordinator = make(Limits(max_events=10))
    job_id = start(coordinator, config=JobConfig(steps=100))
    commit(coordinator, job_id, 100)
    events, job = coordinator.jobs.events(job_id, 0, 1000)
    assert [event.number for event in events] == list(range(93, 103))
    assert job.last_event == 102


def test_old_jobs_are_forgotten() -> None:
    coordinator = make(Limits(max_final_jobs=2))
    for request in "abcd":
        coordinator.jobs.cancel(coordinator.jobs.submit(SHORT, request, 1.0).id, 1.0)
    coordinator.step(2.0)
    assert [job.request_id for job in coordinator.jobs.newest_first()] == ["d", "c"]
    assert coordinator.jobs.submit(SHORT, "a", 3.0).id == "job-5"


# --- Membership ----------------------------------------------------------------------------------------------------


def test_jobs_wait_until_every_group_has_a_ready_holder() -> None:
    coordinator = Coordinator(MODEL, PLACEMENT)
    coordinator.jobs.submit(SHORT, "q", 0.0)
    assert coordinator.step(0.0) == []
    assert coordinator.status().message == "expert groups without a ready holder: 0, 1, 2, 3"
    beat(coordinator, 1.0, ["e0", "e1"])
    assert (coordinator.step(1.0), coordinator.status().message) == ([], "no router is ready")
    coordinator.actor_seen(report("r0", state="starting"), 1.0)
    assert coordinator.step(1.0) == []
    coordinator.actor_seen(report("r0"), 2.0)
    assert coordinator.step(2.0) == [StartJob("job-1", SHORT)]
    assert coordinator.status().ready


def test_a_silent_actor_is_lost_and_the_running_job_told(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    beat(coordinator, 5.0, ["r0", "e0"])
    assert coordinator.step(5.5) == []
    assert coordinator.step(10.0) == []
    decisions = coordinator.step(10.1)
    assert decisions == [ActorLost("e1", "expert", (2, 3), job_id, "silent for more than 10 s")]
    status = coordinator.status()
    assert {actor.id: actor.state for actor in status.actors} == {"r0": "ready", "e0": "ready", "e1": "lost"}
    assert (status.ready, status.message) == (False, "expert groups without a ready holder: 2, 3")
    assert kinds(coordinator, job_id)[-1] == ("note", "running")
    assert coordinator.step(11.0) == [], "told once"


def test_a_coordinator_that_stood_still_blames_nobody(coordinator: Coordinator) -> None:
    """Or whose clock was set: what the actors said meanwhile has not been read yet."""
    start(coordinator)
    assert coordinator.step(60.0) == []
    beat(coordinator, 60.5, ["r0", "e0"])
    assert coordinator.step(64.9) == []
    assert coordinator.step(69.9) == []
    (silent,) = coordinator.step(70.1)
    assert isinstance(silent, ActorLost)
    assert silent.actor_id == "e1"


def test_a_silent_actor_comes_back_with_its_next_report(coordinator: Coordinator) -> None:
    beat(coordinator, 5.0, ["r0", "e0"])
    coordinator.step(12.0)
    beat(coordinator, 13.0)
    assert coordinator.status().ready


def test_a_dead_process_does_not_come_back_but_its_successor_does(coordinator: Coordinator) -> None:
    coordinator.actor_lost("e1", 1.0, "exit code -9")
    after = PLACEMENT.without({"e1"})
    assert coordinator.step(1.0) == [ActorLost("e1", "expert", (2, 3), None, "exit code -9", after)]
    coordinator.actor_lost("e1", 1.1, "exit code -9")
    coordinator.actor_seen(report("e1"), 1.2)
    assert coordinator.step(1.3) == []
    assert [actor.state for actor in coordinator.status().actors] == ["ready", "ready", "lost"]
    coordinator.actor_seen(report("e1", pid=2), 2.0)
    status = coordinator.status()
    assert [(actor.state, actor.groups) for actor in status.actors[1:]] == [("ready", (0, 1)), ("ready", ())]
    assert (status.ready, status.message) == (False, "no actor holds groups 2, 3 any more")
    coordinator.placed(Placement(3, PLACEMENT.holders, 2))
    assert coordinator.status().ready


def test_a_lost_router_ends_the_running_job(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    commit(coordinator, job_id, 1)
    coordinator.actor_lost("r0", 3.0, "exit code -9")
    error = "router r0 was lost after step 1: exit code -9"
    assert coordinator.step(3.0) == [
        ActorLost("r0", "router", (), job_id, "exit code -9"),
        StopJob(job_id, error),
    ]
    assert coordinator.jobs.get(job_id).error == error


def test_a_lost_router_comes_back_from_a_checkpoint_and_its_job_goes_on(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    commit(coordinator, job_id, 1)
    commit(coordinator, job_id, 2)
    coordinator.health.can_restore = True
    coordinator.actor_lost("r0", 3.0, "exit code -9")
    assert coordinator.step(3.0) == [ActorLost("r0", "router", (), job_id, "exit code -9")]
    assert coordinator.jobs.get(job_id).state is JobState.RUNNING
    assert (coordinator.health.is_router_lost, coordinator.health.can_return) == (True, True)
    status = coordinator.status()
    assert (status.ready, status.message) == (False, "the router died; bringing it back")
    coordinator.actor_seen(report("r0", pid=99), 4.0)
    coordinator.restored(Placement(2, PLACEMENT.holders, 2), 1, {job_id: 1}, "restored version 1", 4.0)
    assert (coordinator.health.is_router_lost, coordinator.status().ready) == (False, True)
    coordinator.step(4.1)
    (entry,) = coordinator.ledger.entries()
    assert (entry.kind, entry.subject, entry.steps_replayed) == ("router_death", "r0", 1)
    assert entry.recovered_s == 4.1


def test_with_another_router_a_job_goes_on_without_a_checkpoint(coordinator: Coordinator) -> None:
    coordinator.health.routers_wanted = 2
    beat(coordinator, 0.5, ["r1"])
    job_id = start(coordinator)
    commit(coordinator, job_id, 1)
    coordinator.actor_lost("r0", 3.0, "exit code -9")
    assert coordinator.step(3.0) == [ActorLost("r0", "router", (), job_id, "exit code -9")]
    assert coordinator.jobs.get(job_id).state is JobState.RUNNING
    assert not coordinator.health.is_router_lost
    assert not coordinator.health.can_return
    assert coordinator.status().ready
    events, _ = coordinator.jobs.events(job_id, 0, 100)
    assert events[-1].message == "router r0 lost: exit code -9; the other routers go on"
    (entry,) = coordinator.ledger.entries()
    assert (entry.kind, entry.recovered_s) == ("router_death", None), "there are fewer than there should be"
    assert coordinator.status().message == "degraded: 1 of 2 routers are ready"
    beat(coordinator, 5.0, ["r2"])
    coordinator.step(5.0)
    assert coordinator.ledger.entries()[0].recovered_s == 5.0
    coordinator.actor_lost("r1", 6.0, "exit code -9")
    coordinator.actor_lost("r2", 6.0, "exit code -9")
    coordinator.step(6.0)
    assert coordinator.jobs.get(job_id).state is JobState.FAILED
    assert coordinator.health.is_router_lost


def test_without_a_checkpoint_only_untouched_weights_can_be_loaded_again(coordinator: Coordinator) -> None:
    coordinator.actor_lost("r0", 3.0, "exit code -9")
    assert coordinator.health.can_return
    coordinator.actor_seen(report("r0", pid=99), 4.0)
    commit(coordinator, start(coordinator), 1)
    coordinator.actor_lost("r0", 5.0, "exit code -9")
    assert not coordinator.health.can_return
    assert "in no checkpoint" in coordinator.status().message


def test_copies_take_over_from_a_dead_actor_and_the_job_goes_on() -> None:
    coordinator = make_double()
    job_id = start(coordinator)
    commit(coordinator, job_id, 1)
    coordinator.actor_lost("e0", 3.0, "exit code -9")
    after = Placement(2, (("e1",),) * 4, 2)
    assert coordinator.step(3.0) == [ActorLost("e0", "expert", (0, 1, 2, 3), job_id, "exit code -9", after)]
    events, job = coordinator.jobs.events(job_id, 0, 100)
    assert job.state is JobState.RUNNING
    assert events[-1].message == "expert e0 lost: exit code -9; copies took over groups 0, 1, 2, 3"
    status = coordinator.status()
    assert (status.ready, status.placement_epoch, status.copies) == (True, 2, {})
    assert status.owners == dict.fromkeys(range(4), "e1")
    assert status.message == "degraded: groups 0, 1, 2, 3 have fewer than 2 holders"
    commit(coordinator, job_id, 3)
    coordinator.jobs.finished(job_id, 4.0)
    assert coordinator.jobs.get(job_id).state is JobState.SUCCEEDED
    assert start(coordinator, "next", now=5.0), "and another one starts"


def test_the_dead_are_shown_until_others_are_in_their_places() -> None:
    coordinator = make_double()
    coordinator.actor_lost("e0", 3.0, "exit code -9")
    coordinator.step(3.0)
    assert "e0" in {actor.id for actor in coordinator.status().actors}
    coordinator.actor_seen(report("e2"), 4.0)
    coordinator.placed(Placement(3, (("e1", "e2"),) * 4, 2))
    coordinator.step(4.0)
    assert {actor.id for actor in coordinator.status().actors} == {"r0", "e1", "e2"}
    coordinator.actor_seen(report("e0"), 5.0)
    assert "e0" not in {actor.id for actor in coordinator.status().actors}, "a late report of a dead process"


def test_a_group_that_dies_with_its_last_holder_fails_the_job_by_name(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    commit(coordinator, job_id, 1)
    coordinator.jobs.submit(SHORT, "next", 2.0)
    coordinator.actor_lost("e1", 3.0, "exit code -9")
    error = "expert e1 was lost after step 1: exit code -9; no actor holds groups 2, 3 any more"
    after = Placement(2, (("e0",), ("e0",), (), ()), 2)
    assert coordinator.step(3.0) == [
        ActorLost("e1", "expert", (2, 3), job_id, "exit code -9", after),
        StopJob(job_id, error),
    ]
    assert (coordinator.jobs.get(job_id).state, coordinator.jobs.get(job_id).error) == (JobState.FAILED, error)
    status = coordinator.status()
    assert (status.ready, status.message) == (False, "no actor holds groups 2, 3 any more")
    assert status.owners == {0: "e0", 1: "e0"}
    coordinator.jobs.stopped(job_id, 4.0)
    assert coordinator.step(4.0) == [], "the next job waits"


def test_the_second_death_is_the_one_that_loses_groups() -> None:
    coordinator = make_double()
    job_id = start(coordinator)
    coordinator.actor_lost("e1", 3.0, "killed")
    assert coordinator.jobs.get(job_id).state is JobState.RUNNING
    coordinator.actor_lost("e0", 4.0, "killed")
    assert coordinator.jobs.get(job_id).error.endswith("no actor holds groups 0, 1, 2, 3 any more")


def test_an_actor_without_groups_may_die(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    coordinator.actor_seen(report("e2"), 2.0)
    coordinator.actor_lost("e2", 3.0, "killed")
    coordinator.actor_lost("e3", 3.0, "killed before it reported")
    assert coordinator.step(3.0) == [ActorLost("e2", "expert", (), job_id, "killed", None)]
    assert coordinator.jobs.get(job_id).state is JobState.RUNNING
    assert (coordinator.status().placement_epoch, coordinator.status().ready) == (1, True)


def test_an_actor_may_die_before_it_was_seen() -> None:
    coordinator = Coordinator(MODEL, DOUBLE, redundancy=2)
    coordinator.actor_lost("e1", 1.0, "killed")
    assert coordinator.step(1.0) == [
        ActorLost("e1", "expert", (0, 1, 2, 3), None, "killed", Placement(2, (("e0",),) * 4, 2))
    ]


def test_what_a_dead_actor_said_counts_for_nothing_though_it_was_its_first_word(coordinator: Coordinator) -> None:
    coordinator.actor_lost("e2", 1.0, "killed", pid=1)
    coordinator.actor_lost("e2", 1.1, "its links broke")
    coordinator.actor_left("e3", 1)
    for name in ("e2", "e3"):
        coordinator.actor_seen(report(name), 1.2)
    assert {actor.id for actor in coordinator.status().actors} == {"r0", "e0", "e1"}
    assert coordinator.actors() == SLOTS
    assert [entry.subject for entry in coordinator.ledger.entries(0)] == ["e2"], "one death"
    coordinator.actor_seen(report("e2", pid=2), 1.3)
    assert "e2" in {actor.id for actor in coordinator.status().actors}


def test_silence_leaves_the_placement_as_it_is_until_death_is_certain() -> None:
    coordinator = make_double()
    job_id = start(coordinator)
    beat(coordinator, 5.0, ["r0", "e0"])
    coordinator.step(5.5)
    (silent,) = coordinator.step(10.1)
    assert silent == ActorLost("e1", "expert", (0, 1, 2, 3), job_id, "silent for more than 10 s", None)
    status = coordinator.status()
    assert (status.placement_epoch, status.ready, status.owners[2]) == (1, True, "e1")
    assert status.message == "degraded: groups 0, 1, 2, 3 have fewer than 2 holders"
    with pytest.raises(FailedPrecondition, match="on e1, which does not answer"):
        coordinator.rebalance(coordinator.actors())
    coordinator.actor_lost("e1", 11.0, "killed")
    (dead,) = coordinator.step(11.0)
    assert dead == ActorLost("e1", "expert", (0, 1, 2, 3), job_id, "killed", Placement(2, (("e0",),) * 4, 2))
    assert coordinator.jobs.get(job_id).state is JobState.RUNNING


def test_one_group_with_too_few_holders_is_named() -> None:
    coordinator = make_double()
    coordinator.placed(Placement(2, (*DOUBLE.holders[:1], ("e0",), *DOUBLE.holders[2:]), 2))
    assert coordinator.status().message == "degraded: group 1 has fewer than 2 holders"


def test_starting_actors_may_be_silent() -> None:
    coordinator = Coordinator(MODEL, PLACEMENT)
    coordinator.actor_seen(report("e0", state="starting"), 0.0)
    assert coordinator.step(3600.0) == []


def test_groups_follow_the_placement(coordinator: Coordinator) -> None:
    assert [actor.groups for actor in coordinator.status().actors] == [(), (0, 1), (2, 3)]
    coordinator.placed(Placement(2, (("e1",), ("e1", "e0"), ("e1",), ("e0",)), 2))
    status = coordinator.status()
    assert [actor.groups for actor in status.actors] == [(), (1, 3), (0, 1, 2)]
    assert (status.placement_epoch, status.owners) == (2, {0: "e1", 1: "e1", 2: "e1", 3: "e0"})
    assert status.copies == {1: ("e0",)}
    with pytest.raises(InvalidInput, match="not newer"):
        coordinator.placed(Placement(2, (("e0",),) * 4, 2))


# --- Rebalancing ---------------------------------------------------------------------------------------------------


def test_living_expert_actors_may_hold_groups(coordinator: Coordinator) -> None:
    coordinator.actor_seen(report("e2"), 1.0)
    coordinator.actor_seen(report("e3", state="starting"), 1.0)
    assert coordinator.actors() == (*SLOTS, ActorSlot("e2", "n2"))
    coordinator.actor_lost("e2", 2.0, "killed")
    assert coordinator.actors() == SLOTS


def test_missing_copies_are_proposed_when_an_actor_came() -> None:
    coordinator = make_double()
    coordinator.actor_lost("e1", 1.0, "killed")
    coordinator.actor_seen(report("e2"), 2.0)
    proposal = coordinator.rebalance(coordinator.actors())
    (stage,) = proposal.stages
    assert {(move.group, move.kind, move.target) for move in stage.copies} == {(g, "copy", "e2") for g in range(4)}
    coordinator.begin_switch(stage.placement)
    coordinator.switch()
    assert "fewer than 2 holders" in coordinator.status().message, "what has come is not used yet"
    coordinator.in_use(stage.placement)
    status = coordinator.status()
    assert (status.message, status.placement_epoch) == ("", 3)
    assert status.copies == dict.fromkeys(range(4), ("e2",))


def test_the_load_of_the_window_is_evened_out_within_the_room_there_is() -> None:
    coordinator = Coordinator(dataclasses.replace(MODEL, expert_bytes=10), PLACEMENT, max_groups=2)
    beat(coordinator, 0.0)
    with pytest.raises(FailedPrecondition, match="no load to balance yet"):
        coordinator.rebalance(SLOTS)
    commit_loads(coordinator, start(coordinator), [[[20, 20, 20, 20, 5, 5, 5, 5], [0] * 8]])
    proposal = coordinator.rebalance(SLOTS)
    assert (proposal.balance_before, proposal.balance_after) == (pytest.approx(100 / 160), 1)
    assert [(move.kind, move.num_bytes) for move in proposal.moves] == [("move", 3 * 10 * 2)] * 2
    with pytest.raises(InvalidInput, match=r"max_groups: the actors that stay have no room"):
        coordinator.rebalance(SLOTS[1:])


def test_load_is_summed_over_a_window_of_steps() -> None:
    coordinator = make(Limits(load_window_steps=2))
    assert coordinator.status().load_LE == ()
    commit_loads(coordinator, start(coordinator), [[[9] * 8] * 2, [range(8), [1] * 8], [[10] * 8, [2] * 8]])
    assert coordinator.status().load_LE == (tuple(range(10, 18)), (3,) * 8)


def test_the_load_report_is_of_the_steps_in_the_window() -> None:
    coordinator = make(Limits(load_window_steps=2))
    empty = coordinator.load_report()
    assert (empty.version, empty.window_steps, empty.load_LE, empty.actors, empty.history) == (0, 0, (), {}, ())
    config = JobConfig(steps=3, batch=BatchConfig(sequences=2, sequence_length=16, gradient_accumulation=4))
    commit_loads(coordinator, start(coordinator, config=config), [[[9] * 8] * 2, [range(8), [1] * 8], [[10] * 8] * 2])
    report = coordinator.load_report()
    assert (report.version, report.window_steps, report.group_size) == (3, 2, 2)
    assert report.load_LE == coordinator.status().load_LE
    assert [(step.version, step.time_s, step.tokens) for step in report.history] == [(2, 102.0, 128), (3, 103.0, 128)]
    assert (report.microbatch_tokens_per_expert, report.step_tokens_per_expert) == (196 / 16 / 8, 196 / 16 / 2)
    assert "a batch of 32 (" in report.warning


def test_load_is_summed_by_the_placement_of_now(coordinator: Coordinator) -> None:
    commit_loads(coordinator, start(coordinator), [[range(8), [0] * 8]])
    assert coordinator.load_report().actors == {"e0": 0 + 1 + 2 + 3, "e1": 4 + 5 + 6 + 7}
    assert coordinator.load_report().nodes == {"n0": 6, "n1": 22}
    coordinator.placed(Placement(2, (("e1",), ("e0",), ("e2",), ("e0",)), 2))
    assert coordinator.load_report().actors == {"e1": 1, "e0": 5 + 13, "e2": 9}
    assert coordinator.load_report().nodes == {"n1": 1, "n0": 18, "": 9}, "e2 has not reported yet"


def test_a_load_of_another_model_is_refused_and_the_step_not_counted(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    with pytest.raises(InvalidInput, match="load_LE: is not 2 rows of 8 counts"):
        coordinator.step_committed(job_id, 1, {"loss": 1.0}, 2.0, [[1] * 4] * 2)
    assert (coordinator.status().version, coordinator.jobs.get(job_id).step) == (0, 0)


def test_an_import_waits_for_the_job_and_begins_a_new_window(coordinator: Coordinator) -> None:
    job_id = start(coordinator)
    with pytest.raises(FailedPrecondition, match="while job-1 is running"):
        coordinator.begin_import("/models/a")
    commit_loads(coordinator, job_id, [[[1] * 8] * 2])
    coordinator.jobs.failed(job_id, "x", 2.0)
    coordinator.begin_import("/models/a")
    assert coordinator.status().load_LE == ()
    assert coordinator.load_report().window_steps == 0


def test_during_an_import_no_job_begins_nor_another_import(coordinator: Coordinator) -> None:
    coordinator.begin_import("/models/a")
    with pytest.raises(FailedPrecondition, match="/models/a is being imported"):
        coordinator.begin_import("/models/b")
    job_id = coordinator.jobs.submit(SHORT, "a", 1.0).id
    assert coordinator.step(1.0) == []
    with pytest.raises(FailedPrecondition, match="/models/a is being imported"):
        coordinator.check_growth(16)
    coordinator.end_import()
    assert coordinator.step(1.0) == [StartJob(job_id, SHORT)]


def test_weights_of_two_models_train_nobody_until_they_are_one_again(coordinator: Coordinator) -> None:
    coordinator.health.can_restore = True
    coordinator.begin_import("/models/a")
    coordinator.cut_off_import("it was cut off")
    job_id = coordinator.jobs.submit(SHORT, "a", 1.0).id
    assert coordinator.step(1.0) == []
    coordinator.is_returning = True
    with pytest.raises(FailedPrecondition, match="a checkpoint is being restored"):
        coordinator.begin_import("/models/b")
    coordinator.restored(dataclasses.replace(coordinator.placement, epoch=2), 0, {}, "restored", 2.0)
    coordinator.is_returning = False
    assert (coordinator.importing, coordinator.health.mixed) == ("", "")
    assert coordinator.step(2.0) == [StartJob(job_id, SHORT)]


def test_a_return_in_the_middle_of_an_import_does_not_end_it(coordinator: Coordinator) -> None:
    """An expert actor without a copy has died: the import is repeated when all are back."""
    coordinator.begin_import("/models/a")
    coordinator.restored(dataclasses.replace(coordinator.placement, epoch=2), 0, {}, "restored", 2.0)
    assert coordinator.importing == "/models/a"


# --- Long runs -----------------------------------------------------------------------------------------------------


def test_an_hour_of_events_takes_a_moment(coordinator: Coordinator) -> None:
    started = time.process_time()
    job_id = start(coordinator, config=JobConfig(steps=3600))
    lost = []
    for second in range(2, 3602):
        beat(coordinator, second, ACTORS if not 1000 <= second < 1020 else ["r0", "e0"])
        coordinator.step_committed(job_id, second - 1, {"loss": 1.0}, second)
        lost += coordinator.step(second)
    coordinator.jobs.finished(job_id, 3602)
    assert [decision.actor_id for decision in lost if isinstance(decision, ActorLost)] == ["e1"]
    assert coordinator.jobs.get(job_id).state is JobState.SUCCEEDED
    assert coordinator.status().ready
    assert time.process_time() - started < 2.0


class CoordinatorMachine(RuleBasedStateMachine):
    """Any order of calls keeps the promises that clients and the edge rely on."""

    jobs = Bundle("jobs")
    LIMITS = Limits(max_queued_jobs=3, max_final_jobs=50, max_events=12, heartbeat_timeout_s=10.0)

    @initialize(redundancy=st.sampled_from([1, 2]))
    def begin(self, redundancy: int) -> None:
        self.now = 0.0
        placement = PLACEMENT if redundancy == 1 else DOUBLE
        self.holders = placement.holders
        self.coordinator = Coordinator(MODEL, placement, self.LIMITS, redundancy=redundancy)
        beat(self.coordinator, 0.0)
        self.started: list[str] = []
        self.running: str | None = None
        """The job whose steps the edge runs: from StartJob to the report that they ended."""
        self.final: dict[str, JobState] = {}
        self.seen: dict[str, list[JobEvent]] = {}

    def carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, StartJob):
                assert self.running is None, "two jobs never run at once"
                assert decision.job_id not in self.started, "a job starts once"
                self.started.append(decision.job_id)
                self.running = decision.job_id
            elif isinstance(decision, StopJob):
                assert decision.job_id in self.started

    @rule(target=jobs, request=st.integers(0, 8))
    def submit(self, request: int) -> object:
        try:
            return self.coordinator.jobs.submit(SHORT, f"q{request}", self.now).id
        except ResourceExhausted:
            assert self.coordinator.status().jobs["queued"] == self.LIMITS.max_queued_jobs
            return multiple()

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        was_final = self.coordinator.jobs.get(job_id).state.is_final
        try:
            self.coordinator.jobs.cancel(job_id, self.now)
            assert not was_final
        except FailedPrecondition:
            assert was_final

    @rule(loss=st.sampled_from([1.0, 1.0, 1.0, math.nan]))
    def commit(self, loss: float) -> None:
        if self.running:
            step = self.coordinator.jobs.get(self.running).step + 1
            self.coordinator.step_committed(self.running, step, {"loss": loss}, self.now)
            if step >= SHORT.steps:
                self.coordinator.jobs.finished(self.running, self.now)
                self.running = None

    @rule(failed=st.booleans())
    def end(self, failed: bool) -> None:
        if self.running:
            if failed:
                self.coordinator.jobs.failed(self.running, "error", self.now)
            else:
                self.coordinator.jobs.stopped(self.running, self.now)
            self.running = None

    @rule(seconds=st.floats(0.1, 8.0), silent=st.sampled_from([(), (), ("e1",), ("r0", "e0")]))
    def pass_time(self, seconds: float, silent: tuple[str, ...]) -> None:
        self.now += seconds
        beat(self.coordinator, self.now, [actor for actor in ACTORS if actor not in silent])
        self.carry_out(self.coordinator.step(self.now))

    @rule(actor=st.sampled_from(ACTORS))
    def lose(self, actor: str) -> None:
        before = self.coordinator.status().placement_epoch
        self.coordinator.actor_lost(actor, self.now, "killed")
        self.carry_out(self.coordinator.step(self.now))
        status = self.coordinator.status()
        assert (status.placement_epoch > before) == (actor != "r0"), "both expert actors hold groups"
        assert actor not in {*status.owners.values(), *(name for held in status.copies.values() for name in held)}
        assert len(status.owners) == 4 or not status.ready
        self.coordinator.actor_seen(report(actor, pid=int(self.now * 1000) + 2), self.now)
        # It comes back with its groups, from wherever they are.
        self.coordinator.placed(Placement(status.placement_epoch + 1, self.holders, 2))

    @invariant()
    def states_are_sound(self) -> None:
        jobs = self.coordinator.jobs.newest_first()
        active = [job for job in jobs if job.state in (JobState.RUNNING, JobState.CANCELLING)]
        assert len(active) <= 1
        for job in jobs:
            assert 0 <= job.step <= job.config.steps
            assert self.final.get(job.id, job.state) is job.state, "a final state is final"
            assert job.state.is_final == (job.ended_s is not None)
            assert (job.state is JobState.FAILED) == bool(job.error)
            if job.state.is_final:
                self.final[job.id] = job.state

    @invariant()
    def events_have_no_gaps(self) -> None:
        for job in self.coordinator.jobs.newest_first():
            seen = self.seen.setdefault(job.id, [])
            new, _ = self.coordinator.jobs.events(job.id, len(seen), 100)
            seen += new
            assert [event.number for event in seen] == list(range(1, job.last_event + 1))
            assert seen[-1].state is job.state


TestCoordinatorMachine = CoordinatorMachine.TestCase
TestCoordinatorMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# --- Checkpoints -------------------------------------------------------------------------------------------------


def saved_job(state: JobState, step: int) -> Job:
    return Job("job-7", "mine", SHORT, state, step, created_s=1.0, started_s=2.0, last_event=40)


def test_a_job_of_before_a_restart_goes_on_after_its_step() -> None:
    coordinator = make()
    coordinator.resumed(12, saved_job(JobState.RUNNING, 2), "resumed version 12", 5.0)
    assert coordinator.status().version == 12
    assert coordinator.jobs.submit(SHORT, "mine", 6.0).id == "job-7"
    assert coordinator.step(6.0) == [StartJob("job-7", SHORT, start_step=2)]
    coordinator.step_committed("job-7", 3, {"loss": 1.0}, 7.0)
    coordinator.jobs.finished("job-7", 8.0)
    assert coordinator.jobs.get("job-7").state is JobState.SUCCEEDED
    assert coordinator.status().version == 13
    events, _ = coordinator.jobs.events("job-7", 0, 100)
    assert [event.number for event in events] == list(range(41, 41 + len(events)))
    assert coordinator.jobs.submit(SHORT, "another", 9.0).id == "job-8"


@pytest.mark.parametrize(
    ("state", "becomes"), [(JobState.SUCCEEDED, JobState.SUCCEEDED), (JobState.CANCELLING, JobState.CANCELLED)]
)
def test_a_job_that_had_ended_is_known_and_not_started(state: JobState, becomes: JobState) -> None:
    coordinator = make()
    coordinator.resumed(12, saved_job(state, 2), "resumed version 12", 5.0)
    assert coordinator.step(6.0) == []
    assert coordinator.jobs.submit(SHORT, "mine", 6.0).state is becomes


def test_lost_groups_come_back_and_steps_run_again() -> None:
    coordinator = make()
    coordinator.health.can_restore = True
    job = start(coordinator)
    commit(coordinator, job, 2)
    coordinator.actor_lost("e1", 3.0, "killed")
    assert coordinator.jobs.get(job).state is JobState.RUNNING
    status = coordinator.status()
    assert not status.ready
    assert status.message == "restoring groups 2, 3 from the last checkpoint"
    placement = spread(8, 2, SLOTS[:1], epoch=coordinator.placement.epoch + 1)
    coordinator.restored(placement, 1, {job: 1}, "restored version 1", 4.0)
    assert coordinator.status().ready
    assert (coordinator.jobs.get(job).step, coordinator.status().version) == (1, 1)
    for step in (2, 3):
        coordinator.step_committed(job, step, {"loss": 1.0}, 5.0)
    coordinator.jobs.finished(job, 6.0)
    events, _ = coordinator.jobs.events(job, 0, 100)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert [event.step for event in events if event.kind == "step"] == [1, 2, 2, 3]
    assert [event.message for event in events if event.kind == "note"][-1] == "restored version 1"
    assert coordinator.status().version == 3


def test_a_saved_job_survives_json() -> None:
    job = saved_job(JobState.RUNNING, 2)
    assert job_of_dict(json.loads(json.dumps(job_to_dict(job))), "test") == job
    with pytest.raises(InvalidInput, match="test: holds a job that cannot be read"):
        job_of_dict({"id": "job-1"}, "test")


def test_status_tells_how_old_the_experts_of_the_last_step_were(coordinator: Coordinator) -> None:
    job_id = coordinator.jobs.submit(SHORT, "r", 0.0).id
    coordinator.step(0.0)
    coordinator.step_committed(job_id, 1, {"loss": 1.0, "staleness_mean": 0.5, "staleness_max": 2.0}, 1.0)
    assert (coordinator.status().staleness_mean, coordinator.status().staleness_max) == (0.5, 2)
    coordinator.step_committed(job_id, 2, {"loss": 1.0}, 2.0)
    assert (coordinator.status().staleness_mean, coordinator.status().staleness_max) == (0.0, 0)
