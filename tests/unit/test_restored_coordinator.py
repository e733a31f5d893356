"""A coordinator that takes the place of a dead one: what it knows, and what it does next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.backend import Job, JobState, Operation, OperationState
from cluster.config import JobConfig
from cluster.control.coordinator import Coordinator
from cluster.control.decisions import ActorLost, Decision, StartJob
from cluster.control.ledger import Entry
from cluster.control.past import EVENTS_UNKNOWN, Past, Standing, StepTold
from cluster.errors import AlreadyExists
from tests.unit.test_coordinator import DOUBLE, MODEL, PLACEMENT, beat, report

CONFIG = JobConfig(steps=40)
DONE = Job("job-1", "a", JobConfig(steps=3), JobState.SUCCEEDED, 3, 1.0, 2.0, 3.0, last_event=9)
RUNNING = Job("job-2", "b", CONFIG, JobState.RUNNING, 5, 1.5, 4.0, last_event=21)
QUEUED = Job("job-3", "c", CONFIG, JobState.QUEUED, 0, 5.0, last_event=1)
PAST = Past(jobs=(DONE, RUNNING, QUEUED))
THERE = Standing(20, is_pristine=False, can_restore=False, has_router=True, job=RUNNING, step=17)
"""The router has gone on for some steps since the journal was written."""
ALONE = Standing(20, is_pristine=False, can_restore=False, has_router=False)


def restored(past: Past = PAST, standing: Standing = THERE, *, redundancy: int = 1) -> Coordinator:
    placement = PLACEMENT if redundancy == 1 else DOUBLE
    return Coordinator.restored_from(MODEL, placement, past, standing, 100.0, 98.0, redundancy=redundancy)


def next_job(coordinator: Coordinator) -> Decision:
    """What is decided when all actors have reported."""
    beat(coordinator, 101.0)
    (decision,) = coordinator.step(101.0)
    return decision


def test_the_job_goes_on_after_the_last_step_that_the_router_did() -> None:
    coordinator = restored()
    assert coordinator.step(100.5) == [], "nobody has reported yet"
    assert next_job(coordinator) == StartJob("job-2", CONFIG, 17)
    assert coordinator.jobs.get("job-2").state is JobState.RUNNING
    assert coordinator.status().version == 20
    coordinator.step_committed("job-2", 18, {"loss": 1.0}, 102.0)
    assert coordinator.status().version == 21


def test_numbers_of_events_rise_over_all_that_were_told() -> None:
    coordinator = restored()
    events, job = coordinator.jobs.events("job-2", 21 + 4 * 12, 100)
    assert [event.number for event in events] == [job.last_event]
    assert job.last_event > RUNNING.last_event + EVENTS_UNKNOWN
    assert "died and is back; goes on after step 17" in events[0].message


def test_steps_that_nobody_may_have_heard_of_are_told() -> None:
    reports = (StepTold(96.0, 0.5, {"loss": 2.0}), StepTold(98.5, 0.5, {"loss": 1.5}))
    coordinator = restored(standing=replace(THERE, reports=reports))
    events, job = coordinator.jobs.events("job-2", 0, 100)
    steps = [event for event in events if event.kind == "step"]
    assert [(event.step, event.metrics["loss"], event.time_s) for event in steps] == [(16, 2.0, 96.0), (17, 1.5, 98.5)]
    assert job.step == 17


def test_request_ids_and_numbers_go_on() -> None:
    coordinator = restored()
    assert coordinator.jobs.submit(CONFIG, "c", 102.0).id == "job-3"
    with pytest.raises(AlreadyExists):
        coordinator.jobs.submit(JobConfig(steps=7), "b", 102.0)
    assert coordinator.jobs.submit(CONFIG, "new", 102.0).id == "job-4"
    assert [job.id for job in coordinator.jobs.newest_first()] == ["job-4", "job-3", "job-2", "job-1"]
    assert coordinator.jobs.get("job-1") == DONE
    assert coordinator.jobs.get("job-3") == QUEUED


def test_a_job_that_was_about_to_begin_begins() -> None:
    """The router's steps are still those of the job before."""
    began = replace(RUNNING, step=0)
    standing = replace(THERE, job=DONE, step=3)
    assert next_job(restored(Past(jobs=(DONE, began, QUEUED)), standing)) == StartJob("job-2", CONFIG, 0)


def test_a_job_that_began_after_the_last_word_of_the_journal() -> None:
    queued = replace(RUNNING, state=JobState.QUEUED, step=0)
    assert next_job(restored(Past(jobs=(DONE, queued)))) == StartJob("job-2", CONFIG, 17)
    assert next_job(restored(Past(jobs=(DONE,)))) == StartJob("job-2", CONFIG, 17), "not even submitted by then"
    assert next_job(restored(Past())) == StartJob("job-2", CONFIG, 17), "no journal at all"


def test_all_steps_done_but_not_told() -> None:
    coordinator = restored(standing=replace(THERE, step=40))
    assert next_job(coordinator) == StartJob("job-2", CONFIG, 40)
    coordinator.jobs.finished("job-2", 102.0)
    assert coordinator.jobs.get("job-2").state is JobState.SUCCEEDED


def test_a_job_that_was_being_cancelled_is_cancelled() -> None:
    coordinator = restored(Past(jobs=(replace(RUNNING, state=JobState.CANCELLING), QUEUED)))
    assert coordinator.jobs.get("job-2").state is JobState.CANCELLED
    assert next_job(coordinator) == StartJob("job-3", CONFIG, 0)


def test_a_job_whose_steps_no_actor_has_fails_and_says_so() -> None:
    coordinator = restored(standing=replace(THERE, job=None, step=0))
    assert coordinator.jobs.get("job-2").state is JobState.FAILED
    assert "no actor has its steps" in coordinator.jobs.get("job-2").error
    assert next_job(coordinator) == StartJob("job-3", CONFIG, 0)


def test_with_the_router_dead_too_the_job_waits_for_the_checkpoint() -> None:
    coordinator = restored(standing=replace(ALONE, can_restore=True))
    coordinator.actor_seen(report("r0", pid=7), 100.0)
    coordinator.actor_lost("r0", 100.0, "killed")
    beat(coordinator, 101.0, ("e0", "e1"))
    assert [type(decision) for decision in coordinator.step(101.0)] == [ActorLost]
    assert coordinator.health.can_return
    waiting = coordinator.jobs.waiting()
    assert waiting is not None
    assert waiting.id == "job-2"
    coordinator.restored(replace(PLACEMENT, epoch=5), 18, {"job-2": 15}, "back", 102.0)
    coordinator.actor_seen(report("r0", pid=8), 103.0)
    assert coordinator.step(103.0) == [StartJob("job-2", CONFIG, 15)]
    assert coordinator.status().version == 18


@pytest.mark.parametrize(("steps", "start"), [({"job-2": 15}, 15), ({}, 0)])
def test_the_checkpoint_knows_steps_of_which_the_journal_knows_none(steps: dict[str, int], start: int) -> None:
    """It is written when a job begins, and then not at every step."""
    begun = Past(jobs=(DONE, replace(RUNNING, step=0)))
    coordinator = restored(begun, replace(ALONE, can_restore=True))
    waiting = coordinator.jobs.waiting()
    assert waiting is not None
    assert waiting.id == "job-2"
    coordinator.is_returning = True
    beat(coordinator, 101.0)
    assert coordinator.step(101.0) == [], "all are there again, and nobody knows its step yet"
    coordinator.restored(replace(PLACEMENT, epoch=5), 18, steps, "back", 102.0)
    coordinator.is_returning = False
    assert next_job(coordinator) == StartJob("job-2", CONFIG, start)


def test_a_checkpoint_of_another_job_fails_the_one_that_waits() -> None:
    coordinator = restored(standing=replace(ALONE, can_restore=True))
    coordinator.restored(replace(PLACEMENT, epoch=5), 3, {}, "back", 102.0)
    assert coordinator.jobs.get("job-2").state is JobState.FAILED
    assert "not of this job" in coordinator.jobs.get("job-2").error
    assert coordinator.jobs.get("job-3").state is JobState.QUEUED


def test_with_the_router_dead_too_and_no_checkpoint_the_job_fails() -> None:
    coordinator = restored(standing=ALONE)
    assert coordinator.jobs.get("job-2").state is JobState.FAILED
    assert "there is no checkpoint" in coordinator.jobs.get("job-2").error


def test_who_watches_a_job_that_was_over_is_told_of_its_end() -> None:
    for coordinator in (restored(), started(PAST, RUNNING)):
        events, job = coordinator.jobs.events("job-1", 0, 10)
        assert job == DONE
        assert [(event.number, event.kind, event.state) for event in events] == [(DONE.last_event, "state", DONE.state)]


def test_operations_that_were_under_way_have_failed() -> None:
    ended = Operation("operation-1", "x", "scale_experts", OperationState.SUCCEEDED, 2, 1.0, "", 1.0, 2.0)
    under_way = Operation("operation-2", "y", "scale_experts", OperationState.CANCELLING, 3, 0.5, "moved", 3.0)
    coordinator = restored(Past(operations=(ended, under_way)))
    assert coordinator.operations.get("operation-1") == ended
    failed = coordinator.operations.get("operation-2")
    assert (failed.state, failed.ended_s) == (OperationState.FAILED, 100.0)
    assert "the coordinator died" in failed.error
    assert coordinator.operations.start("scale_experts", 3, "z", 101.0).id == "operation-3"


def test_the_ledger_goes_on_and_prices_the_restart() -> None:
    over = Entry(1, "actor_death", "e7", 10.0, 10.1, 11.0)
    open_ = Entry(2, "actor_death", "e8", 97.0, 97.1)
    reports = tuple(StepTold(95.0 + i, 1.0, {"loss": 1.0}) for i in range(3))
    standing = replace(THERE, reports=reports)
    coordinator = restored(Past(PAST.jobs, entries=(over, open_)), standing)
    assert isinstance(next_job(coordinator), StartJob)
    coordinator.step_committed("job-2", 18, {"loss": 1.0}, 102.0)
    first, second, third = coordinator.ledger.entries()
    assert first == over
    assert second.recovered_s == 101.0
    assert (third.number, third.kind, third.subject) == (3, "coordinator_restart", "coordinator")
    assert (third.started_s, third.detected_s, third.recovered_s) == (98.0, 100.0, 101.0)
    assert third.stall_s == pytest.approx(102.0 - 97.0 - 1.0)


def test_an_actor_that_died_with_it_is_replaced_by_its_copies() -> None:
    coordinator = restored(redundancy=2)
    coordinator.actor_lost("e0", 100.0, "died while the coordinator was away")
    beat(coordinator, 101.0, ("r0", "e1"))
    lost, start = coordinator.step(101.0)
    assert isinstance(lost, ActorLost)
    assert lost.placement is not None
    assert lost.placement.actors == ("e1",)
    assert start == StartJob("job-2", CONFIG, 17)
    assert [entry.kind for entry in coordinator.ledger.entries()] == ["coordinator_restart", "actor_death"]


def test_what_a_coordinator_remembers_brings_it_back() -> None:
    first = restored()
    again = restored(first.past, replace(THERE, step=18, version=21))
    assert next_job(again) == StartJob("job-2", CONFIG, 18)
    assert [entry.number for entry in again.ledger.entries()] == [1, 2]
    assert again.jobs.get("job-2").last_event > first.jobs.get("job-2").last_event


# After a restart of everything.


def started(past: Past, saved: Job | None) -> Coordinator:
    coordinator = Coordinator(MODEL, PLACEMENT)
    if saved:
        coordinator.resumed(20, saved, "resumed version 20", 100.0, past)
    else:
        coordinator.recalled(past, None, "", 100.0)
    return coordinator


def test_queued_jobs_survive_a_restart_of_everything() -> None:
    coordinator = started(PAST, replace(RUNNING, step=15, last_event=19))
    assert next_job(coordinator) == StartJob("job-2", CONFIG, 15)
    assert coordinator.jobs.get("job-1") == DONE
    assert coordinator.jobs.get("job-3") == QUEUED
    assert coordinator.jobs.get("job-2").last_event > RUNNING.last_event


def test_a_job_that_is_in_no_checkpoint_begins_anew() -> None:
    for saved in (None, DONE):
        coordinator = started(PAST, saved)
        assert next_job(coordinator) == StartJob("job-2", CONFIG, 0)
        events, _ = coordinator.jobs.events("job-2", 0, 10)
        assert "begins anew" in events[0].message


def test_a_job_that_was_cancelled_after_the_checkpoint_stays_cancelled() -> None:
    for state in (JobState.CANCELLED, JobState.CANCELLING):
        coordinator = started(Past(jobs=(replace(RUNNING, state=state), QUEUED)), replace(RUNNING, step=4))
        assert coordinator.jobs.get("job-2").state is JobState.CANCELLED
        assert next_job(coordinator) == StartJob("job-3", CONFIG, 0)


def test_a_job_whose_last_steps_are_in_no_checkpoint_does_them_again() -> None:
    ended = replace(RUNNING, state=JobState.SUCCEEDED, step=40)
    coordinator = started(Past(jobs=(ended,)), replace(RUNNING, step=30))
    assert next_job(coordinator) == StartJob("job-2", CONFIG, 30)


def test_a_job_whose_experts_died_with_it_and_are_in_no_checkpoint_fails() -> None:
    coordinator = restored()
    coordinator.actor_lost("e0", 100.0, "died while the coordinator was away")
    beat(coordinator, 101.0, ("r0", "e1"))
    assert not any(isinstance(decision, StartJob) for decision in coordinator.step(101.0))
    assert coordinator.jobs.get("job-2").state is JobState.FAILED
    assert "no actor holds" in coordinator.jobs.get("job-2").error


def test_a_job_whose_experts_died_with_it_waits_for_the_checkpoint() -> None:
    coordinator = restored(standing=replace(THERE, can_restore=True))
    coordinator.actor_lost("e0", 100.0, "died while the coordinator was away")
    beat(coordinator, 101.0, ("r0", "e1"))
    coordinator.step(101.0)
    assert coordinator.health.can_return
    coordinator.restored(replace(PLACEMENT, epoch=5), 18, {"job-2": 15}, "back", 102.0)
    beat(coordinator, 103.0)
    assert coordinator.step(103.0) == [StartJob("job-2", CONFIG, 15)]
