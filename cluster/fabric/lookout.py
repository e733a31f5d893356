"""Who of a cluster's actors is alive, and what each last told of itself."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.errors import MoeClusterError
from actors.values import Pinned
from cluster.backend import ActorStatus
from cluster.control.heartbeats import Heartbeats
from cluster.errors import Unavailable
from cluster.fabric.calls import call

logger = logging.getLogger(__name__)

LOAD_WINDOW_S = 10.0


@dataclass
class Signs:
    """What one look at the actors brought."""

    vitals: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of those that have answered."""
    seen: list[ActorStatus] = field(default_factory=list)
    """The same, as status shows it."""
    dead: dict[str, str] = field(default_factory=dict)
    """Actor -> why; its process has ended."""
    frozen: dict[str, float] = field(default_factory=dict)
    """Actor -> seconds for which it has not answered; its process may live."""


class Lookout:
    """Pings the actors that it watches, and hears from Ray when their processes end. Thread-safe by the lock of its
    owner, which goes through this table and its own in one."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._handles: dict[str, Any] = {}
        self._deaths: dict[str, Any] = {}
        """Of those that have not died: what will tell."""
        self._pings: dict[str, Any] = {}
        """Those that are out."""
        self._next_ping_s = 0.0
        self._heartbeats = Heartbeats()
        self._links: dict[str, str] = {}
        """Link kind of each expert actor, as a router last told."""
        self._busy: dict[str, deque[tuple[float, float]]] = {}
        """Time and busy seconds so far of each expert actor."""
        self._queues: dict[str, tuple[int, float]] = {}
        """Of each router: requests that wait, how long the first has."""
        self._pins: dict[str, tuple[float, tuple[Pinned, ...]]] = {}
        """Of each router: when it last told, by `time.monotonic`, which pins it has."""

    def watch(self, name: str, handle: Any) -> None:
        with self._lock:
            self._handles[name], self._deaths[name] = handle, handle.wait_until_death.remote()

    def leave(self, name: str) -> Any:
        """It is watched no more. -> what tells that its process is gone; None if it was not watched, or has died."""
        with self._lock:
            for table in (self._handles, self._pings, self._links, self._busy, self._queues, self._pins):
                table.pop(name, None)  # type: ignore[attr-defined]
            self._heartbeats.forget(name)
            return self._deaths.pop(name, None)

    @property
    def watched(self) -> Collection[str]:
        """Those that are not known to be dead."""
        with self._lock:
            return list(self._deaths)

    def check(self, name: str) -> None:
        """`Unavailable` if it has ended."""
        if name not in self._deaths:
            raise Unavailable(f"{name} has ended meanwhile; try again")

    def look(self, leader: str) -> Signs:
        """To be called several times a second. `leader`: the router whose word it is that others were left out."""
        signs = Signs()
        now = time.monotonic()
        with self._lock:
            if now >= self._next_ping_s:
                self._next_ping_s = now + self._heartbeats.interval_s
                self._ping(now)
            self._read_answers(signs, leader, now)
            self._read_deaths(signs)
            for verdict in self._heartbeats.check(now):
                logger.warning("%s is %s: silent for %.1f s", verdict.actor, verdict.state, verdict.silent_s)
                if verdict.state == "dead":
                    signs.frozen[verdict.actor] = verdict.silent_s
        return signs

    def link_of(self, name: str) -> str:
        """Kind of the link to an expert actor; empty as long as no router has told."""
        return self._links.get(name, "")

    def pins_of(self, router: str) -> tuple[float, tuple[Pinned, ...]] | None:
        """When it last told which pins it has, by `time.monotonic`, and which."""
        with self._lock:
            return self._pins.get(router)

    def demand(self) -> tuple[dict[str, float], int, float]:
        """Share of the time that each expert actor was busy lately, requests that wait, how long the first has."""
        with self._lock:
            spans = {name: (h[-1][0] - h[0][0], h[-1][1] - h[0][1]) for name, h in self._busy.items()}
            busy = {name: busy / passed for name, (passed, busy) in spans.items() if passed > 0}
            waiting, queue_s = zip(*self._queues.values(), strict=True) if self._queues else ((), ())
            return busy, sum(waiting), max(queue_s, default=0.0)

    def _ping(self, now: float) -> None:
        for name in self._deaths:
            if name not in self._pings:
                self._pings[name] = self._handles[name].vitals.remote()
            self._heartbeats.sent(name, now)

    def _read_answers(self, signs: Signs, leader: str, now: float) -> None:
        for name in _ready(self._pings):
            try:
                vitals = call(name, self._pings.pop(name), 1.0)
            except MoeClusterError as error:
                logger.info("no vitals of %s: %s", name, error)
                continue
            self._heartbeats.answered(name, now)
            links = vitals.get("links", {})
            self._links |= {other: kind for other, kind in links.items() if other in self._handles}
            self._note_load(name, vitals, now)
            if name == leader:
                signs.dead |= {n: f"left out by {name}" for n in vitals["left_out"] if n in self._deaths}
            signs.vitals[name] = vitals

    def _note_load(self, name: str, vitals: dict[str, Any], now: float) -> None:
        if "num_waiting" in vitals:  # a router
            self._queues[name] = int(vitals["num_waiting"]), float(vitals["queue_s"])
            self._pins[name] = now, tuple(vitals["pins"])
            return
        history = self._busy.setdefault(name, deque())
        history.append((now, float(vitals["busy_s"])))
        while history[0][0] < now - LOAD_WINDOW_S:
            history.popleft()

    def _read_deaths(self, signs: Signs) -> None:
        for name in _ready(self._deaths):
            try:
                call(name, self._deaths.pop(name), 1.0)
            except MoeClusterError as error:
                signs.dead[name] = str(error)
                self._heartbeats.forget(name)


def _ready(refs: dict[str, Any]) -> list[str]:
    """Whose answers are there."""
    ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=0) if refs else ([], [])
    return [name for name, ref in refs.items() if ref in ready]
