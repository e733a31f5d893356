"""Snapshots in the memory of actors and of their peers: newer than the checkpoint on disk, as long as nobody who keeps
the only copy of a part has died.

Steps wait only while every actor copies its state; then each sends its part to a peer beside them. The last complete
snapshot stays until the next one is complete everywhere.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray

from actors.errors import MoeClusterError
from actors.values import SnapshotTaken
from cluster.errors import Unavailable
from cluster.fabric.calls import call
from cluster.fabric.checkpoints import SNAPSHOT_TIMEOUT_S, Checkpoints
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.options import ROUTER
from cluster.placement.peers import peers
from cluster.placement.placement import ActorSlot

if TYPE_CHECKING:  # it imports torch
    from cluster.checkpoint.manifest import Shard
    from cluster.checkpoint.memory import Holder, Kept, Told
    from cluster.checkpoint.store import Found

logger = logging.getLogger(__name__)

KEEP_TIMEOUT_S = 600.0
ASK_TIMEOUT_S = 10.0
MAX_NAMED = 16
"""Snapshots of before that actors are told to drop, each time: it may be the first time that one hears it."""


class Snapshots:
    """Thread-safe. One is made at a time."""

    def __init__(self, every_steps: int, state: Guarded, crew: Crew, checkpoints: Checkpoints) -> None:
        """`every_steps` of a job; 0: none are made."""
        self._every_steps, self._state, self._crew, self._checkpoints = every_steps, state, crew, checkpoints
        self._turn = threading.Lock()
        self._is_owed = False
        """One was due while another was on its way: it is made up for."""
        self._lock = threading.Lock()
        self._last: Kept | None = None
        self._made: deque[str] = deque(maxlen=MAX_NAMED)
        """Ids of the newest, complete or not."""
        self._era = 0
        """Counts what makes snapshots of before useless: one that was begun before is not taken for complete."""

    # -- when ---------------------------------------------------------------------------------------------------------

    def after_step(self, job_id: str, step: int) -> None:
        """Between two steps of a job. An actor that cannot be reached costs a snapshot: the next step finds out."""
        if self._every_steps and (self._is_owed or step % self._every_steps == 0):
            self._is_owed = not self._turn.acquire(blocking=False)
            if not self._is_owed:
                self._begin(job_id)

    def after_job(self) -> None:
        """It has ended: what it has come to."""
        if self._every_steps and self._turn.acquire(timeout=KEEP_TIMEOUT_S):
            self._begin("")

    def _begin(self, job_id: str) -> None:
        """In turn, which ends with what it starts."""
        with self._lock:
            era = self._era
        try:
            leader = self._crew.leader
            taken = call(leader, self._crew.router.take_snapshot.remote(True), SNAPSHOT_TIMEOUT_S)
        except Exception as error:
            self._turn.release()
            if not isinstance(error, MoeClusterError):
                raise
            logger.warning("no snapshot: %s", error)
        else:
            args = leader, taken, era, job_id
            threading.Thread(target=self._finish, args=args, name="snapshot", daemon=True).start()

    def _finish(self, leader: str, taken: SnapshotTaken, era: int, job_id: str) -> None:
        try:
            self._complete(self._keep(leader, taken), era, taken.run)
        except (MoeClusterError, ray.exceptions.RayError) as error:
            logger.warning("no snapshot of version %d: %s", taken.version, error)
            if job_id:
                with self._state.changing() as coordinator:
                    coordinator.jobs.note(
                        job_id, f"no snapshot is kept of version {taken.version}: {error}", time.time()
                    )
        except Exception:
            logger.exception("a snapshot was not kept")
        finally:
            self._drop_others()
            self._turn.release()

    def _complete(self, kept: Kept, era: int, run: int) -> None:
        with self._lock:
            if era != self._era:
                return
            self._last = kept
        self._tell(kept, run)
        with self._state.changing() as coordinator:
            coordinator.health.can_restore = True
        logger.info("a snapshot of version %d is kept in memory", kept.manifest.version)

    # -- how ----------------------------------------------------------------------------------------------------------

    def _keep(self, leader: str, taken: SnapshotTaken) -> Kept:
        """`MoeClusterError` if an actor that has a part of it, or the peer of one, has died meanwhile."""
        from cluster.checkpoint.memory import Kept, KeptDraft

        with self._lock:
            draft = KeptDraft(secrets.token_hex(8), taken.version, self._last.id if self._last else "")
            self._made.append(draft.id)
        keepers = self._keepers()
        writers = {**{name: name for name in taken.actors}, ROUTER: leader}
        if gone := set(writers.values()) - set(keepers):
            raise Unavailable(f"{', '.join(sorted(gone))} ended before its part was sent")
        chosen = peers(
            [ActorSlot(writer, keepers[writer][1]) for writer in writers.values()],
            [ActorSlot(name, node) for name, (_, node) in keepers.items()],
        )
        holders: dict[str, tuple[Holder, ...]] = {}
        refs: dict[str, Any] = {}
        for part, writer in writers.items():
            peer = chosen[writer]
            here = keepers[writer][0]
            there = keepers[peer.id][0] if peer else None
            holders[part] = (here, there) if there else (here,)
            refs[part] = self._crew.handle(writer).keep_snapshot.remote(draft, there)
        job = self._checkpoints.job_at(taken)
        shards: list[Shard] = [call(writers[part], ref, KEEP_TIMEOUT_S) for part, ref in refs.items()]
        manifest = self._checkpoints.vault.manifest_of(taken, job, tuple(shards))
        return Kept(manifest, "the memory of the actors", (), draft.id, holders)

    def _keepers(self) -> dict[str, tuple[Holder, str]]:
        """Every expert actor, then every router: how it is reached, and its node."""
        from cluster.checkpoint.memory import Holder

        experts = {
            contact.name: (Holder(contact.name, contact.pid, contact.exchange), contact.node_id)
            for contact, _ in self._crew.experts()
        }
        routers = {
            name: (Holder(name, contact.pid, contact.address), contact.node_id)
            for name, (contact, _) in self._crew.routers().items()
        }
        return experts | routers

    def _drop_others(self) -> None:
        """Everywhere, also of a snapshot that came to nothing. By their names, since nobody waits until it is done: the
        next may be on its way by then."""
        with self._lock:
            ids = [each for each in self._made if self._last is None or each != self._last.id]
        for handle in self._everybody():
            with suppress(Unavailable, ray.exceptions.RayError):
                handle.drop_kept.remote(ids)

    def _everybody(self) -> list[Any]:
        return [handle for _, handle in (*self._crew.experts(), *self._crew.routers().values())]

    # -- for a coordinator that comes back ----------------------------------------------------------------------------

    def _tell(self, kept: Kept, run: int) -> None:
        """Everybody, so that whoever lives knows where the parts are."""
        from cluster.checkpoint.memory import Told

        for handle in self._everybody():
            with suppress(Unavailable, ray.exceptions.RayError):
                handle.remember_kept.remote(Told(kept, run))

    def recall(self, version: int) -> None:
        """After the death of the coordinator before: the last complete snapshot, as the actors were told of it, unless
        it is of a run that has ended. `version`: of the weights now."""
        if not self._every_steps:
            return
        run = self._crew.run()
        told = [said for handle in self._everybody() if (said := _said(handle)) is not None and said.run == run]
        kept = max(
            (said.kept for said in told if said.kept.manifest.version <= version),
            key=lambda kept: (kept.manifest.version, kept.manifest.created_s),
            default=None,
        )
        if kept is None:
            return
        with self._lock:
            self._last = kept
            self._made.append(kept.id)
        with self._state.changing() as coordinator:
            coordinator.health.can_restore = True
        logger.info("the snapshot of version %d in memory is known again", kept.manifest.version)

    # -- what there is ------------------------------------------------------------------------------------------------

    def newest(self) -> Kept | None:
        """The last one that was complete, if every part of it is still with somebody who lives. It stays that one: what
        is being made at this moment will not take its place."""
        with self._lock:
            self._era += 1
            kept = self._last
        if kept is None:
            return None
        from cluster.checkpoint.memory import alive

        living = {name: holder.pid for name, (holder, _) in self._keepers().items()}
        if alive(kept, living):
            return kept
        logger.warning("the snapshot of version %d is no longer complete", kept.manifest.version)
        return None

    def returned_to(self, found: Found) -> None:
        """Everybody is at this snapshot or checkpoint now: others are of steps that do not count any more."""
        with self._lock:
            self._era += 1
            if self._last is not found:
                self._last = None
            kept = self._last
        if kept is not None:
            self._tell(kept, self._crew.run())  # the return has begun another run

    def forget(self) -> None:
        """None of them can be used any more, e.g. since the weights were replaced."""
        with self._lock:
            self._era += 1
            self._last = None


def _said(handle: Any) -> Told | None:
    try:
        told: Told | None = call("an actor", handle.last_kept.remote(), ASK_TIMEOUT_S)
        return told
    except MoeClusterError as error:
        logger.warning("it does not tell what snapshot it keeps: %s", error)
        return None
