"""Membership: the actors of the cluster, as they report themselves, and which of them fell silent."""

from __future__ import annotations

import dataclasses

from cluster.backend import ActorStatus

STARTING, READY, LOST = "starting", "ready", "lost"


class Members:
    """Actors by id, in the order in which they were first seen."""

    def __init__(self, heartbeat_timeout_s: float) -> None:
        self._timeout_s = heartbeat_timeout_s
        self._actors: dict[str, ActorStatus] = {}
        self._last_seen_s: dict[str, float] = {}
        self._dead: set[tuple[str, int]] = set()
        self._looked_s: float | None = None

    def seen(self, status: ActorStatus, now: float) -> None:
        """A report is a heartbeat. An actor that was taken for lost because of its silence is back with it."""
        if (status.id, status.pid) in self._dead:
            return  # sent before the process died
        self._actors[status.id] = status
        self._last_seen_s[status.id] = now

    def lose(self, actor_id: str) -> ActorStatus | None:
        """The actor as it was; None if it is unknown or lost already."""
        actor = self._actors.get(actor_id)
        if actor is None or actor.state == LOST:
            return None
        self._actors[actor_id] = dataclasses.replace(actor, state=LOST)
        return actor

    def bury(self, actor_id: str, pid: int | None = None) -> ActorStatus | None:
        """Its process is dead: reports of it that are still on their way count for nothing. -> the actor as it was.

        `pid`: of one that may have died before its first report; None: not known."""
        actor = self._actors.get(actor_id)
        if pid is None and actor is not None:
            pid = actor.pid
        if pid is not None:
            self._dead.add((actor_id, pid))
        return actor

    def is_buried(self, actor_id: str, pid: int | None = None) -> bool:
        """`pid` as of `bury`; without one the last process that was heard of under this name."""
        if pid is None and (actor := self._actors.get(actor_id)) is not None:
            pid = actor.pid
        if pid is None:
            return any(name == actor_id for name, _ in self._dead)
        return (actor_id, pid) in self._dead

    def leave(self, actor_id: str, pid: int | None = None) -> None:
        """It was ended on purpose: forgotten, and what it still has to say counts for nothing."""
        self.bury(actor_id, pid)
        self._actors.pop(actor_id, None)
        self._last_seen_s.pop(actor_id, None)

    def forget_dead(self, role: str) -> None:
        """Others are in their places: that they were there is the ledger's to tell."""
        for actor in self.all():
            if actor.role == role and actor.state == LOST and self.is_buried(actor.id):
                self.leave(actor.id)

    def silent(self, now: float) -> list[str]:
        """Ids of ready actors from whom nothing came for longer than the timeout.

        Starting ones are exempt: loading a large model is silent for minutes, and who starts them watches the clock.
        To be called often: after half the timeout without a call all count as heard, since this process stood still,
        their reports unread, or the clock was set.
        """
        if self._looked_s is not None and now - self._looked_s > self._timeout_s / 2:
            self._last_seen_s = dict.fromkeys(self._last_seen_s, now)
        self._looked_s = now
        return [
            actor.id
            for actor in self._actors.values()
            if actor.state == READY and now - self._last_seen_s[actor.id] > self._timeout_s
        ]

    def all(self) -> tuple[ActorStatus, ...]:
        return tuple(self._actors.values())

    def is_ready(self, actor_id: str) -> bool:
        actor = self._actors.get(actor_id)
        return actor is not None and actor.state == READY

    def has_ready(self, role: str) -> bool:
        return self.count_ready(role) > 0

    def count_ready(self, role: str) -> int:
        return sum(actor.role == role and actor.state == READY for actor in self._actors.values())

    def has_died(self, role: str) -> bool:
        """Whether one of them is dead and none is ready in its place."""
        return not self.has_ready(role) and any(
            actor.role == role and self.is_buried(actor.id) for actor in self._actors.values()
        )

    def regroup(self, actor_id: str, groups: tuple[int, ...]) -> None:
        self._actors[actor_id] = dataclasses.replace(self._actors[actor_id], groups=groups)
