"""What actors say of themselves to a coordinator that is new to them, and how long they live without any."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.values import Course, Placement, StepReport
from cluster.backend import Job
from cluster.config import ClusterConfig
from cluster.control.orphans import Silence

if TYPE_CHECKING:
    from cluster.fabric.contacts import ExpertContact, RouterContact

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Following:
    """Whose steps a router's versions are."""

    job: Job | None
    """The last one that began, or went on; as it was then."""
    course: Course
    """What its steps are counted from."""


@dataclass(frozen=True)
class ExpertStanding:
    """What an expert actor says of itself to a coordinator that is new to it."""

    contact: ExpertContact
    vitals: dict[str, Any]
    heard_s: float
    """When the coordinator asked the last time (Unix)."""


@dataclass(frozen=True)
class RouterStanding:
    """As of an expert actor, between two steps."""

    contact: RouterContact
    leads: bool
    term: int
    followers: tuple[str, ...]
    """Of one that leads: the others that have the trunk from it."""
    placement: Placement
    """In use."""
    vitals: dict[str, Any]
    following: Following
    reports: tuple[tuple[float, StepReport], ...]
    """Of its last steps, with the time (Unix) of each: all that may not have been told any more."""
    heard_s: float
    """As of an expert actor."""


class Watch:
    """Lets one coordinator wait for the end of this process, the next one takes it over; without any it ends itself."""

    def __init__(self, config: ClusterConfig) -> None:
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.heard_s = time.time()
        self._silence = Silence(time.monotonic(), 2 * LOOK_EVERY_S)
        if config.ray.mode == "existing":  # an embedded cluster ends with its nodes
            threading.Thread(target=self._run, args=(config.ray.orphan_timeout_s,), name="watch", daemon=True).start()

    def vitals_asked(self) -> None:
        self.heard_s = time.time()
        self.pinged()

    def pinged(self) -> None:
        self._silence.heard()

    def wait(self) -> None:
        """Until somebody else waits. Each wait takes a thread of the actor, which has few."""
        with self._lock:
            self._over.set()
            over = self._over = threading.Event()
        over.wait()

    def _run(self, timeout_s: float) -> None:
        while (silent_s := self._silence.look(time.monotonic())) < timeout_s:
            time.sleep(LOOK_EVERY_S)
        logger.error("no coordinator has asked for %.0f s; this actor ends", silent_s)
        os._exit(1)
