"""When checkpoints are written, and what a full disk does to a job. Actors and storage are simulated; no Ray starts."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.errors import CheckpointError, InvalidInput, MoeClusterError, PeerLost
from actors.values import Course, SnapshotTaken
from cluster.backend import ActorStatus, JobState
from cluster.checkpoint.manifest import Manifest, Shard
from cluster.checkpoint.store import Draft, Found, write_shard
from cluster.config import JobConfig
from cluster.configfile import find_config, load_cluster
from cluster.control.coordinator import Coordinator
from cluster.control.jobtable import job_of_dict
from cluster.control.model import ModelFacts
from cluster.errors import StorageFull, Unavailable
from cluster.fabric import checkpoints as edge
from cluster.fabric.checkpoints import Checkpoints, Vault
from cluster.fabric.guarded import Guarded
from cluster.placement.placement import ActorSlot, spread

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)
WAIT_S = 20.0


class Storage:
    """Vault and store in one. Writes wait for `go`, and fail with `fault` while there is one."""

    url = "/somewhere"

    def __init__(self) -> None:
        self.saved: list[Manifest] = []
        self.discarded = 0
        self.fault: MoeClusterError | None = None
        self.fault_now: MoeClusterError | None = None
        """That of the checkpoint at hand: all of it meets the same."""
        self.go = threading.Event()
        self.go.set()

    def store(self) -> Storage:
        return self

    def begin(self, version: int) -> Draft:
        self.fault_now = self.fault
        return Draft(f"{self.url}/{version}", version)

    def manifest_of(self, taken: SnapshotTaken, job: Mapping[str, Any] | None, shards: tuple[Shard, ...]) -> Manifest:
        return Manifest(taken.version, 0.0, {}, job, shards)

    def commit(self, draft: Draft, manifest: Manifest) -> Found:
        self.saved.append(manifest)
        return Found(manifest, draft.url, ())

    def discard(self, draft: Draft) -> None:
        self.discarded += 1


class Crew:
    """Handles whose remote calls give functions, which `call` calls."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.version, self.run = 0, 1
        self.num_taken = 0
        self.fault: MoeClusterError | None = None
        take_snapshot = SimpleNamespace(remote=lambda: self._take)
        self.router = SimpleNamespace(take_snapshot=take_snapshot, **vars(self.handle("router-0")))

    def handle(self, name: str) -> Any:
        return SimpleNamespace(
            write_snapshot=SimpleNamespace(remote=lambda draft: lambda: self._write(name)),
        )

    def _take(self) -> SnapshotTaken:
        self.num_taken += 1
        if self.fault:
            raise self.fault
        return SnapshotTaken(self.version, self.run, ("e0", "e1"))

    def _write(self, name: str) -> Shard:
        assert self.storage.go.wait(WAIT_S)
        if (fault := self.storage.fault_now) and name == "e1":
            raise fault
        if fault:
            raise CheckpointError("the draft is gone")
        return Shard(name, 1, "0" * 64)


class Bench:
    def __init__(self, every_steps: int) -> None:
        placement = spread(8, 2, (ActorSlot("e0", "n0"), ActorSlot("e1", "n1")))
        self.coordinator = Coordinator(MODEL, placement)
        self.coordinator.health.can_restore = True
        """There is one of an earlier job."""
        for name, role in (("r0", "router"), ("e0", "expert"), ("e1", "expert")):
            self.coordinator.actor_seen(ActorStatus(name, role, "n0", 1, "ready", device="cpu", version=0), 0.0)
        self.storage = Storage()
        self.crew = Crew(self.storage)
        self.checkpoints = Checkpoints(self.storage, every_steps, Guarded(self.coordinator), self.crew)  # type: ignore[arg-type]
        self.job = self.coordinator.jobs.submit(JobConfig(steps=20), "mine", 1.0).id
        self.coordinator.step(1.0)
        self.checkpoints.job_begins(self.job, lambda: Course(1, 0), 0)

    def step(self, number: int, should_stop: Callable[[], bool] = lambda: False) -> None:
        self.crew.version = number
        self.coordinator.step_committed(self.job, number, {"loss": 1.0}, 2.0)
        self.checkpoints.after_step(self.job, number, should_stop)

    def written(self, count: int) -> list[int]:
        """Versions of the checkpoints once there are so many."""
        deadline = time.monotonic() + WAIT_S
        while len(self.storage.saved) < count or self.checkpoints._turn.locked():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return [manifest.version for manifest in self.storage.saved]

    def notes(self) -> list[str]:
        events, _ = self.coordinator.jobs.events(self.job, 0, 1000)
        return [event.message for event in events if event.kind == "note"]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(edge, "call", lambda who, ref, timeout_s: ref())
    monkeypatch.setattr(edge, "ROOM_AGAIN_S", 0.02)
    yield
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(WAIT_S)
            assert not thread.is_alive(), "it would go on with Ray's calls"


def test_every_so_many_steps_with_the_step_of_the_job() -> None:
    bench = Bench(2)
    bench.checkpoints.after_step(bench.job, 0, lambda: False)
    assert bench.written(1) == [0]
    for number in range(1, 6):
        bench.step(number)
        bench.written(1 + number // 2)
    assert bench.written(3) == [0, 2, 4]
    jobs = [job_of_dict(manifest.job or {}, "test") for manifest in bench.storage.saved]
    assert [(job.id, job.request_id, job.step, job.state) for job in jobs] == [
        (bench.job, "mine", step, JobState.RUNNING) for step in (0, 2, 4)
    ]
    assert jobs[0].config == JobConfig(steps=20)


def test_steps_do_not_wait_for_writing_and_what_was_skipped_is_made_up_for() -> None:
    bench = Bench(3)
    bench.storage.go.clear()
    for number in range(1, 7):
        bench.step(number)
    assert bench.storage.saved == []
    bench.storage.go.set()
    assert bench.written(1) == [3]
    bench.step(7)
    assert bench.written(2) == [3, 7]
    bench.step(8)
    assert bench.written(2) == [3, 7]
    bench.step(9)
    assert bench.written(3) == [3, 7, 9]


def test_0_steps_means_on_request_only() -> None:
    bench = Bench(0)
    for number in range(1, 4):
        bench.step(number)
    bench.checkpoints.after_job()
    assert bench.storage.saved == []
    assert bench.checkpoints.save(1.0).manifest.version == 3


def test_the_state_of_another_run_is_no_state_of_the_job() -> None:
    bench = Bench(1)
    bench.crew.run = 2
    assert bench.checkpoints.save(1.0).manifest.job is None


def test_after_its_end_the_job_is_saved_as_ended() -> None:
    bench = Bench(100)
    bench.step(1)
    bench.coordinator.jobs.failed(bench.job, "because", 3.0)
    bench.checkpoints.after_job()
    (manifest,) = bench.storage.saved
    assert manifest.job is not None
    assert (manifest.job["state"], manifest.job["step"], manifest.job["error"]) == ("failed", 1, "because")


def test_an_actor_that_cannot_be_reached_costs_a_checkpoint_and_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(edge, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time, sleep=time.sleep))
    bench = Bench(10)
    bench.crew.fault = PeerLost("gone", peer="e0")
    for number in range(1, 11):
        bench.step(number)
    assert any("no checkpoint was written: gone" in note for note in bench.notes())
    bench.crew.fault = None
    bench.step(11)
    assert bench.written(0) == [], "not at every step"
    clock[0] += edge.AFTER_FAILURE_S
    bench.step(12)
    assert bench.written(1) == [12]


@pytest.mark.parametrize("fault", [StorageFull("no room"), Unavailable("no router leads"), OSError("no such device")])
def test_what_a_change_made_due_is_tried_again_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """No job runs, as after an import: without another try a restart would be one to the model before."""
    clock = [1000.0]
    monkeypatch.setattr(edge, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time, sleep=time.sleep))
    bench = Bench(100)
    bench.crew.fault = fault  # type: ignore[assignment]

    def tries(number: int) -> None:
        wait_for(lambda: bench.crew.num_taken == number and math.isfinite(bench.checkpoints._again_at_s))
        assert str(fault) in bench.coordinator.status().message
        assert bench.coordinator.status().ready

    bench.checkpoints.after_change()
    tries(1)
    for number, after_s in enumerate((10, 20, 40, 80, 160, 300, 300), 2):
        assert f"tried again in {after_s} s" in bench.coordinator.status().message
        clock[0] += after_s - 1
        bench.checkpoints.look()
        assert bench.crew.num_taken == number - 1
        clock[0] += 1
        bench.checkpoints.look()
        bench.checkpoints.look()
        tries(number)
    bench.crew.fault = None
    clock[0] += edge.MOST_AFTER_FAILURE_S
    bench.checkpoints.look()
    assert bench.written(1) == [0]
    assert bench.coordinator.status().message == ""
    clock[0] += edge.MOST_AFTER_FAILURE_S
    bench.checkpoints.look()
    assert bench.written(1) == [0]


def test_any_checkpoint_makes_up_for_the_one_after_a_job() -> None:
    bench = Bench(100)
    bench.storage.fault = StorageFull("no room")
    bench.checkpoints.after_job()
    assert "no room" in bench.coordinator.status().message
    bench.storage.fault = None
    bench.checkpoints.save(WAIT_S)
    assert bench.coordinator.status().message == ""
    assert bench.checkpoints._again_at_s == math.inf


def test_an_orderly_end_waits_for_what_is_being_written_and_writes_what_is_owed() -> None:
    bench = Bench(2)
    bench.storage.go.clear()
    bench.step(1)
    bench.step(2)
    bench.step(3)
    bench.checkpoints.owe()
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(bench.checkpoints.finish, WAIT_S)
        time.sleep(0.05)
        assert not finished.done()
        bench.storage.go.set()
        finished.result(WAIT_S)
    assert bench.written(2) == [2, 3]
    bench.checkpoints.finish(WAIT_S)
    assert bench.written(2) == [2, 3], "nothing is owed any more"


@pytest.mark.parametrize("fault", [StorageFull("no room"), OSError("no such device")])
def test_an_orderly_end_comes_whatever_is_wrong(fault: Exception) -> None:
    bench = Bench(1)
    bench.crew.fault = fault  # type: ignore[assignment]
    bench.checkpoints.owe()
    bench.checkpoints.finish(WAIT_S)
    assert bench.crew.num_taken == 1
    bench.crew.fault = None
    bench.storage.go.clear()
    bench.step(1)
    bench.checkpoints.finish(0.05)
    assert bench.storage.saved == []
    bench.storage.go.set()
    assert bench.written(1) == [1]


def test_an_orderly_end_writes_nothing_where_nothing_is_owed() -> None:
    for bench in (Bench(0), Bench(100)):
        bench.step(1)
        if not bench.checkpoints._every_steps:
            bench.checkpoints.owe()
        bench.checkpoints.finish(WAIT_S)
        assert bench.crew.num_taken == 0


def test_one_at_a_time() -> None:
    bench = Bench(1)
    bench.storage.go.clear()
    bench.step(1)
    with pytest.raises(Unavailable, match="still being written"):
        bench.checkpoints.save(0.05)
    bench.storage.go.set()
    assert bench.checkpoints.save(WAIT_S).manifest.version == 1


def fill(bench: Bench) -> None:
    """A checkpoint is due and finds no room."""
    bench.storage.fault = StorageFull("no room to write /somewhere")
    bench.step(1)
    bench.written(0)


def test_a_full_disk_pauses_the_job_until_there_is_room() -> None:
    bench = Bench(1)
    fill(bench)
    paused = threading.Thread(target=lambda: bench.step(2))
    paused.start()
    try:
        wait_for(lambda: "paused: no room for a checkpoint at /somewhere" in bench.coordinator.status().message)
        time.sleep(0.1)
        assert paused.is_alive()
        assert bench.coordinator.status().ready, "serving goes on"
    finally:
        bench.storage.fault = None
        paused.join(WAIT_S)
    assert not paused.is_alive()
    assert bench.written(1) == [2]
    assert bench.coordinator.status().message == ""
    assert any("paused: no room" in note for note in bench.notes())
    assert "goes on: there is room again" in bench.notes()[-1]
    assert bench.storage.discarded > 1


def test_a_paused_job_can_be_cancelled() -> None:
    bench = Bench(1)
    fill(bench)
    stop = threading.Event()
    paused = threading.Thread(target=lambda: bench.step(2, stop.is_set))
    paused.start()
    wait_for(lambda: "paused" in bench.coordinator.status().message)
    stop.set()
    paused.join(WAIT_S)
    assert not paused.is_alive()
    assert bench.coordinator.status().message == ""


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- What is there -----------------------------------------------------------------------------------------------


def vault(root: Path, **model: int) -> Vault:
    config = load_cluster(find_config("local_cpu"), {"model": "tiny", "storage.root": str(root)})
    return Vault(config, replace(MODEL, **model))  # type: ignore[arg-type]


def write(where: Vault, version: int) -> Found:
    draft = where.store().begin(version)
    shards = (write_shard(draft, "e0", {"a": torch.zeros(4)}, {}),)
    taken = SnapshotTaken(version, 1, ("e0",))
    return where.store().commit(draft, where.manifest_of(taken, {"id": "job-1", "step": 2}, shards))


def test_a_vault_lists_what_it_has_newest_first(tmp_path: Path) -> None:
    where = vault(tmp_path)
    assert where.url == str(tmp_path / "checkpoints")
    assert (where.newest(), where.all()) == (None, [])
    found = [write(where, version) for version in (1, 2)]
    assert where.newest() == found[1]
    assert where.all() == found[::-1]
    told = edge.told(found[0])
    assert (told.version, told.url, told.job_id, told.job_step) == (1, found[0].url, "job-1", 2)
    assert told.size_bytes > 16
    (Path(found[1].url) / "e0.safetensors").write_bytes(b"")
    assert where.all() == found[:1]
    fallen_back = where.newest()
    assert fallen_back is not None
    assert "e0.safetensors is truncated" in edge.sentence(fallen_back)


def test_the_checkpoint_of_another_model_is_refused_by_field(tmp_path: Path) -> None:
    write(vault(tmp_path), 1)
    with pytest.raises(InvalidInput, match=r"model\.vocab_size: the checkpoint has 260, the model has 7"):
        vault(tmp_path, vocab_size=7).newest()


def test_steps_wait_for_the_first_checkpoint_of_all() -> None:
    bench = Bench(2)
    bench.coordinator.health.can_restore = False
    bench.storage.go.clear()
    threading.Timer(0.2, bench.storage.go.set).start()
    bench.checkpoints.after_step(bench.job, 0, lambda: False)
    assert bench.coordinator.health.can_restore
    assert len(bench.storage.saved) == 1
    bench.storage.go.clear()
    bench.coordinator.health.can_restore = False
    bench.checkpoints.after_step(bench.job, 0, lambda: True)
    assert len(bench.storage.saved) == 1, "a job that is to stop does not wait"
    bench.storage.go.set()
