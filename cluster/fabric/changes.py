"""Changes of placement carried out: groups arrive in the background, then everybody switches between two steps.

One change at a time. Deaths may come at any moment: they change the placement at once, and a change that is under way
then fails and is asked for again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from actors.errors import MoeClusterError
from actors.values import Placement
from cluster.backend import Rebalance
from cluster.control.coordinator import Coordinator
from cluster.control.ledger import Kind
from cluster.control.rebalancing import Proposal, Stage, named
from cluster.errors import FailedPrecondition, Unavailable
from cluster.fabric.calls import call
from cluster.fabric.contacts import ExpertContact
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.options import ROUTER
from cluster.placement.placement import ActorSlot

logger = logging.getLogger(__name__)

TURN_LOOK_S = 0.05
NOTICED_S = 3.0
"""An error may come before the death that is behind it is known."""
LEFT_OFF_S = 10.0
"""For an actor to give up a group that is on its way to it."""

Report = Callable[[float, str], None]
"""(share that is done, what is being done); may raise to stop between two moves."""


def _silent(share: float, message: str) -> None: ...


class Changes:
    def __init__(self, state: Guarded, crew: Crew) -> None:
        self._state, self._crew = state, crew
        self._turn = threading.Lock()
        self._what = ""

    # -- asked for ----------------------------------------------------------------------------------------------------

    def begin(self, what: str) -> None:
        """`FailedPrecondition` while another change is under way. `end` from any thread."""
        if not self.try_begin(what):
            raise FailedPrecondition(f"{self._what} is under way; wait until it has ended")

    def try_begin(self, what: str) -> bool:
        if not self._turn.acquire(blocking=False):
            return False
        self._what = what
        return True

    def begin_in_turn(self, what: str, deadline: float, look: Callable[[], None]) -> None:
        """Waits for another change to end, and calls `look` meanwhile, which may raise. `FailedPrecondition` if that
        is not before the deadline (monotonic)."""
        while not self.try_begin(what):
            look()
            if time.monotonic() >= deadline:
                raise FailedPrecondition(f"{self._what} has not ended in time")
            time.sleep(TURN_LOOK_S)

    def end(self) -> None:
        self._turn.release()

    @property
    def is_under_way(self) -> bool:
        return self._turn.locked()

    def rebalance(self, dry_run: bool, timeout_s: float) -> Rebalance:
        deadline = time.monotonic() + timeout_s
        self.begin("a rebalance")
        try:
            with self._state.reading() as coordinator:
                proposal = coordinator.rebalance(coordinator.actors())
                epoch = coordinator.placement.epoch
            if dry_run or not proposal.stages:
                return proposal.report(epoch, done=False)
            with self.priced("rebalance", f"{len(proposal.moves)} groups") as price:
                stall_s = price(self.carry_out(proposal, deadline))
            return proposal.report(proposal.target.epoch, done=True, stall_s=stall_s)
        finally:
            self.end()

    def move_to(self, actors: Sequence[ActorSlot], deadline: float, report: Report) -> float:
        """All groups to exactly these actors. -> longest wait of a step, in seconds."""
        with self._state.reading() as coordinator:
            proposal = coordinator.rebalance(actors)
        return self.carry_out(proposal, deadline, report)

    def carry_out(self, proposal: Proposal, deadline: float, report: Report = _silent) -> float:
        """-> longest wait of a step for a switch, in seconds."""
        total, done, waited = len(proposal.moves), 0, [0.0]
        for stage in proposal.stages:
            report(done / max(total, 1), f"moved {done} of {total} expert groups")
            waited.append(self._carry_out_stage(stage, deadline))
            done += len(stage.copies)
        report(1.0, f"moved {done} of {total} expert groups")
        return max(waited)

    @contextmanager
    def priced(self, kind: Kind, subject: str) -> Iterator[Callable[[float], float]]:
        """An entry of the ledger around a change; inside, its stall in seconds is told to what is given."""
        with self._state.reading() as coordinator:
            number = coordinator.ledger.open(kind, subject, time.time())

        def price(stall_s: float) -> float:
            with self._state.reading() as coordinator:
                coordinator.ledger.add(number, stall_s=stall_s)
            return stall_s

        try:
            yield price
        finally:
            with self._state.reading() as coordinator:
                coordinator.ledger.close(number, time.time())

    def settle(self, deadline: float) -> None:
        """The router uses the placement of now: a death may have changed it a moment ago."""
        with self._state.reading() as coordinator:
            placement = coordinator.placement
        self._adopt(placement, deadline)

    # -- a death ------------------------------------------------------------------------------------------------------

    def without(self, gone: Sequence[str]) -> tuple[Placement, list[ExpertContact]]:
        """The placement to go on with, asked by a router whose links to these actors broke.

        `Unavailable` if nobody else holds some of their groups.
        """
        for name in gone:
            self.bury(name, "its links broke")
        with self._state.reading() as coordinator:
            placement = coordinator.placement
        if placement.missing:
            raise Unavailable(f"no actor holds {named(placement.missing)} any more")
        return placement, self._crew.contacts(placement)

    def bury(self, name: str, reason: str, silent_s: float = 0.0) -> None:
        """Dead for certain from now on: a process that only lost its links must not come back with old weights."""
        pid = self._crew.pid_of(name)
        with self._state.changing() as coordinator:
            coordinator.actor_lost(name, time.time(), reason, silent_s=silent_s, pid=pid)
        self._crew.end([name])

    def switch(self, placement: Placement) -> None:
        """Without waiting: in the middle of a step the router notices by itself; between steps it need not."""
        with suppress(Unavailable):  # whoever leads next is told then
            self._crew.router.adopt.remote(placement, self._crew.contacts(placement))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _carry_out_stage(self, stage: Stage, deadline: float) -> float:
        with self._state.reading() as coordinator:
            before = coordinator.placement
        self._adopt(before, deadline)  # a death may have changed it a moment ago
        arriving: list[tuple[int, str, Any]] = []
        try:
            for move in stage.copies:
                owner = self._crew.contact(before.owner(move.group))
                ref = self._crew.handle(move.target).arrive.remote(move.group, owner, _remaining(deadline))
                arriving.append((move.group, move.target, ref))
            for _, target, ref in arriving:
                call(target, ref, _remaining(deadline))
            with self._state.changing() as coordinator:
                coordinator.begin_switch(stage.placement)
            return self._switch_over(stage.placement, deadline)
        except BaseException:
            self._take_back(arriving)
            raise

    def _switch_over(self, placement: Placement, deadline: float) -> float:
        """Everybody uses it. A death meanwhile leaves another one of what has come and what was there: they use that
        then, and the change has failed."""
        waited = self._adopt_as_deaths_leave_it(deadline)
        with self._state.reading() as coordinator:
            left = coordinator.placement
        if left != placement:
            raise Unavailable("an actor died meanwhile; try again")
        return waited

    def _adopt_as_deaths_leave_it(self, deadline: float) -> float:
        while True:
            with self._state.reading() as coordinator:
                placement = coordinator.placement
            if placement.missing:
                raise Unavailable(f"no actor holds {named(placement.missing)} any more")
            try:
                waited = self._adopt(placement, deadline)
            except MoeClusterError:  # a death may be behind it that is not known here yet
                if not self._state.wait_for(partial(_is_other, placement), NOTICED_S):
                    raise
                continue
            with self._state.changing() as coordinator:
                coordinator.end_switch(placement)
            return waited

    def _adopt(self, placement: Placement, deadline: float) -> float:
        ref = self._crew.router.adopt.remote(placement, self._crew.contacts(placement))
        waited: float = call(ROUTER, ref, _remaining(deadline))
        return waited

    def _take_back(self, arriving: Sequence[tuple[int, str, Any]]) -> None:
        """What has come and is not used is given up."""
        with self._state.changing() as coordinator:
            coordinator.take_back()
            placement = coordinator.placement
        if not placement.missing:
            self.switch(placement)
        self._leave_off(arriving)

    def _leave_off(self, arriving: Sequence[tuple[int, str, Any]]) -> None:
        """Waited for: what is still on its way to an actor then would meet the next try to bring the group there."""
        deadline = time.monotonic() + LEFT_OFF_S
        refs: list[tuple[int, str, Any]] = []
        for group, target, _ in arriving:
            with suppress(Unavailable):  # it is gone, and the group with it
                refs.append((group, target, self._crew.handle(target).leave_off.remote([group])))
        for group, target, ref in refs:
            try:
                call(target, ref, _remaining(deadline))
            except MoeClusterError as error:
                logger.warning("%s was not told to give up group %d: %s", target, group, error)


def _is_other(placement: Placement, coordinator: Coordinator) -> bool:
    return coordinator.placement != placement


def _remaining(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())
