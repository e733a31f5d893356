"""The weights of a model directory in place of all that the cluster has.

A death in the middle leaves weights of two models, at expert actors and routers. Requests wait from before the first
weight is replaced until all are, whoever leads by then (`Router.replace_weights`). It is repeated with those that are
there then, also by the next coordinator; what cannot be brought to its end is given up for the last checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from actors.errors import LinkTimeout, MoeClusterError, PeerLost
from cluster.control.coordinator import Coordinator
from cluster.errors import Unavailable
from cluster.fabric.calls import call, is_death
from cluster.fabric.checkpoints import Checkpoints
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.journal import Keeper
from cluster.fabric.options import ROUTER
from cluster.fabric.recovery import LOAD_TIMEOUT_S
from cluster.fabric.routers import Routers
from cluster.fabric.snapshots import Snapshots

logger = logging.getLogger(__name__)

RETRY_S = 0.5
"""After an expert actor's death: until that has been noticed."""


class Imports:
    """One at a time."""

    def __init__(
        self,
        state: Guarded,
        crew: Crew,
        routers: Routers,
        checkpoints: Checkpoints,
        snapshots: Snapshots,
        keeper: Keeper,
    ) -> None:
        self._state, self._crew, self._routers = state, crew, routers
        self._checkpoints, self._snapshots, self._keeper = checkpoints, snapshots, keeper

    def replace_weights(self, directory: Path, timeout_s: float) -> None:
        """`FailedPrecondition` while a job runs, or another import. The directory is checked in full before the first
        weight is touched."""
        with self._state.reading() as coordinator:
            coordinator.jobs.require_idle("a model cannot be imported")
        call(ROUTER, self._crew.router.check_same_architecture.remote(str(directory)), timeout_s)
        with self._state.changing() as coordinator:
            coordinator.begin_import(str(directory))
        self._keeper.write_now()  # before it is true: whoever comes back must not take them for untouched
        self._snapshots.forget()
        self._bring_to_its_end(directory, timeout_s)

    def go_on(self, directory: str) -> None:
        """With one that was under way when the coordinator before this one died: what came of it is not known."""
        threading.Thread(target=self._go_on, args=(Path(directory),), name="import", daemon=True).start()

    def _go_on(self, directory: Path) -> None:
        try:
            self._bring_to_its_end(directory, LOAD_TIMEOUT_S)
            logger.warning("the import of %s was under way, and has been repeated", directory)
        except MoeClusterError as error:
            logger.error("the import of %s was under way, and cannot be repeated: %s", directory, error)
        except Exception:
            logger.exception("an import that was under way stumbled")

    def _bring_to_its_end(self, directory: Path, timeout_s: float) -> None:
        try:
            self._replace(directory, timeout_s)
        except Exception:
            if self._is_cut_off():  # the journal says so until all belongs together again
                with self._state.changing() as coordinator:
                    coordinator.cut_off_import(f"the import of {directory} was cut off")
            else:
                self._end()
            raise
        self._end()

    def _end(self) -> None:
        with self._state.changing() as coordinator:
            coordinator.end_import()
        self._keeper.write_now()  # before the first step: it must not be undone by importing once more
        self._checkpoints.after_change()

    def _replace(self, directory: Path, timeout_s: float) -> None:
        """Again with those that are there then when one dies in the middle."""
        deadline = time.monotonic() + timeout_s
        while True:
            if not self._state.wait_for(_is_complete, max(0.0, deadline - time.monotonic())):
                raise Unavailable(f"while {directory} was imported expert groups were lost; import it again")
            leader = self._crew.leader
            try:
                left_s = max(0.001, deadline - time.monotonic())
                call(ROUTER, self._crew.router.replace_weights.remote(str(directory)), left_s)
            except (PeerLost, LinkTimeout):  # of an expert actor, which is replaced soon
                if time.monotonic() + RETRY_S > deadline:
                    raise
                time.sleep(RETRY_S)
                continue
            except Unavailable as error:
                if not is_death(error):
                    raise
                self._routers.after(leader, error)
                continue
            with self._state.reading() as coordinator:
                if _is_complete(coordinator):  # otherwise what is missing comes back as it was before
                    return

    def _is_cut_off(self) -> bool:
        """Whether weights of both are in use, when nobody works at it any more; also if nobody can tell."""
        try:
            return bool(call(ROUTER, self._crew.router.is_between_models.remote(), LOAD_TIMEOUT_S))
        except MoeClusterError as error:
            logger.warning("the router that leads does not tell what came of an import: %s", error)
            return True


def _is_complete(coordinator: Coordinator) -> bool:
    """Every expert group is somewhere, and nothing comes from a checkpoint."""
    return not coordinator.placement.missing and not coordinator.is_returning
