"""The routers of a cluster: one leads; another takes its place when it dies; there are as many as there should be."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from actors.errors import InvalidInput, MoeClusterError
from actors.values import Promotion
from cluster.backend import Operation
from cluster.config import RouterConfig
from cluster.control.coordinator import Coordinator
from cluster.errors import Unavailable
from cluster.fabric.calls import call
from cluster.fabric.changes import Changes
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.standing import Following
from cluster.fabric.underway import UnderWay

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 600.0
NOTICED_S = 10.0
"""The death of a process is known within a second; one that only seems dead is given so long."""
HEAL_AGAIN_S = 5.0
"""After an attempt that failed."""
LOOK_EVERY_S = 0.05

Report = Callable[[float, str], None]


class Routers:
    def __init__(
        self,
        state: Guarded,
        crew: Crew,
        changes: Changes,
        control: Any,
        config: RouterConfig,
        wanted: int,
        term: int = 0,
    ) -> None:
        """`control`: the coordinator's own handle. `wanted`: routers there should be by now. `term`: the highest that
        any router has led in."""
        self._state, self._crew, self._changes, self._control = state, crew, changes, control
        self._max_actors = config.max_actors
        self._promote_timeout_s = promote_timeout_s(config)
        self._term = term
        self._promoted: tuple[str, Promotion] | None = None
        """The router that was promoted last."""
        self._promoting: threading.Thread | None = None
        self._turn = threading.Lock()
        """Of who changes the number of routers."""
        self._heal_at_s = 0.0
        self._wanted_before = wanted
        self._want(wanted)

    @property
    def wanted(self) -> int:
        """Routers there should be."""
        return self._wanted

    @property
    def wanted_if_cut_off(self) -> int:
        """The same, as if an operation that is under way had failed."""
        return self._wanted_before

    def _want(self, count: int) -> None:
        self._wanted = count
        with self._state.changing() as coordinator:
            coordinator.health.routers_wanted = count

    def start(self) -> None:
        """At the start of a cluster, whose first router has its trunk. `StartupError` if the nodes have no room."""
        self._add(self._wanted - 1)

    def look(self) -> None:
        """To be called often: sees to it that one leads, and begins to replace those that died."""
        if self._promoting is not None and self._promoting.is_alive():
            return
        if not self._crew.leader:
            if self._crew.routers():
                self._promoting = threading.Thread(target=self._promote, name="promotion", daemon=True)
                self._promoting.start()
        elif self._is_off() and time.monotonic() >= self._heal_at_s and self._turn.acquire(blocking=False):
            threading.Thread(target=self._heal, name="new-router", daemon=True).start()

    # -- another leads ------------------------------------------------------------------------------------------------

    def after(self, leader: str, error: Unavailable) -> Promotion:
        """Waits until another router leads in the place of this one, which has died. Raises the error if none does."""
        noticed_by = time.monotonic() + NOTICED_S
        deadline = time.monotonic() + NOTICED_S + self._promote_timeout_s
        while time.monotonic() < deadline:
            now = self._crew.leader
            promoted = self._promoted
            if promoted is not None and now == promoted[0] != leader:
                return promoted[1]
            if not self._crew.routers() or (now == leader and time.monotonic() > noticed_by):
                break
            time.sleep(LOOK_EVERY_S)
        raise error

    def _promote(self) -> None:
        try:
            while not self._crew.leader and (routers := self._crew.routers()):
                heir, (_, handle) = next(iter(routers.items()))
                others = [contact for name, (contact, _) in routers.items() if name != heir]
                self._term += 1
                try:
                    ref = handle.promote.remote(others, self._term)
                    promotion: Promotion = call(heir, ref, self._promote_timeout_s)
                except MoeClusterError as error:
                    logger.error("%s cannot lead: %s", heir, error)
                    self._changes.bury(heir, f"it could not take the lead: {error}")
                    continue
                self._promoted = heir, promotion
                self._note_growth(promotion)
                try:
                    self._crew.lead(heir)
                except Unavailable as error:
                    logger.error("%s has just been promoted: %s", heir, error)
                    continue
                logger.warning("%s leads from version %d on", heir, promotion.version)
                with self._state.reading() as coordinator:
                    placement = coordinator.placement
                if not placement.missing:
                    self._changes.switch(placement)
        except Exception:
            logger.exception("a promotion stumbled")

    def _note_growth(self, promotion: Promotion) -> None:
        """A leader may die when all have grown, before it has said so; or it was said, and an heir undid it."""
        placement = promotion.placement
        with self._state.changing() as coordinator:
            if placement.num_experts == coordinator.placement.num_experts:
                return
            logger.warning("the model has %d experts a layer, as who leads now says", placement.num_experts)
            coordinator.grown(placement, promotion.num_parameters, time.time())
        self._crew.num_experts = placement.num_experts

    def follow(self, following: Following) -> None:
        """Tells those that may have to lead whose steps they do; who leads knows."""
        for name, (_, handle) in self._crew.routers().items():
            if name != self._crew.leader:
                handle.follow.remote(following)

    # -- how many -----------------------------------------------------------------------------------------------------

    def scale(self, routers: int, request_id: str) -> Operation:
        """Starts it; `operations` tell how it goes. `InvalidInput` or `FailedPrecondition` if it cannot be."""
        if not 1 <= routers <= self._max_actors:
            raise InvalidInput(
                f"is outside 1 to router.max_actors {self._max_actors}",
                field="routers",
                value=routers,
                remedy=f"use 1 to {self._max_actors}",
            )
        with self._state.changing() as coordinator:
            known = {operation.request_id for operation in coordinator.operations.all()}
            operation = coordinator.operations.start("scale_routers", routers, request_id, time.time())
        if request_id not in known:
            threading.Thread(target=self._run, args=(operation,), name=operation.id, daemon=True).start()
        return operation

    def _run(self, operation: Operation) -> None:
        with self._turn:  # to its end: nobody else changes their number before it is known what came of this
            before, under_way = self._wanted, UnderWay(self._state, operation)

            def resized() -> float:
                self._want(operation.target)
                return self._resize(operation.target, under_way.report)

            def settled() -> None:
                self._wanted_before = self._wanted

            def stopped() -> None:
                self._want(max(1, len(self._crew.routers())))
                settled()

            under_way.run(resized, done=settled, cancelled=stopped, failed=lambda: self._want(before))

    def _resize(self, wanted: int, report: Report) -> float:
        """-> seconds that steps may have waited for joins."""
        here = list(self._crew.routers())
        stall_s = 0.0
        if missing := max(0, wanted - len(here)):
            report(0.0, f"starting {missing} routers")
            stall_s = self._add(missing)
        # The newest go first; who leads stays.
        leaving = [name for name in reversed(here) if name != self._crew.leader][: max(0, len(here) - wanted)]
        for number, name in enumerate(leaving):
            report(number / len(leaving), f"ended {number} of {len(leaving)} routers")
            self._end(name)
        return stall_s

    def _add(self, count: int) -> float:
        """Starts routers and lets them join. -> longest time that one of them took to take the trunk over, seconds."""
        took_s = [0.0]
        if count <= 0:
            return 0.0
        contacts = self._crew.start_replicas(count, self._control)
        try:
            for contact in contacts:
                begun = time.monotonic()
                leader = self._crew.leader
                call(leader, self._crew.router.join.remote(contact), JOIN_TIMEOUT_S)
                self._crew.joined(contact, leader)
                self._tell_whom_to_follow(contact.name)
                took_s.append(time.monotonic() - begun)
                seen = self._crew.status_of(contact.name)
                with self._state.changing() as coordinator:
                    coordinator.actor_seen(seen, time.time())
        except MoeClusterError:
            self._crew.end({contact.name for contact in contacts} - set(self._crew.routers()))
            raise
        return max(took_s)

    def _tell_whom_to_follow(self, name: str) -> None:
        """Of a job that begins later it hears as all do."""
        try:
            following = call(self._crew.leader, self._crew.router.following.remote(), NOTICED_S)
            self._crew.handle(name).follow.remote(following)
        except MoeClusterError as error:  # it follows all the same
            logger.warning("%s does not know whose steps it does: %s", name, error)

    def _end(self, name: str) -> None:
        """Its streams go on at others."""
        call(self._crew.leader, self._crew.router.part.remote(name), JOIN_TIMEOUT_S)
        with self._state.changing() as coordinator:
            coordinator.actor_left(name, self._crew.pid_of(name))
        self._crew.end([name])

    def _is_off(self) -> bool:
        """Also when there are more: a coordinator may have died while it changed their number."""
        return 0 < len(self._crew.routers()) != self._wanted

    def _heal(self) -> None:
        try:
            self._resize(self._wanted, lambda share, message: None)
        except (MoeClusterError, ray.exceptions.RayError) as error:
            logger.warning("there are not as many routers as there should be: %s", error)
        except Exception:
            logger.exception("a router was not replaced")
        finally:
            self._heal_at_s = time.monotonic() + HEAL_AGAIN_S
            self._turn.release()


def promote_timeout_s(config: RouterConfig) -> float:
    """An heir may have to wait for one message that the leader's death left without an answer."""
    return 2 * config.request_timeout_s + 30.0


def ready_routers(coordinator: Coordinator, crew: Crew) -> dict[str, Any]:
    """Handles of those that can answer; none while an expert group has no holder."""
    status = coordinator.status()
    if not status.ready:
        return {}
    ready = {actor.id for actor in status.actors if actor.role == "router" and actor.state == "ready"}
    return {name: handle for name, (_, handle) in crew.routers().items() if name in ready}
