"""The pins of a cluster: how many, until when, and whether what they keep is still there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass

from actors.errors import MoeClusterError
from actors.values import Pinned
from cluster.backend import Pin
from cluster.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from cluster.fabric.calls import call
from cluster.fabric.crew import Crew

logger = logging.getLogger(__name__)

TOLD_AFTER_S = 2.0
"""What a router said of its pins may be from before a pin that is younger."""
LOOK_AGAIN_S = 0.05


@dataclass(frozen=True)
class _Kept:
    pinned: Pinned
    since: float
    """When it came to be known here, by `time.monotonic`."""

    @property
    def pin(self) -> Pin:
        pinned = self.pinned
        return Pin(pinned.name, pinned.version, pinned.created_s, pinned.expires_s)


class Pins:
    """Called by any thread; `look` by the coordinator's loop. A coordinator that has come back knows of none until the
    router that leads has told which there are."""

    def __init__(self, crew: Crew, max_pins: int) -> None:
        self._crew, self._max_pins = crew, max_pins
        self._kept: dict[str, _Kept] = {}
        self._is_told = False
        self._turn = threading.Lock()
        """Of who changes them."""

    def all(self) -> tuple[Pin, ...]:
        """Oldest first."""
        return tuple(kept.pin for kept in list(self._kept.values()))

    def pin(self, name: str, ttl_s: float, version: int, timeout_s: float) -> Pin:
        """Of the newest version; `version`: what that was when it was asked for. Errors as of `Backend.pin_version`."""
        deadline = time.monotonic() + timeout_s
        with self._turn:
            self._await_told(deadline)
            known = self._kept.get(name or f"v{version}")
            if known is not None and known.pin.version == version:
                return known.pin
            if name and known is not None:
                raise AlreadyExists(
                    f"pin {name} keeps version {known.pin.version}; unpin it first, or choose another name"
                )
            self._check_room()
            pinned = self._make(name, ttl_s, max(0.001, deadline - time.monotonic()))
            self._kept[pinned.name] = _Kept(pinned, time.monotonic())
            logger.info("pinned version %d as %s", pinned.version, pinned.name)
            return self._kept[pinned.name].pin

    def unpin(self, name: str, timeout_s: float) -> None:
        """Memory is given back at every actor when it returns."""
        deadline = time.monotonic() + timeout_s
        with self._turn:
            self._await_told(deadline)
            if name not in self._kept:
                raise NotFound(f"no pin {name}; there are {', '.join(self._kept) or 'none'}")
            self._forget(name)
            left_s = max(0.001, deadline - time.monotonic())
            call(self._crew.leader, self._crew.router.keep_pins.remote(list(self._kept)), left_s)

    def look(self) -> None:
        """Gives up what has expired, and what is no longer whole. Waits for nobody."""
        if not self._turn.acquire(blocking=False):
            return
        try:
            self._hear()
            living = {contact.name for contact, _ in self._crew.experts()}
            for name, kept in list(self._kept.items()):
                if reason := self._end_of(kept, living):
                    logger.warning("gave up pin %s of version %d: %s", name, kept.pin.version, reason)
                    self._forget(name)
                    self._crew.router.keep_pins.remote(list(self._kept))
        except MoeClusterError as error:  # no router leads: the next one is told with the next pin, or has none
            logger.info("pins are not told: %s", error)
        finally:
            self._turn.release()

    def _hear(self) -> None:
        """Once: what there was before."""
        if not self._is_told and (told := self._crew.pins_of(self._crew.leader)) is not None:
            self._is_told = True
            self._kept = {pinned.name: _Kept(pinned, told[0]) for pinned in told[1]}

    def _await_told(self, deadline: float) -> None:
        self._hear()
        while not self._is_told:
            if time.monotonic() > deadline:
                raise Unavailable("no router has told which versions are pinned; try again")
            time.sleep(LOOK_AGAIN_S)
            self._hear()

    def _make(self, name: str, ttl_s: float, timeout_s: float) -> Pinned:
        """Between two steps. Without a name it is called by its version, which only the router knows then."""
        leader, router = self._crew.leader, self._crew.router
        try:
            pinned: Pinned = call(leader, router.pin.remote(name, ttl_s), timeout_s)
        except MoeClusterError:
            router.keep_pins.remote(list(self._kept))  # it may be made after all, when nobody waits for it
            raise
        return pinned

    def _end_of(self, kept: _Kept, living: Collection[str]) -> str:
        """Empty if it goes on."""
        if kept.pinned.expires_s is not None and time.time() >= kept.pinned.expires_s:
            return "its time is over"
        if not kept.pinned.is_whole(living):
            return "an expert actor has ended that kept experts of it alone"
        told = self._crew.pins_of(self._crew.leader)
        if told is None or told[0] <= kept.since + TOLD_AFTER_S:
            return ""
        is_there = kept.pinned.name in [pinned.name for pinned in told[1]]
        return "" if is_there else "no router has its trunk any longer"

    def _forget(self, name: str) -> None:
        """Requests are told at once. Memory at expert actors is given back in turn with the steps."""
        created_s = self._kept.pop(name).pinned.created_s
        for _, handle in self._crew.routers().values():
            handle.forget_pin.remote(name, created_s)

    def _check_room(self) -> None:
        if len(self._kept) < self._max_pins:
            return
        listed = ", ".join(f"{kept.pin.name} (version {kept.pin.version})" for kept in self._kept.values())
        raise FailedPrecondition(
            f"there are {len(self._kept)} pins, and router.max_pins is {self._max_pins}: {listed or 'none'}; "
            "unpin one, or raise it"
        )
