"""Back to the last checkpoint or snapshot: at the start of a cluster, and when something is lost that no living actor
has."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from actors.errors import InvalidInput, LinkError, MoeClusterError, StepAborted
from actors.values import Placement
from cluster.control.coordinator import Coordinator
from cluster.control.past import Past
from cluster.control.rebalancing import named
from cluster.errors import StartupError, Unavailable
from cluster.fabric.calls import call
from cluster.fabric.changes import Changes
from cluster.fabric.checkpoints import Checkpoints, job_in, num_experts_in, sentence
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.options import EXPERT_RESOURCE, ROUTER
from cluster.fabric.scaling import SEEN_TIMEOUT_S, Scaling
from cluster.fabric.snapshots import Snapshots
from cluster.placement.placement import ActorSlot, spread

if TYPE_CHECKING:
    from cluster.checkpoint.store import Found

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 3600.0
AGAIN_S = 2.0
"""After an attempt that failed, e.g. since another actor died."""
NOTICED_S = 3.0
"""An error may come before the death that is behind it is known."""
SETTLED_S = 300.0
"""For a change of placement to end, or to be taken back, while no step is in its way."""


def load_experts(crew: Crew, placement: Placement, found: Found, run: int) -> None:
    """Every expert actor gives up what it holds and takes its groups from the checkpoint."""
    loading = {
        contact.name: handle.restore.remote(placement.held_by(contact.name), found, run)
        for contact, handle in crew.experts()
    }
    for name, ref in loading.items():
        call(name, ref, LOAD_TIMEOUT_S)


def restore_router(crew: Crew, placement: Placement, found: Found, run: int) -> None:
    """The one that lives. After `load_experts`."""
    ref = crew.router.restore.remote(placement, crew.contacts(placement), found, run)
    call(ROUTER, ref, LOAD_TIMEOUT_S)


class Recovery:
    """With a job that runs it is its thread that carries out the return, since it cannot go on before; else one of its
    own."""

    def __init__(
        self,
        state: Guarded,
        crew: Crew,
        changes: Changes,
        scaling: Scaling,
        checkpoints: Checkpoints,
        snapshots: Snapshots,
        control: Any,
        redundancy: int,
    ) -> None:
        """`control`: the coordinator's own handle."""
        self._state, self._crew, self._changes, self._scaling = state, crew, changes, scaling
        self._checkpoints, self._snapshots = checkpoints, snapshots
        self._control, self._redundancy = control, redundancy
        self._thread: threading.Thread | None = None

    def is_needed_after(self, error: MoeClusterError) -> bool:
        """Whether a step failed for this reason: the router died, or the last holder of a group, and there is a
        checkpoint."""
        if not isinstance(error, LinkError | StepAborted | Unavailable):
            return False
        self._state.wait_for(lambda c: not c.is_unsettled, SETTLED_S)  # what it leaves may lack groups
        return self._state.wait_for(lambda c: c.health.can_restore and self._is_needed(c), NOTICED_S)

    def _is_needed(self, coordinator: Coordinator) -> bool:
        """A router that has just joined may not have been heard of yet; it will lead."""
        is_broken = coordinator.placement.missing or coordinator.health.mixed or not self._crew.routers()
        return coordinator.health.can_return and bool(is_broken)

    def heal(self) -> None:
        """To be called often: begins where no job will."""
        if self._thread is not None and self._thread.is_alive():
            return
        with self._state.reading() as coordinator:
            if coordinator.jobs.active() or not self._is_needed(coordinator):
                return
        self._thread = threading.Thread(target=self._heal, name="recovery", daemon=True)
        self._thread.start()

    def _heal(self) -> None:
        try:
            self.go_back(None, lambda: False)
        except MoeClusterError as error:
            logger.error("no return to a checkpoint: %s", error)
        except Exception:
            logger.exception("the return to a checkpoint stumbled")

    def go_back(self, job_id: str | None, should_stop: Callable[[], bool]) -> int | None:
        """Tries until all is back. -> step after which the job goes on; None if it is not in the checkpoint, or
        was told to stop before.

        `InvalidInput` if no checkpoint can be used: nothing will be tried again.
        """
        self._set_returning(True)
        try:
            while not should_stop():
                if self._changes.try_begin("the return to a checkpoint"):
                    try:
                        return self._go_back(job_id)
                    except InvalidInput:
                        with self._state.changing() as coordinator:
                            coordinator.health.can_restore = coordinator.health.is_pristine = False
                        raise
                    except (MoeClusterError, ray.exceptions.RayError) as error:
                        logger.warning("not back at a checkpoint yet: %s", error)
                        self._tell(str(error))
                    finally:
                        self._changes.end()
                time.sleep(AGAIN_S)
            return None
        finally:
            self._set_returning(False)
            self._tell("")

    def _set_returning(self, is_returning: bool) -> None:
        with self._state.changing() as coordinator:
            coordinator.is_returning = is_returning

    def _go_back(self, job_id: str | None) -> int | None:
        with self._state.reading() as coordinator:
            before = coordinator.placement
            needs_router = coordinator.health.is_router_lost and not self._crew.routers()
            has_checkpoint = coordinator.health.can_restore
        if not has_checkpoint:
            self._start_router()
            self._load_router(before, None, 0)
            return None
        found = self._find()
        if needs_router:
            self._start_router()
        num_experts = num_experts_in(found)
        if before.missing or num_experts != before.num_experts:
            placement = self._placement(before, num_experts)
        else:
            placement = replace(before, epoch=before.epoch + 1)
        self._crew.num_experts = num_experts
        run = self._crew.run() + 1
        try:
            load_experts(self._crew, placement, found, run)
            if needs_router:
                self._load_router(placement, found, run)
            else:
                restore_router(self._crew, placement, found, run)
        except InvalidInput as error:  # damaged since it was verified: the next try falls back
            self._snapshots.forget()
            raise Unavailable(str(error)) from error
        num_parameters = None
        if placement.num_experts != before.num_experts:  # a growth since then is undone, as steps are
            num_parameters = self._crew.facts(placement.num_experts).num_parameters
        return self._report(before, placement, found, job_id, num_parameters)

    def _start_router(self) -> None:
        try:
            self._crew.start_router()
        except StartupError as error:
            raise Unavailable(str(error)) from error

    def _load_router(self, placement: Placement, found: Found | None, run: int) -> None:
        try:
            self._crew.load_router(placement, self._control, found, run)
        except StartupError as error:
            raise Unavailable(str(error)) from error
        if not self._state.wait_for(lambda c: not c.health.is_router_lost, SEEN_TIMEOUT_S):
            raise Unavailable("a new router started and then did not answer")

    def _find(self) -> Found:
        """The snapshot in memory if it is newer than what is in storage; else, or without one, as `_find_stored`."""
        kept = self._snapshots.newest()
        if kept is None:
            return self._find_stored()
        if kept.manifest.version > self._checkpoints.vault.newest_version():
            return kept
        try:
            stored = self._find_stored()
        except MoeClusterError as error:
            logger.warning("goes back to the snapshot in memory: %s", error)
            return kept
        return kept if kept.manifest.version > stored.manifest.version else stored

    def _find_stored(self) -> Found:
        """`Unavailable` while the storage is out of reach, `InvalidInput` if nothing there can be used."""
        vault = self._checkpoints.vault
        try:
            found = vault.newest()
        except InvalidInput as error:
            if isinstance(error.__cause__, OSError):
                raise Unavailable(str(error)) from error
            raise
        if found is None:
            raise InvalidInput("holds no checkpoint any more", field=vault.url)
        return found

    def _placement(self, before: Placement, num_experts: int) -> Placement:
        """Over those that live, and new ones where there is room for them now; later ones get theirs by healing."""
        with self._state.reading() as coordinator:
            actors = list(coordinator.actors())
        free = int(ray.available_resources().get(EXPERT_RESOURCE, 0))
        if (count := min(self._scaling.wanted - len(actors), free)) > 0:
            try:
                self._scaling.start(count)
            except StartupError as error:
                logger.warning("goes on without new actors: %s", error)
            with self._state.reading() as coordinator:
                actors = list(coordinator.actors())
        return self._spread(before, num_experts, actors[: num_experts // before.group_size])

    def _spread(self, before: Placement, num_experts: int, actors: list[ActorSlot]) -> Placement:
        if not actors:
            raise Unavailable("no expert actor is left, and no node has room for a new one; waiting")
        # Fewer copies than there should be are made up for by healing, as are actors that hold more than they may.
        redundancy = min(self._redundancy, len({actor.node for actor in actors}))
        return spread(num_experts, before.group_size, actors, redundancy, before.epoch + 1)

    def _report(
        self, before: Placement, placement: Placement, found: Found, job_id: str | None, num_parameters: int | None
    ) -> int | None:
        with self._state.reading() as coordinator:
            waiting = coordinator.jobs.waiting()
        of = job_id or (waiting.id if waiting else "")
        steps = self._steps_in(found, of) if of else {}
        with self._state.changing() as coordinator:
            if coordinator.placement != before:
                raise Unavailable("an actor died meanwhile")
            lost = coordinator.status().version - found.manifest.version
            what = named(before.missing) if before.missing else coordinator.health.mixed or "the router"
            message = f"restored {sentence(found)} after the loss of {what}, {lost} steps run again"
            coordinator.restored(placement, found.manifest.version, steps, message, time.time(), num_parameters)
        self._snapshots.returned_to(found)
        logger.warning(message)
        return steps.get(job_id or "")

    def _steps_in(self, found: Found, job_id: str) -> dict[str, int]:
        """Step of the job that the checkpoint is of; empty if it is not of this job."""
        saved = job_in(found)
        if saved and saved.id == job_id:
            return {job_id: saved.step}
        if self._checkpoints.begun_at(job_id) == found.manifest.version:
            return {job_id: 0}  # it died before its first checkpoint, and these are the weights that it began with
        return {}

    def _tell(self, notice: str) -> None:
        with self._state.changing() as coordinator:
            coordinator.health.notice = notice


def begin_from(state: Guarded, found: Found, past: Past) -> None:
    """At the start: what the checkpoint says of version and job becomes the coordinator's, and what it knew before."""
    job: Any = job_in(found)
    with state.changing() as coordinator:
        coordinator.health.can_restore = True
        coordinator.resumed(found.manifest.version, job, f"resumed {sentence(found)}", time.time(), past)
