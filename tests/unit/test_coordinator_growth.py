"""What the coordinator makes of a growth that the router has carried out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.errors import InvalidInput
from actors.expert.births import Births, copies_in_turn
from actors.values import Growth, Placement
from cluster.control.coordinator import Coordinator
from cluster.control.decisions import ActorLost
from cluster.errors import FailedPrecondition
from tests.unit.test_coordinator import DOUBLE, MODEL, PLACEMENT, beat, commit_loads, make, make_double, start


def grown(placement: Placement) -> Placement:
    """Twice the groups, as a router gives it back."""
    return Births(Growth(16), copies_in_turn(4, 4)).placed(placement)


def test_status_load_and_job_go_on_with_the_new_number() -> None:
    coordinator = make()
    job_id = start(coordinator)
    commit_loads(coordinator, job_id, [[[1] * 8] * 2])
    assert not coordinator.grown(grown(PLACEMENT), 1600, 200.0)
    status = coordinator.status()
    assert (status.num_experts, status.num_parameters, status.placement_epoch) == (16, 1600, PLACEMENT.epoch + 1)
    assert (len(status.owners), status.load_LE, status.ready) == (8, (), True)
    assert {actor.id: actor.groups for actor in status.actors}["e0"] == (0, 1, 4, 5)
    coordinator.step_committed(job_id, 2, {"loss": 1.0}, 201.0, [[2] * 16] * 2)
    assert coordinator.status().load_LE == ((2,) * 16,) * 2
    events, job = coordinator.jobs.events(job_id, 0, 100)
    assert job.step == 2
    assert "the model has 16 experts a layer now" in [event.message for event in events]


def test_a_report_that_a_growth_overtook_counts_as_a_step_without_its_load() -> None:
    coordinator = make()
    job_id = start(coordinator)
    coordinator.check_growth(16)
    coordinator.step_committed(job_id, 1, {"loss": 1.0}, 2.0, [[1] * 16] * 2)
    coordinator.grown(grown(PLACEMENT), 1600, 2.0)
    coordinator.step_committed(job_id, 2, {"loss": 1.0}, 3.0, [[1] * 8] * 2)
    assert coordinator.jobs.get(job_id).step == 2
    assert coordinator.status().load_LE == ()
    with pytest.raises(InvalidInput, match="2 rows of 16 counts"):
        coordinator.step_committed(job_id, 3, {"loss": 1.0}, 3.0, [[1] * 9] * 2)


def test_who_died_while_it_grew_is_left_out() -> None:
    coordinator = make_double()
    coordinator.actor_lost("e1", 5.0, "killed")
    epoch = coordinator.placement.epoch
    assert coordinator.grown(grown(DOUBLE), 1600, 6.0), "the router must be told"
    assert coordinator.placement.holders == (("e0",),) * 8
    assert coordinator.placement.epoch > max(epoch, grown(DOUBLE).epoch)
    assert coordinator.status().num_experts == 16
    lost = next(decision for decision in coordinator.step(7.0) if isinstance(decision, ActorLost))
    assert lost.placement != coordinator.placement


def test_what_speaks_against_it() -> None:
    coordinator = Coordinator(MODEL, PLACEMENT, max_groups=3)
    beat(coordinator, 0.0, ("r0", "e0"))
    with pytest.raises(FailedPrecondition, match="e1, which does not answer"):
        coordinator.check_growth(16)
    beat(coordinator, 0.0)
    with pytest.raises(InvalidInput, match=r"raise experts\.max_groups"):
        coordinator.check_growth(16)
    coordinator.check_growth(12)
    coordinator.actor_lost("e1", 1.0, "killed")
    with pytest.raises(FailedPrecondition, match="no actor holds groups 2, 3"):
        coordinator.check_growth(12)


def test_a_return_to_a_checkpoint_may_undo_it() -> None:
    coordinator = make()
    coordinator.grown(grown(PLACEMENT), 1600, 1.0)
    coordinator.restored(replace(PLACEMENT, epoch=9), 3, {}, "restored", 2.0, num_parameters=1000)
    status = coordinator.status()
    assert (status.num_experts, status.num_parameters, status.version) == (8, 1000, 3)
