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
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.errors import LinkTimeout, MoeClusterError, StepAborted
from actors.values import Placement
from cluster.backend import Rebalance
from cluster.control.coordinator import Coordinator
from cluster.control.ledger import Kind
from cluster.control.rebalancing import Proposal, Stage, named
from cluster.errors import FailedPrecondition, Unavailable
from cluster.fabric.calls import call, ended, is_death
from cluster.fabric.contacts import ExpertContact
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.options import ROUTER
from cluster.placement.placement import ActorSlot

logger = logging.getLogger(__name__)

TURN_LOOK_S = 0.05
SWITCH_TIMEOUT_S = 3600.0
"""Last resort, as of a step: whoever leads takes it in its turn. It is not asked for once the change's time is up, and
from then on it is not known what is in use until the router says so."""
PROMOTED_S = 600.0
"""For another router to lead, as long as one lives that might."""
LOOK_S = 0.2
ANSWER_S = 10.0
"""Of an actor that has nothing to wait for."""
NOTICED_S = 3.0
"""An error may come before the death that is behind it is known."""
LEFT_OFF_S = 10.0
"""For an actor to give up a group that is on its way to it."""

Report = Callable[[float, str], None]
"""(share that is done, what is being done); may raise to stop between two moves."""


@dataclass(frozen=True)
class _InUse:
    placement: Placement
    waited_s: float
    """Of steps, for it."""


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
        self._adopt(placement, _remaining(deadline))

    # -- a death ------------------------------------------------------------------------------------------------------

    def without(self, gone: Sequence[str], used: Placement) -> tuple[Placement, list[ExpertContact]]:
        """The placement to go on with, asked by a router, which uses another, since its links to these actors broke.

        `Unavailable` if nobody else holds some of their groups.
        """
        self._in_use(used)
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

    def tell_of_a_death(self) -> None:
        """Who leads, as `switch`; where a change is under way, it tells it, and learns by that what is in use."""
        with self._state.reading() as coordinator:
            placement, is_told = coordinator.placement, coordinator.is_unsettled
        if not placement.missing and not is_told:
            self.switch(placement)

    def switch(self, placement: Placement) -> None:
        """Without waiting: in the middle of a step the router notices by itself; between steps it need not."""
        with suppress(Unavailable):  # whoever leads next is told then
            self._crew.router.adopt.remote(placement, self._crew.contacts(placement))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _carry_out_stage(self, stage: Stage, deadline: float) -> float:
        with self._state.reading() as coordinator:
            before = coordinator.placement
        if before.epoch >= stage.placement.epoch:
            raise Unavailable("an actor died meanwhile; try again")
        self._adopt(before, _remaining(deadline))  # a death may have changed it a moment ago
        arriving: list[tuple[int, str, Any]] = []
        with self._state.changing() as coordinator:
            coordinator.begin_switch(stage.placement)
        try:
            try:
                self._bring(stage, before, arriving, deadline)
                with self._state.changing() as coordinator:
                    coordinator.switch()
            except MoeClusterError:
                self._use_what_deaths_left()
                raise
            left = self._use()
            if left.placement != stage.placement:
                raise Unavailable("an actor died meanwhile; try again")
            return left.waited_s
        except BaseException:
            self._give_up(arriving)
            raise

    def _bring(self, stage: Stage, before: Placement, arriving: list[tuple[int, str, Any]], deadline: float) -> None:
        """All copies of the stage to where they are to be. `arriving`: is told which were begun."""
        for move in stage.copies:
            owner = self._crew.contact(before.owner(move.group))
            ref = self._crew.handle(move.target).arrive.remote(move.group, owner, _remaining(deadline))
            arriving.append((move.group, move.target, ref))
        todo = list(arriving)
        while todo:
            come = ended([ref for _, _, ref in todo], min(LOOK_S, _remaining(deadline)))
            failure = self._note([each for each in todo if each[2] in come])
            if failure is not None:
                raise failure
            todo = [each for each in todo if each[2] not in come]
            with self._state.reading() as coordinator:
                if coordinator.is_unsettled:
                    raise Unavailable("an actor died meanwhile; try again")
            if time.monotonic() >= deadline:
                raise LinkTimeout("no time was left to use what has come", peer=ROUTER)

    def _note(self, come: Sequence[tuple[int, str, Any]]) -> MoeClusterError | None:
        """Of what has ended. -> an error, if one of them has failed."""
        failure: MoeClusterError | None = None
        for group, target, ref in come:
            try:
                call(target, ref, ANSWER_S)
            except MoeClusterError as error:
                failure = failure or error
            else:
                with self._state.changing() as coordinator:
                    coordinator.came(group, target)
        return failure

    def _use_what_deaths_left(self) -> None:
        """Copies that have come may be the only ones left of their groups."""
        if self._state.wait_for(lambda coordinator: coordinator.is_unsettled, NOTICED_S):
            with suppress(MoeClusterError):
                self._use()

    def _use(self) -> _InUse:
        """Everybody uses the placement of now: that of the change, or what deaths meanwhile leave of what was there and
        what has come. -> it."""
        try:
            while True:
                with self._state.reading() as coordinator:
                    placement = coordinator.placement
                if placement.missing:
                    raise Unavailable(f"no actor holds {named(placement.missing)} any more")
                if (told := self._told(placement)) is None:
                    continue
                used, waited_s = told
                with self._state.changing() as coordinator:
                    if coordinator.placement.epoch == used.epoch:  # else another death: it is told what that leaves
                        coordinator.in_use(used)
                        return _InUse(used, waited_s)
        except MoeClusterError:
            self._find_out()
            raise

    def _find_out(self) -> None:
        """What is in use, after an error: only who leads knows. If nobody does any more, what the actors hold tells
        whether the switch was over."""
        try:
            used = call(ROUTER, self._crew.router.in_use.remote(), SWITCH_TIMEOUT_S)
            self._in_use(used)
        except MoeClusterError as error:
            logger.warning("no router says what is in use: %s", error)
            with suppress(MoeClusterError):
                asked = {contact.name: handle.vitals.remote() for contact, handle in self._crew.experts()}
                held = {name: call(name, ref, ANSWER_S)["groups"] for name, ref in asked.items()}
                with self._state.changing() as coordinator:
                    coordinator.held(held)

    def _told(self, placement: Placement) -> tuple[Placement, float] | None:
        """What `_adopt` gives. None: it is to be done again with the placement of then."""
        leader = self._crew.leader
        try:
            used, waited_s = self._adopt(placement, SWITCH_TIMEOUT_S)
            if used.epoch == placement.epoch:
                return used, waited_s
            if self._state.wait_for(lambda coordinator: coordinator.placement.epoch >= used.epoch > placement.epoch, 0):
                return None
            raise StepAborted(f"the router uses placement {used.epoch} and does not take {placement.epoch}")
        except MoeClusterError as error:
            # Who leads may have died, or somebody whose death is not known here yet.
            if (is_death(error) or not leader) and self._another_leads(leader):
                return None
            if self._state.wait_for(partial(_is_other, placement), NOTICED_S):
                return None
            raise

    def _in_use(self, used: Placement) -> Placement:
        """As who leads says. -> the placement of now."""
        with self._state.changing() as coordinator:
            coordinator.in_use(used)
            return coordinator.placement

    def _another_leads(self, before: str) -> bool:
        deadline = time.monotonic() + PROMOTED_S
        while time.monotonic() < deadline and self._crew.routers():  # one that has died is in it until that is known
            if self._crew.leader not in ("", before):
                return True
            time.sleep(TURN_LOOK_S)
        return False

    def _adopt(self, placement: Placement, timeout_s: float) -> tuple[Placement, float]:
        """-> what is in use then, and for how long steps waited."""
        ref = self._crew.router.adopt.remote(placement, self._crew.contacts(placement))
        used, waited = call(ROUTER, ref, timeout_s)
        return used, waited

    def _give_up(self, arriving: Sequence[tuple[int, str, Any]]) -> None:
        """What is not used of what was to come."""
        with self._state.changing() as coordinator:
            coordinator.take_back()
            placement = coordinator.placement
        if not placement.missing:
            self.switch(placement)
        self._leave_off([each for each in arriving if each[1] not in placement.holders[each[0]]])

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
