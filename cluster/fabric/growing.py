"""A growth of the model carried out: all actors have the new experts from one step on, or none has them."""

from __future__ import annotations

import logging
import threading
import time

from actors.errors import LinkError, StepAborted
from actors.values import Grown, Growth
from cluster.backend import Operation
from cluster.control.model import ModelFacts
from cluster.errors import FailedPrecondition, Unavailable
from cluster.fabric.calls import call, is_death
from cluster.fabric.changes import Changes, Report
from cluster.fabric.checkpoints import Checkpoints
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.options import ROUTER
from cluster.fabric.routers import Routers
from cluster.fabric.standing import RouterStanding
from cluster.fabric.underway import UnderWay

logger = logging.getLogger(__name__)

KIND = "grow_model"
PREPARE_TIMEOUT_S = 120.0
GROW_TIMEOUT_S = 3600.0
ATTEMPTS = 5
"""Of one growth: a death in the middle undoes the attempt, and the next finds the placement without the dead."""
AGAIN_S = 1.0
TOLD_WITHIN_S = 60.0
"""By a leader that lives and could not be reached: how its growth ended."""


class Growing:
    def __init__(
        self, state: Guarded, crew: Crew, changes: Changes, checkpoints: Checkpoints, routers: Routers
    ) -> None:
        self._state, self._crew, self._changes = state, crew, changes
        self._checkpoints, self._routers = checkpoints, routers

    def grow(self, growth: Growth, request_id: str) -> Operation:
        """Starts it; `operations` tell how it goes. `InvalidInput` or `FailedPrecondition` if it cannot be."""
        with self._state.changing() as coordinator:
            if request_id in {operation.request_id for operation in coordinator.operations.all()}:
                return coordinator.operations.start(KIND, growth.num_experts, request_id, time.time())
            self._changes.begin(f"growing to {growth.num_experts} experts")
        try:
            with self._state.reading() as coordinator:
                coordinator.check_growth(growth.num_experts)
            call(ROUTER, self._crew.router.prepare_growth.remote(growth), PREPARE_TIMEOUT_S)
            with self._state.changing() as coordinator:
                operation = coordinator.operations.start(KIND, growth.num_experts, request_id, time.time())
        except BaseException:
            self._changes.end()
            raise
        threading.Thread(target=self._run, args=(operation, growth), name=operation.id, daemon=True).start()
        return operation

    def _run(self, operation: Operation, growth: Growth) -> None:
        under_way = UnderWay(self._state, operation)

        def grow() -> float:
            with self._changes.priced("grow", f"{growth.num_experts} experts a layer") as price:
                grown = self._grow(under_way.report, growth)
                price(grown.waited_s)
            with self._state.changing() as coordinator:
                coordinator.operations.progress(operation.id, 1.0, _sentence(grown))
            self._checkpoints.owe()
            return grown.waited_s

        try:
            if under_way.run(grow):
                self._checkpoints.after_change()
        finally:
            self._changes.end()

    def _grow(self, report: Report, growth: Growth) -> Grown:
        """Tries again after a death in the middle."""
        for attempt in range(1, ATTEMPTS + 1):
            report(0.0, f"attempt {attempt}, between two steps")
            try:
                return self._attempt(growth)
            except (LinkError, StepAborted, Unavailable, FailedPrecondition) as error:
                logger.warning("growth, attempt %d: nobody has grown: %s", attempt, error)
                if attempt == ATTEMPTS:
                    raise
                time.sleep(AGAIN_S)
        raise AssertionError("unreachable")

    def _attempt(self, growth: Growth) -> Grown:
        deadline = time.monotonic() + GROW_TIMEOUT_S
        with self._state.reading() as coordinator:
            coordinator.check_growth(growth.num_experts)
        leader = self._crew.leader
        try:
            self._changes.settle(deadline)
            grown: Grown = call(ROUTER, self._crew.router.grow.remote(growth), GROW_TIMEOUT_S)
        except Unavailable as error:
            if not is_death(error):
                raise
            return self._found_out(growth, leader, error)
        return self._noted(growth, grown)

    def _noted(self, growth: Growth, grown: Grown) -> Grown:
        self._crew.num_experts = growth.num_experts
        with self._state.changing() as coordinator:
            has_lost = coordinator.grown(grown.placement, grown.num_parameters, time.time())
            placement = coordinator.placement
        if has_lost and not placement.missing:
            self._changes.switch(placement)
        return grown

    def _found_out(self, growth: Growth, leader: str, error: Unavailable) -> Grown:
        """This leader has not said what came of it: all have grown, as whoever leads next has told the coordinator, or
        nobody. Raises the error then."""
        try:
            promotion = self._routers.after(leader, error)
        except Unavailable:
            return self._told_by(growth, leader, error)
        if promotion.placement.num_experts != growth.num_experts:
            raise error
        return Grown(promotion.placement, promotion.num_parameters, "", 0.0, 0.0)

    def _told_by(self, growth: Growth, leader: str, error: Unavailable) -> Grown:
        """It leads on: only its answer was lost. Asked again it would refuse what it has done."""
        deadline = time.monotonic() + TOLD_WITHIN_S
        while self._crew.leader == leader:
            try:
                router = self._crew.router
                standing: RouterStanding | None = call(leader, router.standing.remote(), GROW_TIMEOUT_S)
                if standing is None or standing.placement.num_experts != growth.num_experts:
                    break
                facts: ModelFacts = call(leader, router.facts.remote(growth.num_experts), PREPARE_TIMEOUT_S)
                return self._noted(growth, Grown(standing.placement, facts.num_parameters, "", 0.0, 0.0))
            except Unavailable:
                if time.monotonic() >= deadline:
                    break
                time.sleep(AGAIN_S)
        raise error


def _sentence(grown: Grown) -> str:
    if not grown.way:
        return "done; the router that led was gone before it could say more"
    return f"{grown.way}: {grown.moved_share:.2%} of the tried gate weight went to other experts"
