"""Checkpoints of a running cluster: every actor copies its state between two steps, which is all that steps wait for;
then each writes its own shard beside them, and the coordinator commits. A copy's memory is free when it is written;
where nobody comes to write it, it stays until the next is made. Nobody else drops it: what is told to an actor beside
the router's questions may come late, and would meet the next copy."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import InvalidInput, MoeClusterError
from actors.values import Course, SnapshotTaken
from cluster.backend import Checkpoint, Job
from cluster.checkpoint.disk import DISK
from cluster.checkpoint.files import open_files
from cluster.config import ClusterConfig
from cluster.control.coordinator import Coordinator
from cluster.control.jobtable import job_of_dict, job_to_dict
from cluster.control.model import ModelFacts
from cluster.errors import NotFound, StorageFull, Unavailable
from cluster.fabric.calls import call
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.options import ROUTER

if TYPE_CHECKING:  # it imports torch, which takes a second that only saving and loading need
    from cluster.checkpoint.manifest import Shard
    from cluster.checkpoint.store import CheckpointStore, Draft, Found

logger = logging.getLogger(__name__)

SNAPSHOT_TIMEOUT_S = 600.0
WRITE_TIMEOUT_S = 3600.0
AFTER_FAILURE_S = 10.0
"""Until a failed one is tried again between two periodic ones: each try makes a step wait. After a change of the model,
or a job's end, the second try waits for twice as long, and so on."""
MOST_AFTER_FAILURE_S = 300.0
ROOM_AGAIN_S = 3.0
"""Between two looks whether a full disk has room again."""
_GROWN_TO = "grown_to"
"""Fact of a model that has more experts than its config says."""


def vault_url(config: ClusterConfig) -> str:
    url = config.checkpoint.url or str(Path(config.storage.root).resolve() / "checkpoints")
    return open_files(url, DISK).url


class Vault:
    """Where a cluster's checkpoints are, and which of them it can load."""

    def __init__(self, config: ClusterConfig, model: ModelFacts) -> None:
        self._config = config
        self._facts = _facts(config, model)
        self.url = vault_url(config)

    def store(self) -> CheckpointStore:
        from cluster.checkpoint.store import CheckpointStore

        return CheckpointStore(self.url, self._config.checkpoint.keep)

    def newest(self) -> Found | None:
        """Verified in full; None if there is none. What had to be skipped is logged.

        `CheckpointError` that says what is wrong with each if none is right, `InvalidInput` if it is another model's.
        """
        if not open_files(self.url, DISK).folders():
            return None
        found = self.store().latest()
        if found is not None:
            for skipped in found.skipped:
                logger.warning("a newer checkpoint is skipped: %s", skipped)
            found.manifest.check_model(self._facts_of(num_experts_in(found)))
        return found

    def newest_version(self) -> int:
        """Quickly, since only sizes are verified; -1 if there is none, or nobody can tell."""
        try:
            return max((found.manifest.version for found in self.all()[:1]), default=-1)
        except InvalidInput as error:
            logger.warning("the newest checkpoint is not known: %s", error)
            return -1

    def all(self) -> list[Found]:
        """Newest first; only sizes are verified."""
        return self.store().committed() if open_files(self.url, DISK).folders() else []

    def manifest_of(self, taken: SnapshotTaken, job: Mapping[str, Any] | None, shards: tuple[Shard, ...]) -> Any:
        from cluster.checkpoint.manifest import Manifest

        return Manifest(taken.version, time.time(), self._facts_of(taken.num_experts), job, shards)

    def _facts_of(self, num_experts: int) -> dict[str, Any]:
        """Those of the config's model; for one that has grown, how far."""
        grown = {_GROWN_TO: num_experts} if num_experts not in (0, self._facts["num_experts"]) else {}
        return {**self._facts, **grown}


def num_experts_in(found: Found) -> int:
    """Experts of every MoE layer: a model may have grown since it was started."""
    facts = found.manifest.model
    return int(facts.get(_GROWN_TO, facts["num_experts"]))


def told(found: Found) -> Checkpoint:
    """As people see it."""
    job = found.manifest.job or {}
    return Checkpoint(
        version=found.manifest.version,
        created_s=found.manifest.created_s,
        url=found.url,
        size_bytes=sum(shard.num_bytes for shard in found.manifest.shards),
        job_id=str(job.get("id", "")),
        job_step=int(job.get("step", 0)),
    )


def job_in(found: Found) -> Job | None:
    """The job that a checkpoint was written in, or after."""
    return None if found.manifest.job is None else job_of_dict(found.manifest.job, found.url)


def sentence(found: Found) -> str:
    """For people: which one it is, and which newer ones cannot be used."""
    skipped = "".join(f"; skipped {text}" for text in found.skipped)
    return f"version {found.manifest.version} from {found.url}{skipped}"


class Checkpoints:
    """Thread-safe. One is written at a time."""

    def __init__(self, vault: Vault, every_steps: int, state: Guarded, crew: Crew) -> None:
        self.vault = vault
        self._every_steps, self._state, self._crew = every_steps, state, crew
        self._turn = threading.Lock()
        self._is_owed = False
        """One was due while another was being written, and none has been taken since."""
        self._owed_from_s = math.inf
        """One failed: from then on (monotonic) it is made up for."""
        self._owed_s = self._taken_s = self._saved_s = -math.inf
        """Monotonic: when something came to be that an orderly end must not lose, when the last snapshot was taken, and
        when the last one that is in a checkpoint was."""
        self._full = ""
        """Why the last one that was due could not be written; empty if there is room, as far as is known."""
        self._again_at_s, self._again_after_s = math.inf, AFTER_FAILURE_S
        """When one that failed after a change or a job's end is tried again (monotonic), and the wait after that."""
        self._course_lock = threading.Lock()
        self._course: tuple[str, Course] | None = None
        """Job that the router's moments belong to, and where its steps are counted from."""

    def job_begins(self, job_id: str, begin: Callable[[], Course], step: int) -> Course:
        """`begin` makes the router begin, or go on after `step`. A snapshot that is taken right after it waits to learn
        whose it is."""
        with self._course_lock:
            course = begin()
            self._course = job_id, replace(course, version=course.version - step)
        return course

    def job_goes_on(self, job_id: str, course: Course) -> None:
        """As the router says to a coordinator that is new to it; `course`: what its steps are counted from."""
        with self._course_lock:
            self._course = job_id, course

    # -- when ---------------------------------------------------------------------------------------------------------

    def after_step(self, job_id: str, step: int, should_stop: Callable[[], bool]) -> None:
        """Between two steps of a job: takes a snapshot when it is time. Waits for room if there was none."""
        if self._full:
            self._wait_for_room(job_id, should_stop)
        elif self._every_steps and (step % self._every_steps == 0 or self._is_late()):
            self._save_beside(job_id)
            self._wait_for_the_first(should_stop)

    def _is_late(self) -> bool:
        return self._is_owed or time.monotonic() >= self._owed_from_s

    def _wait_for_the_first(self, should_stop: Callable[[], bool]) -> None:
        """As long as there is no checkpoint at all there is nothing that lost weights could come back from."""
        while self._turn.locked() and not should_stop():
            with self._state.reading() as coordinator:
                if coordinator.health.can_restore:
                    return
            time.sleep(0.02)

    def begun_at(self, job_id: str) -> int | None:
        """Version at the job's begin, if it is the last that began."""
        with self._course_lock:
            return self._course[1].version if self._course and self._course[0] == job_id else None

    def owe(self) -> None:
        """What is there now is to be in a checkpoint, also if everything ends in order before: `finish` sees to it."""
        if self._every_steps:
            self._owed_s = time.monotonic()

    def finish(self, timeout_s: float) -> None:
        """Everything ends: waits for what is being written, and writes what is owed."""
        deadline = time.monotonic() + timeout_s
        if not self._turn.acquire(timeout=timeout_s):
            logger.warning("the checkpoint that is being written is given up after %.0f s", timeout_s)
            return
        self._turn.release()
        if self._owed_s > self._saved_s:
            try:
                self.save(_remaining(deadline))
            except Exception as error:  # of the storage, too: the end must come all the same
                logger.warning("the end of all loses what is in no checkpoint: %s", error)

    def after_job(self) -> None:
        """It has ended: what it has come to, and that it need not be resumed."""
        if self._every_steps:
            self._save_or_owe()

    def after_change(self) -> None:
        """Of the model, by an import or a growth. In the background: a return to older ones would undo it."""
        self.owe()
        threading.Thread(target=self.after_job, name="checkpoint", daemon=True).start()

    def look(self) -> None:
        """To be called often: begins another try at what failed after a change or a job's end."""
        if time.monotonic() >= self._again_at_s:
            self._again_at_s = math.inf
            self.after_change()

    def _save_or_owe(self) -> None:
        """The next periodic one may be far, or never come: it is tried again until any has been written."""
        try:
            self.save(WRITE_TIMEOUT_S)
        except Exception as error:
            if not isinstance(error, MoeClusterError):
                logger.exception("a checkpoint was not written")
            after_s, self._again_after_s = self._again_after_s, min(2 * self._again_after_s, MOST_AFTER_FAILURE_S)
            unsaved = f"a restart would lose what is in no checkpoint: {error}; tried again in {after_s:.0f} s"
            logger.warning(unsaved)
            with self._state.changing() as coordinator:
                coordinator.health.unsaved = unsaved
            self._again_at_s = time.monotonic() + after_s

    def save(self, timeout_s: float) -> Found:
        """Now, after the one that is being written. `StorageFull`, or why it failed."""
        deadline = time.monotonic() + timeout_s
        if not self._turn.acquire(timeout=timeout_s):
            raise Unavailable("another checkpoint is still being written; try again")
        try:
            return self._write(self._take(deadline), deadline)
        finally:
            self._turn.release()

    def _save_beside(self, job_id: str) -> None:
        if not self._turn.acquire(blocking=False):
            if not self._is_owed:
                logger.info("a checkpoint is late: the one before is still being written")
            self._is_owed = True
            return
        try:
            taken = self._take(time.monotonic() + SNAPSHOT_TIMEOUT_S)
        except MoeClusterError as error:
            self._turn.release()
            self._note_failure(job_id, error)  # the next step finds out what is wrong with the cluster
        else:
            threading.Thread(target=self._write_beside, args=(job_id, taken), name="checkpoint", daemon=True).start()

    def _write_beside(self, job_id: str, taken: SnapshotTaken) -> None:
        try:
            self._write(taken, time.monotonic() + WRITE_TIMEOUT_S)
        except StorageFull as error:
            self._full = str(error)
        except MoeClusterError as error:
            self._note_failure(job_id, error)
        except Exception as error:
            logger.exception("a checkpoint was not written")
            self._note_failure(job_id, error)
        finally:
            self._turn.release()

    def _note_failure(self, job_id: str, error: Exception) -> None:
        self._owed_from_s = time.monotonic() + AFTER_FAILURE_S
        logger.warning("no checkpoint: %s", error)
        with self._state.changing() as coordinator:
            coordinator.jobs.note(job_id, f"no checkpoint was written: {error}", time.time())

    # -- a full disk --------------------------------------------------------------------------------------------------

    def _wait_for_room(self, job_id: str, should_stop: Callable[[], bool]) -> None:
        logger.warning("paused: %s", self._full)
        self._tell(job_id, f"paused: no room for a checkpoint at {self.vault.url}; waiting")
        try:
            while self._full and not should_stop():
                self._try_again(job_id)
                until = time.monotonic() + ROOM_AGAIN_S
                while self._full and not should_stop() and time.monotonic() < until:
                    time.sleep(0.1)
        finally:
            self._full = ""
            self._tell(job_id, "")

    def _try_again(self, job_id: str) -> None:
        try:
            found = self.save(WRITE_TIMEOUT_S)
        except StorageFull as error:
            self._full = str(error)
        except MoeClusterError as error:
            self._full = ""
            self._note_failure(job_id, error)
        else:
            self._full = ""
            news = f"goes on: there is room again, {sentence(found)} is written"
            with self._state.changing() as coordinator:
                coordinator.jobs.note(job_id, news, time.time())

    def _tell(self, job_id: str, notice: str) -> None:
        with self._state.changing() as coordinator:
            coordinator.health.notice = notice
            if notice:
                coordinator.jobs.note(job_id, notice, time.time())

    # -- how ----------------------------------------------------------------------------------------------------------

    def _take(self, deadline: float) -> SnapshotTaken:
        self._is_owed = False  # what is due from here on is due after this one
        self._taken_s = time.monotonic()
        taken: SnapshotTaken = call(ROUTER, self._crew.router.take_snapshot.remote(), _remaining(deadline))
        return taken

    def _write(self, taken: SnapshotTaken, deadline: float) -> Found:
        names = (*taken.actors, ROUTER)
        store = self.vault.store()
        draft = store.begin(taken.version)
        try:
            shards = self._shards(names, draft, deadline)
            found = store.commit(draft, self.vault.manifest_of(taken, self.job_at(taken), shards))
        except MoeClusterError:
            store.discard(draft)
            raise
        self._saved_s = self._taken_s
        self._owed_from_s = self._again_at_s = math.inf
        self._again_after_s = AFTER_FAILURE_S
        with self._state.changing() as coordinator:
            coordinator.health.can_restore, coordinator.health.unsaved = True, ""
        logger.info("checkpoint of %s", sentence(found))
        return found

    def _shards(self, names: tuple[str, ...], draft: Draft, deadline: float) -> tuple[Shard, ...]:
        refs = {name: self._handle(name).write_snapshot.remote(draft) for name in names}
        shards: list[Shard] = []
        errors: list[MoeClusterError] = []
        for name, ref in refs.items():
            try:
                shards.append(call(name, ref, _remaining(deadline)))
            except MoeClusterError as error:
                errors.append(error)
        if errors:
            # The first who finds the storage full removes the draft, so that others may not find it.
            raise min(errors, key=lambda error: not isinstance(error, StorageFull))
        return tuple(shards)

    def _handle(self, name: str) -> Any:
        """The trunk's snapshot is where it was taken, on the router that leads."""
        return self._crew.router if name == ROUTER else self._crew.handle(name)

    def job_at(self, taken: SnapshotTaken) -> Mapping[str, Any] | None:
        """The job whose steps led to this state, as a manifest has it."""
        with self._course_lock:
            course = self._course
        if course is None or course[1].run != taken.run:
            return None
        job_id, begun = course
        with self._state.reading() as coordinator:
            job = _job(coordinator, job_id)
        return None if job is None else job_to_dict(replace(job, step=taken.version - begun.version))


def _job(coordinator: Coordinator, job_id: str) -> Job | None:
    try:
        return coordinator.jobs.get(job_id)
    except NotFound:  # ended long ago, and forgotten
        return None


def _facts(config: ClusterConfig, model: ModelFacts) -> dict[str, Any]:
    """What must agree for a checkpoint to be loaded."""
    return {
        "architecture": model.architecture,
        "num_parameters": model.num_parameters,
        "num_moe_layers": model.num_moe_layers,
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "vocab_size": model.vocab_size,
        "expert_bytes": model.expert_bytes,
        "dtype": config.router.dtype,
        "gate": config.model.gate.kind,
    }


def _remaining(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())
