"""The number of expert actors changed while steps and requests go on, and kept what it is to be after deaths."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection

from actors.errors import InvalidInput, MoeClusterError
from actors.values import Placement
from cluster.backend import Operation
from cluster.config import ExpertsConfig
from cluster.control.coordinator import Coordinator
from cluster.control.ledger import Kind
from cluster.control.scaling import ScalingLimits, actors_to_remove, check_scale
from cluster.errors import StartupError, Unavailable
from cluster.fabric.changes import Changes, Report
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.loops import Beside
from cluster.fabric.underway import UnderWay

logger = logging.getLogger(__name__)

MOVE_TIMEOUT_S = 3600.0
SEEN_TIMEOUT_S = 30.0
HEAL_AGAIN_S = 5.0
"""After an attempt that failed: the nodes may have no room until one comes back."""
ROOM_LOOK_S = 1.0
"""Between two looks for room: each asks Ray's control store."""
STARTED = 0.3
"""Share of a scaling operation that starting actors counts for."""


class Scaling:
    def __init__(self, state: Guarded, crew: Crew, changes: Changes, config: ExpertsConfig, wanted: int) -> None:
        """`wanted`: expert actors there should be by now."""
        self._state, self._crew, self._changes, self._config = state, crew, changes, config
        self._limits = ScalingLimits(config.min_actors, config.max_actors)
        self._wanted = self._wanted_before = wanted
        self._heal_at_s = 0.0
        self._has_room = Beside("room for expert actors", self._look_for_room, ROOM_LOOK_S)

    def scale(self, actors: int, request_id: str) -> Operation:
        """Starts it; `operations` tell how it goes. `InvalidInput` or `FailedPrecondition` if it cannot be."""
        with self._state.changing() as coordinator:
            known = {operation.request_id for operation in coordinator.operations.all()}
            if request_id not in known:
                self._check(coordinator, actors)
            operation = coordinator.operations.start("scale_experts", actors, request_id, time.time())
        if request_id not in known:
            threading.Thread(target=self._run, args=(operation,), name=operation.id, daemon=True).start()
        return operation

    def _check(self, coordinator: Coordinator, actors: int) -> None:
        """Takes the turn of the change that is about to begin, as its last act."""
        if actors > (num_groups := coordinator.placement.num_groups):
            raise InvalidInput(
                f"is more than the {num_groups} expert groups, of which each actor holds one at least",
                field="actors",
                value=actors,
                remedy=f"use at most {num_groups}",
            )
        running, here = coordinator.operations.active(), coordinator.actors()
        check_scale(
            actors,
            len(here),
            self._limits,
            running.id if running else None,
            redundancy=self._config.redundancy,
            num_nodes=len({actor.node for actor in here}),
        )
        self._changes.begin(f"scaling to {actors} expert actors")

    def _run(self, operation: Operation) -> None:
        before, self._wanted = self._wanted, operation.target
        kind: Kind = "scale_up" if operation.target > before else "scale_down"
        under_way = UnderWay(self._state, operation)

        def resized() -> float:
            with self._changes.priced(kind, f"{operation.target} expert actors") as price:
                return price(self._resize(operation.target, under_way.report))

        def settled() -> None:
            self._wanted_before = self._wanted

        def stopped() -> None:
            self._end_idle()
            with self._state.reading() as coordinator:
                self._wanted = len(coordinator.actors())

        def undone() -> None:
            self._wanted = before
            self._end_idle()

        try:
            under_way.run(resized, done=settled, cancelled=stopped, failed=undone)
        finally:
            self._wanted_before = self._wanted
            self._changes.end()

    def heal(self) -> None:
        """To be called often: starts the actors that died anew and restores missing copies, in the background."""
        if time.monotonic() < self._heal_at_s:
            return
        is_narrow = len(self._crew.occupied_nodes()) < self._config.redundancy
        is_few = (self._is_few or is_narrow) and self._has_room.answer() is True
        with self._state.reading() as coordinator:
            if not self._is_hurt(coordinator, is_few) or not self._changes.try_begin("healing"):
                return
        self._heal_at_s = time.monotonic() + HEAL_AGAIN_S
        threading.Thread(target=self._heal, name="healing", daemon=True).start()

    def _is_hurt(self, coordinator: Coordinator, is_few: bool) -> bool:
        """`is_few`: there are too few actors, or they are on too few nodes, and there may be room."""
        placement = coordinator.placement
        nodes = {actor.node for actor in coordinator.actors()} - set(self._crew.leaving.values())
        # More copies than there are nodes for must wait for actors elsewhere.
        is_short = any(len(held) < min(self._config.redundancy, len(nodes)) for held in placement.holders)
        # Without copies a group that is lost cannot come back by moving others. Those that were ended are out of the
        # crew; who has not reported yet, as in the first moments, is in it.
        if placement.missing or coordinator.health.is_router_lost:
            return False
        return is_short or is_few

    @property
    def _is_few(self) -> bool:
        return len(self._crew.experts()) < self._wanted

    def _look_for_room(self) -> bool:
        """Whether there may be room for actors that are too few, or on too few nodes. Asks Ray's control store."""
        return (self._is_few and self._crew.may_have_room()) or self._missing_nodes() > 0

    def _missing_nodes(self) -> int:
        """Nodes that copies want beyond those that carry actors, as far as there are some with room."""
        missing = self._config.redundancy - len(self._crew.occupied_nodes() - set(self._crew.leaving))
        return min(missing, len(self._crew.open_nodes())) if missing > 0 else 0

    def _heal(self) -> None:
        try:
            self._resize(self._wanted, lambda share, message: None)
        except MoeClusterError as error:
            logger.warning("the cluster is not whole yet: %s", error)
            self._end_idle()
        except Exception:
            logger.exception("healing stumbled")
        finally:
            self._changes.end()
            self._heal_at_s = time.monotonic() + HEAL_AGAIN_S

    def empty_leaving(self, report: Report, deadline: float, patience_s: float) -> float:
        """Nothing stays on the nodes that leave: their actors are replaced as far as others find room elsewhere within
        `patience_s`, and those that stay take the groups. In the caller's turn of changes, until the deadline
        (monotonic). -> longest wait of a step, in seconds."""
        return self._resize(self._wanted, report, deadline, patience_s)

    def settle(self) -> None:
        """After a change that stopped half way: actors that got nothing end, the others stay. In the caller's turn."""
        self._end_idle()
        with self._state.reading() as coordinator:
            self._wanted = self._wanted_before = max(self._wanted, len(coordinator.actors()))

    def _resize(
        self, wanted: int, report: Report, deadline: float | None = None, patience_s: float | None = None
    ) -> float:
        """-> longest wait of a step, in seconds. With `patience_s` as many actors as find room by then will do."""
        missing, missing_nodes = wanted - self._crew.num_staying(), self._missing_nodes()
        if missing_nodes:
            # Also where there are enough: one that shares its node with another goes in exchange.
            report(0.0, f"starting {missing_nodes} expert actors on other nodes")
            self.start(missing_nodes, avoid=self._crew.occupied_nodes())
            missing -= missing_nodes
        if missing > 0:
            report(0.0, f"starting {missing} expert actors")
            self.start(missing, patience_s)
        with self._state.reading() as coordinator:
            actors, placement = coordinator.actors(), coordinator.placement
        leaving = self._crew.leaving.values()
        keep = min(wanted, sum(actor.node not in leaving for actor in actors))
        if not keep:
            raise Unavailable("there is no expert actor on a node that stays, and no room for one")
        redundancy = self._config.redundancy
        gone = actors_to_remove(placement, actors, keep, redundancy, leaving) if keep < len(actors) else ()
        stay = [actor for actor in actors if actor.id not in gone]
        deadline = deadline or time.monotonic() + MOVE_TIMEOUT_S
        stall_s = self._changes.move_to(
            stay, deadline, lambda share, text: report(STARTED + (1 - STARTED) * share, text)
        )
        self._end(gone)
        return stall_s

    @property
    def wanted(self) -> int:
        """Expert actors there should be."""
        return self._wanted

    @property
    def wanted_if_cut_off(self) -> int:
        """The same, as if an operation that is under way had failed."""
        return self._wanted_before

    def start(self, count: int, patience_s: float | None = None, avoid: Collection[str] = ()) -> None:
        """Actors without groups, seen alive. `StartupError` if the nodes have no room for one of them: then none is.
        With `patience_s` those that find room by then will do. `avoid`: ids of nodes that are not to carry them."""
        if patience_s is None:
            slots = self._crew.start_experts(count, avoid)
        else:
            slots = self._crew.start_experts_where_room(count, patience_s)
        names = [slot.id for slot in slots]
        try:
            with self._state.reading() as coordinator:
                group_size = coordinator.placement.group_size
            self._crew.load_experts(Placement(0, (), group_size), names)
            if not self._state.wait_for(lambda c: {a.id for a in c.actors()} >= set(names), SEEN_TIMEOUT_S):
                raise StartupError(f"{', '.join(names)} started and then did not answer")
        except MoeClusterError:
            self._end(names)
            raise

    def _end(self, names: tuple[str, ...] | list[str]) -> None:
        with self._state.changing() as coordinator:
            for name in names:
                coordinator.actor_left(name, self._crew.pid_of(name))
        self._crew.end(names)

    def _end_idle(self) -> None:
        """Actors that were started and hold nothing."""
        with self._state.reading() as coordinator:
            idle = [a.id for a in coordinator.actors() if not coordinator.placement.held_by(a.id)]
        self._end(idle)
