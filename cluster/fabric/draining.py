"""Nodes emptied before they are taken away, on request and when Ray announces it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

import ray

from actors.errors import MoeClusterError
from cluster.backend import Operation
from cluster.control.draining import Leaving, find_node
from cluster.errors import FailedPrecondition, Unavailable
from cluster.fabric.changes import Changes, Report
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.nodes import node_names
from cluster.fabric.notices import Notices
from cluster.fabric.scaling import Scaling
from cluster.fabric.underway import UnderWay

logger = logging.getLogger(__name__)

KIND = "drain_node"
MOVING_SHARE = 0.5
"""Of the time that is left: kept for moving groups. Before that new actors may look for room."""
MOST_PATIENCE_S = 60.0
"""For new actors to find room, however far away the deadline is: the others can take the groups meanwhile."""
LOOK_S = 0.05
AGAIN_S = 0.5
SETTLE_S = 10.0


class Draining:
    def __init__(
        self, state: Guarded, crew: Crew, changes: Changes, scaling: Scaling, leaving: Mapping[str, str]
    ) -> None:
        """`leaving`: id -> name of nodes that were emptied before, and are to be taken away."""
        self._state, self._crew, self._changes, self._scaling = state, crew, changes, scaling
        self._lock = threading.Lock()
        self._leaving = Leaving()
        for node_id, name in leaving.items():
            self._leaving.ask(node_id, name, time.time())
        self._crew.leaving = self._leaving.names
        self._emptying: set[str] = set()
        """Ids of the nodes of operations that are under way."""
        self._notices = Notices()
        self._control_node: str = ray.get_runtime_context().get_node_id()

    def stop(self) -> None:
        self._notices.stop()

    def drain(self, node: str, deadline_s: float, request_id: str) -> Operation:
        """Starts it; `operations` tell how it goes. `InvalidInput` or `FailedPrecondition` if it cannot be."""
        if self._is_known(request_id):  # by now the node may be gone
            with self._state.changing() as coordinator:
                return coordinator.operations.start(KIND, 0, request_id, time.time(), node)
        nodes = node_names()
        node_id = find_node(node, nodes, self._keepers())
        return self._start(node, node_id, nodes[node_id], deadline_s, request_id)

    @property
    def leaving_if_cut_off(self) -> Mapping[str, str]:
        """Id -> name of the nodes that are to stay empty, as if an operation that is under way had failed. What Ray
        announces it will announce again."""
        with self._lock:
            return {node_id: name for node_id, name in self._leaving.asked.items() if node_id not in self._emptying}

    def look(self) -> None:
        """To be called often: begins to empty what Ray announced."""
        news = self._notices.latest
        if news is None:
            return
        with self._lock:
            fresh = self._leaving.announced(news.notices, news.nodes, news.looked_s)
            self._crew.leaving = self._leaving.names
        now, keepers = time.time(), self._keepers()
        held = {node_id: len(self._crew.on_node(node_id)) for node_id in news.notices if node_id not in keepers}
        for node_id in fresh:
            if node_id in keepers:
                logger.error("Ray takes node %s away, which holds %s", news.nodes[node_id], keepers[node_id])
            elif held[node_id]:
                logger.warning("Ray takes node %s away; it is emptied", news.nodes[node_id])
        with self._state.reading() as coordinator:
            is_busy = coordinator.operations.active() is not None
        if is_busy or (notice := self._leaving.next(held, now)) is None:
            return
        name = news.nodes[notice.node_id]
        try:
            request_id = self._leaving.tried(notice.node_id, now)
            self._start(name, notice.node_id, name, notice.deadline_s(now), request_id)
        except FailedPrecondition as error:  # somebody was quicker
            logger.info("not emptied yet: %s", error)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _keepers(self) -> dict[str, str]:
        return {self._control_node: "the coordinator", **dict.fromkeys(self._crew.router_nodes(), "a router")}

    def _is_known(self, request_id: str) -> bool:
        with self._state.reading() as coordinator:
            return any(operation.request_id == request_id for operation in coordinator.operations.all())

    def _start(self, asked_as: str, node_id: str, name: str, deadline_s: float, request_id: str) -> Operation:
        with self._state.changing() as coordinator:
            is_known = self._is_known(request_id)
            operation = coordinator.operations.start(KIND, 0, request_id, time.time(), asked_as)
        if is_known:
            return operation
        with self._lock:
            self._emptying.add(node_id)
            self._leaving.ask(node_id, name, time.time())
            self._crew.leaving = self._leaving.names
        arguments = operation, node_id, time.monotonic() + deadline_s
        threading.Thread(target=self._run, args=arguments, name=operation.id, daemon=True).start()
        return operation

    def _run(self, operation: Operation, node_id: str, deadline: float) -> None:
        under_way = UnderWay(self._state, operation)

        def emptied() -> float:
            with self._changes.priced("drain", operation.node) as price:
                return price(self._empty(operation.node, node_id, under_way.report, deadline))

        def given_up() -> None:
            self._give_up(node_id)

        if under_way.run(emptied, done=lambda: self._stays_empty(node_id), cancelled=given_up, failed=given_up):
            logger.info("node %s is empty", operation.node)

    def _empty(self, node: str, node_id: str, report: Report, deadline: float) -> float:
        """-> longest wait of a step, in seconds. Tries until the deadline: a death meanwhile, or too little room, need
        not last."""
        stall_s = 0.0
        while on_node := self._crew.on_node(node_id):
            try:
                stall_s = max(stall_s, self._move_away(node, report, deadline))
                self._wait_for_end(node_id, deadline)
            except MoeClusterError as error:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    what = f"{node} still holds {', '.join(on_node)} at the deadline"
                    raise Unavailable(f"{what}: {error}") from error
                report(0.0, f"tries again: {error}")
                time.sleep(min(AGAIN_S, left_s))
        self._check_nothing_lost(node)
        return stall_s

    def _move_away(self, node: str, report: Report, deadline: float) -> float:
        def waits() -> None:
            report(0.0, "waits for another change to end")

        self._changes.begin_in_turn(f"draining {node}", deadline, waits)
        try:
            left_s = max(0.0, deadline - time.monotonic())
            patience_s = min(MOST_PATIENCE_S, left_s * (1 - MOVING_SHARE))
            return self._scaling.empty_leaving(report, deadline, patience_s)
        finally:
            self._changes.end()

    def _wait_for_end(self, node_id: str, deadline: float) -> None:
        """Until the processes of the actors that were ended are gone."""
        while names := self._crew.on_node(node_id):
            if time.monotonic() >= deadline:
                raise Unavailable(f"{', '.join(names)} has not ended")
            time.sleep(LOOK_S)

    def _check_nothing_lost(self, node: str) -> None:
        """A node that died before its groups were elsewhere holds nothing of ours either."""
        with self._state.reading() as coordinator:
            missing = coordinator.placement.missing
        if missing:
            raise Unavailable(f"{node} was lost before its groups were elsewhere")

    def _stays_empty(self, node_id: str) -> None:
        with self._lock:
            self._emptying.discard(node_id)

    def _give_up(self, node_id: str) -> None:
        """The node stays, unless Ray announced its end; so do groups that have left it."""
        with self._lock:
            self._leaving.take_back(node_id)
            self._emptying.discard(node_id)
            self._crew.leaving = self._leaving.names
        try:
            self._changes.begin_in_turn("the end of a drain", time.monotonic() + SETTLE_S, lambda: None)
        except FailedPrecondition as error:
            logger.info("actors without groups may be left: %s", error)
            return
        try:
            self._scaling.settle()
        finally:
            self._changes.end()
