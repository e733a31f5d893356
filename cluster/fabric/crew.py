"""The actors of a cluster: started, loaded, watched, ended. Handles and contacts live here, decisions elsewhere."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.errors import InvalidInput, MoeClusterError
from actors.values import Placement
from cluster.backend import ActorStatus
from cluster.config import ClusterConfig
from cluster.control.coordinator import ModelFacts
from cluster.control.heartbeats import Heartbeats
from cluster.control.journal import Process
from cluster.errors import StartupError, Unavailable
from cluster.fabric.calls import call
from cluster.fabric.nodes import node_names
from cluster.fabric.options import ROUTER, expert_options, lasting, router_options
from cluster.fabric.workers import ExpertContact, ExpertStanding, ExpertWorker, RouterStanding, RouterWorker
from cluster.placement.placement import ActorSlot

if TYPE_CHECKING:
    from cluster.checkpoint.store import Found

logger = logging.getLogger(__name__)

LOAD_WINDOW_S = 10.0
ASK_TIMEOUT_S = 10.0


@dataclass
class Signs:
    """What one look at the actors brought."""

    seen: list[ActorStatus] = field(default_factory=list)
    dead: dict[str, str] = field(default_factory=dict)
    """Actor -> why; its process has ended."""
    frozen: dict[str, float] = field(default_factory=dict)
    """Actor -> seconds for which it has not answered; its process may live."""


@dataclass(frozen=True)
class Survivors:
    """Actors that outlived a coordinator: handles, and what they say of themselves."""

    router: tuple[Any, RouterStanding] | None
    experts: dict[str, tuple[Any, ExpertStanding]]


class Crew:
    """Thread-safe."""

    def __init__(self, config: ClusterConfig, cluster: str) -> None:
        """`cluster`: what its actors are named after; see `options.lasting`."""
        self._config, self._cluster = config, cluster
        self._lock = threading.RLock()
        self._handles: dict[str, Any] = {}
        self._experts: dict[str, ExpertContact] = {}
        self._router_at = ("", 0)
        self._deaths: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}
        """Names of those that have or had an actor: asked for when one starts, since Ray's head may be away later."""
        self._pings: dict[str, Any] = {}
        self._links: dict[str, str] = {}
        """Link kind of each expert actor, as the router last told."""
        self._heartbeats = Heartbeats()
        self._busy: dict[str, deque[tuple[float, float]]] = {}
        """Time and busy seconds so far of each expert actor."""
        self._queue = (0, 0.0)
        self._next_ping_s = 0.0
        self._next_number = 0

    # -- starting -----------------------------------------------------------------------------------------------------

    @property
    def router(self) -> Any:
        """`Unavailable` while there is none."""
        return self.handle(ROUTER)

    def start_router(self) -> ModelFacts:
        """Its process, in the place of the one before; `load_router` gives it its weights."""
        self.end([ROUTER])
        worker = ray.remote(**router_options(self._config))(RouterWorker)
        # A name is free again only some time after its actor has ended.
        name = lasting(self._cluster, f"{ROUTER}/{uuid.uuid4().hex[:8]}")
        handle = worker.options(**name).remote(self._config)
        with self._lock:
            self._handles[ROUTER] = handle
        facts: ModelFacts = self._started(ROUTER, handle.facts.remote())
        return facts

    def start_experts(self, count: int) -> list[ActorSlot]:
        """Processes without weights. `StartupError` if the nodes have no room for one of them."""
        worker = ray.remote(**expert_options(self._config))(ExpertWorker)
        with self._lock:
            names = [f"expert-{self._next_number + i}" for i in range(count)]
            self._next_number += count
        # Without the lock: while Ray's head is away, an actor with a name keeps whoever creates it waiting.
        handles = {name: worker.options(**lasting(self._cluster, name)).remote(name, self._config) for name in names}
        with self._lock:
            self._handles |= handles
        where = {name: self._handles[name].node_id.remote() for name in names}
        try:
            return [ActorSlot(name, self._started(name, ref)) for name, ref in where.items()]
        except MoeClusterError:
            self.end(names)
            raise

    def load_experts(self, placement: Placement, names: Sequence[str]) -> None:
        """Each takes the groups it holds from the model directory; without any it is there for those that arrive."""
        loading = {name: self._handles[name].load.remote(placement.held_by(name)) for name in names}
        for name, ref in loading.items():
            contact = self._started(name, ref)
            self._learn_nodes()
            with self._lock:
                self._experts[name] = contact
                self._deaths[name] = self._handles[name].wait_until_death.remote()

    def load_router(self, placement: Placement, control: Any, found: Found | None, run: int) -> None:
        """After the expert actors of this placement: the trunk from the model directory, or from a checkpoint as this
        run. Only then is it watched, and taken for ready."""
        ref = self.router.load.remote(placement, self.contacts(placement), control, found, run)
        at = self._started(ROUTER, ref)
        self._learn_nodes()
        with self._lock:
            self._router_at = at
            self._deaths[ROUTER] = self.router.wait_until_death.remote()

    def take_over(self, found: Survivors, next_number: int) -> None:
        """Actors that another coordinator started, loaded all of them, and watched from now on."""
        self._learn_nodes()
        with self._lock:
            self._next_number = max([next_number, *(number_of(name) + 1 for name in found.experts)])
            for name, (handle, expert) in found.experts.items():
                self._handles[name], self._experts[name] = handle, expert.contact
            if found.router is not None:
                self._handles[ROUTER], router = found.router
                self._router_at = router.node_id, router.pid
            for name, handle in self._handles.items():
                self._deaths[name] = handle.wait_until_death.remote()

    def processes(self) -> tuple[Process, ...]:
        with self._lock:
            known = [Process(ROUTER, *self._router_at)] if ROUTER in self._deaths else []
            return *known, *(Process(c.name, c.node_id, c.pid) for c in self._experts.values())

    @property
    def next_number(self) -> int:
        """Of the next expert actor."""
        return self._next_number

    def leave_off(self, groups: dict[str, Sequence[int]]) -> None:
        """These are not awaited any more by these expert actors, and copies of state for checkpoints are dropped."""
        with self._lock:
            for name, on_their_way in groups.items():
                self._handles[name].leave_off.remote(on_their_way)
            for handle in self._handles.values():
                handle.drop_snapshot.remote()

    def _learn_nodes(self) -> None:
        names = node_names()
        with self._lock:
            self._nodes |= names

    def _started(self, name: str, ref: Any) -> Any:
        try:
            return call(name, ref, self._config.ray.start_timeout_s)
        except InvalidInput:
            raise
        except MoeClusterError as error:
            resources = {k: v for k, v in ray.cluster_resources().items() if k.startswith(("moe_", "GPU"))}
            raise StartupError(
                f"{name} did not start within ray.start_timeout_s: {error}; the nodes offer {resources}"
            ) from error

    # -- who is there -------------------------------------------------------------------------------------------------

    def handle(self, name: str) -> Any:
        """`Unavailable` if it has ended."""
        with self._lock:
            return _found(self._handles, name)

    def contact(self, name: str) -> ExpertContact:
        """`Unavailable` if it has ended."""
        with self._lock:
            contact: ExpertContact = _found(self._experts, name)
            return contact

    def run(self) -> int:
        """The newest that any living actor knows of: jobs, and returns to checkpoints, are counted by it."""
        with self._lock:
            refs = {name: handle.vitals.remote() for name, handle in self._handles.items() if name in self._deaths}
        runs = [0]
        for name, ref in refs.items():
            try:
                runs.append(int(call(name, ref, ASK_TIMEOUT_S)["run"]))
            except MoeClusterError as error:
                logger.info("%s does not tell its run: %s", name, error)
        return max(runs)

    def contacts(self, placement: Placement) -> list[ExpertContact]:
        with self._lock:
            return [_found(self._experts, name) for name in placement.actors]

    def experts(self) -> list[tuple[ExpertContact, Any]]:
        """Data-plane contact and Ray handle of each expert actor."""
        with self._lock:
            return [(contact, self._handles[name]) for name, contact in self._experts.items()]

    # -- ending -------------------------------------------------------------------------------------------------------

    def end(self, names: Iterable[str]) -> None:
        """Their processes end; they are not watched any more."""
        for name in names:
            with self._lock:
                handle = self._handles.pop(name, None)
                self._deaths.pop(name, None)
                self._pings.pop(name, None)
                self._busy.pop(name, None)
                self._heartbeats.forget(name)
                self._experts.pop(name, None)
            if handle is not None:
                ray.kill(handle)

    def cut_off(self, name: str) -> None:
        """Nobody waits any longer for an actor that does not answer and may hold its connections open for ever."""
        with self._lock:
            refs = [handle.cut.remote([name]) for other, handle in self._handles.items() if other != name]
            contact = self._experts.get(name)
            node_id, pid = (contact.node_id, contact.pid) if contact else self._router_at
        ray.wait(refs, num_returns=len(refs), timeout=1.0)
        end_process(node_id, pid)

    def end_all(self) -> None:
        for handle in self._handles.values():
            ray.kill(handle)

    def ping(self) -> None:
        """Tells all, also those that are being loaded, that there is a coordinator."""
        with self._lock:
            for handle in self._handles.values():
                handle.ping.remote()

    # -- watching -----------------------------------------------------------------------------------------------------

    def look(self) -> Signs:
        """To be called several times a second."""
        signs = Signs()
        now = time.monotonic()
        with self._lock:
            if now >= self._next_ping_s:
                self._next_ping_s = now + self._heartbeats.interval_s
                self._ping(now)
            self._read_answers(signs, now)
            self._read_deaths(signs)
            for verdict in self._heartbeats.check(now):
                logger.warning("%s is %s: silent for %.1f s", verdict.actor, verdict.state, verdict.silent_s)
                if verdict.state == "dead":
                    signs.frozen[verdict.actor] = verdict.silent_s
        return signs

    def _ping(self, now: float) -> None:
        for name in self._deaths:
            if name not in self._pings:
                self._pings[name] = self._handles[name].vitals.remote()
            self._heartbeats.sent(name, now)

    def _read_answers(self, signs: Signs, now: float) -> None:
        refs = list(self._pings.values())
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ([], [])
        for name in [n for n, ref in self._pings.items() if ref in ready]:
            try:
                vitals = call(name, self._pings.pop(name), 1.0)
            except MoeClusterError as error:
                logger.info("no vitals of %s: %s", name, error)
                continue
            self._heartbeats.answered(name, now)
            self._links |= vitals.get("links", {})
            self._note_load(name, vitals, now)
            signs.seen.append(self._status(name, vitals))

    def _note_load(self, name: str, vitals: dict[str, Any], now: float) -> None:
        if name == ROUTER:
            self._queue = int(vitals["num_waiting"]), float(vitals["queue_s"])
            return
        history = self._busy.setdefault(name, deque())
        history.append((now, float(vitals["busy_s"])))
        while history[0][0] < now - LOAD_WINDOW_S:
            history.popleft()

    def demand(self) -> tuple[dict[str, float], int, float]:
        """Share of the time that each expert actor was busy lately, requests that wait, how long the first has."""
        with self._lock:
            spans = {n: (h[-1][0] - h[0][0], h[-1][1] - h[0][1]) for n, h in self._busy.items() if n in self._experts}
            return {name: busy / passed for name, (passed, busy) in spans.items() if passed > 0}, *self._queue

    def _status(self, name: str, vitals: dict[str, Any]) -> ActorStatus:
        expert = self._experts.get(name)
        node_id, pid = (expert.node_id, expert.pid) if expert else self._router_at
        return ActorStatus(
            id=name,
            role="expert" if expert else "router",
            node=self._nodes.get(node_id, node_id[:12]),
            pid=pid,
            state="ready",
            device=self._config.experts.device if expert else self._config.router.device,
            version=int(vitals["version"]),
            memory_bytes=int(vitals["memory_bytes"]),
            tokens=int(vitals.get("tokens", 0)),
            link=self._links.get(name, ""),
        )

    def _read_deaths(self, signs: Signs) -> None:
        refs = list(self._deaths.values())
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ([], [])
        for name in [n for n, ref in self._deaths.items() if ref in ready]:
            try:
                call(name, self._deaths.pop(name), 1.0)
            except MoeClusterError as error:
                signs.dead[name] = str(error)
                self._heartbeats.forget(name)


def _found(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise Unavailable(f"{name} has ended meanwhile; try again")
    return table[name]


def number_of(expert: str) -> int:
    """In the name of an expert actor."""
    return int(expert.rpartition("-")[2])


def end_process(node_id: str, pid: int) -> None:
    """Fencing: a frozen process does not hear Ray's own kill, and must not come back with old weights."""

    def kill() -> None:
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": strategy, "max_retries": 0}
        ray.remote(**options)(_kill).remote(pid)

    # While Ray's head is away this waits for it, and nobody may wait with it.
    threading.Thread(target=kill, name="fencing", daemon=True).start()


def _kill(pid: int) -> None:
    """Only if the process is still one of our workers: numbers of processes are used again."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if re.search(rb"(Expert|Router)Worker", file.read()):
                os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
