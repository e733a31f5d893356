"""What the coordinator says of the cluster as a whole, and of what becomes of what a lost actor had."""

from __future__ import annotations

import pytest

from cluster.backend import ActorStatus
from cluster.control.fleet import Fleet
from cluster.control.health import Health
from cluster.placement.placement import ActorSlot, spread

SLOTS = (ActorSlot("e0", "n0"), ActorSlot("e1", "n1"))


def health(redundancy: int = 1, routers: int = 1) -> tuple[Health, Fleet]:
    fleet = Fleet(spread(8, 2, SLOTS, redundancy=redundancy), 10.0)
    for name in ("e0", "e1", *(f"r{i}" for i in range(routers))):
        role = "router" if name.startswith("r") else "expert"
        fleet.members.seen(ActorStatus(name, role, "n0", 1, "ready", device="cpu", version=0), 0.0)
    return Health(fleet, redundancy), fleet


def kill(fleet: Fleet, actor: str) -> None:
    fleet.members.bury(actor)
    fleet.members.lose(actor)
    fleet.lose(actor)


@pytest.mark.parametrize("can_restore", [True, False])
def test_copies_take_over_and_the_cluster_is_not_whole(can_restore: bool) -> None:
    found, fleet = health(redundancy=2)
    assert (found.is_ready, found.is_whole, found.message()) == (True, True, "")
    found.can_restore = can_restore
    kill(fleet, "e1")
    assert found.after_loss("expert", (0, 1)) == "; copies took over groups 0, 1"
    assert (found.is_ready, found.is_whole, found.can_return) == (True, False, False)
    assert found.message() == "degraded: groups 0, 1, 2, 3 have fewer than 2 holders"


def test_groups_that_nobody_holds_come_back_from_a_checkpoint_alone() -> None:
    found, fleet = health()
    groups = fleet.placement.held_by("e1")
    kill(fleet, "e1")
    assert found.missing_of(range(4)) == list(groups)
    assert (found.after_loss("expert", groups), found.can_return, found.is_ready) == ("", False, False)
    found.can_restore, found.notice = True, "a checkpoint is read"
    assert found.after_loss("expert", groups).endswith("any more, the last checkpoint brings them back")
    assert found.can_return
    assert found.message().endswith("from the last checkpoint: a checkpoint is read")


def test_a_router_comes_back_while_its_weights_are_those_of_a_file() -> None:
    found, fleet = health()
    kill(fleet, "r0")
    assert (found.is_router_lost, found.is_ready, found.can_return) == (True, False, True)
    assert (found.after_loss("router", ()), found.message()) == ("", "the router died; bringing it back")
    found.is_pristine = False
    assert not found.can_return
    assert "in no checkpoint" in found.message()
    found.can_restore = True
    assert found.after_loss("router", ()) == "; the last checkpoint brings it back"


def test_other_routers_go_on() -> None:
    found, fleet = health(routers=2)
    found.routers_wanted = 2
    kill(fleet, "r1")
    assert found.after_loss("router", ()) == "; the other routers go on"
    assert (found.is_router_lost, found.is_ready, found.is_whole) == (False, True, False)
    assert found.message() == "degraded: 1 of 2 routers are ready"


def test_weights_of_two_models_come_back_from_a_checkpoint_or_another_import() -> None:
    found, fleet = health()
    found.mixed, found.is_pristine = "the import of m was cut off", False
    assert (found.is_ready, found.is_whole, found.can_return) == (False, False, False)
    assert found.message() == "the import of m was cut off: weights are of two models; import it again"
    found.can_restore = True
    assert found.can_return
    assert found.message() == "the import of m was cut off: weights are of two models; restoring the last checkpoint"
    kill(fleet, "r0")
    assert found.message() == "the router died; bringing it back"
