"""Over Ray: everything is killed and started again, or groups die without a copy; a job cannot tell from its losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from actors.errors import InvalidInput, MoeClusterError
from actors.moe.settings import BalanceSettings
from cluster.backend import ActorStatus, JobEvent, JobState
from cluster.config import BatchConfig, ClusterConfig, DataConfig, EvalConfig, JobConfig, OptimizerConfig
from cluster.configfile import find_config, load_cluster
from cluster.serve import served
from cluster.service.client import Client

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine
WAIT_S = 90.0
STEPS = 60
JOB = JobConfig(
    steps=STEPS,
    batch=BatchConfig(sequences=2, sequence_length=32),
    optimizer=OptimizerConfig(lr=3e-3),
    data=DataConfig(heldout_every=20),
    eval=EvalConfig(every_steps=20, batches=1),
    balance=BalanceSettings(bias_speed=0.001),
)


def config_in(root: Path, **overrides: object) -> ClusterConfig:
    values = {
        "model": "tiny",
        "experts.group_size": 1,
        "experts.actors": 2,
        "ray.nodes": 2,
        "ray.start_timeout_s": 240.0,
        "router.dtype": "float64",
        "front.port": 0,
        "storage.root": str(root),
        "checkpoint.every_steps": 15,
        **overrides,
    }
    return load_cluster(find_config("local_cpu"), values)


@contextmanager
def running(config: ClusterConfig) -> Iterator[Client]:
    with served(config) as service, Client(service.target, timeout_s=WAIT_S) as client:
        yield client


def finish(client: Client, job_id: str) -> list[JobEvent]:
    events = list(client.watch_job(job_id))
    job = client.get_job(job_id)
    assert job.state is JobState.SUCCEEDED, job.error
    assert job.step == STEPS
    assert [event.number for event in events] == list(range(events[0].number, events[0].number + len(events)))
    return events


def losses(events: Sequence[JobEvent]) -> dict[int, float]:
    """The last loss of each step, of steps that ran again."""
    return {event.step: event.metrics["loss"] for event in events if event.kind == "step"}


def heldout(events: Sequence[JobEvent]) -> dict[int, float]:
    return {event.step: event.metrics["heldout_loss"] for event in events if event.kind == "eval"}


def same(events: Sequence[JobEvent], unbroken: Sequence[JobEvent]) -> None:
    """Of those steps that were seen."""
    for measured, expected in ((losses(events), losses(unbroken)), (heldout(events), heldout(unbroken))):
        assert measured
        assert measured == pytest.approx({step: expected[step] for step in measured}, rel=1e-9)


def watch_to(client: Client, job_id: str, step: int) -> list[JobEvent]:
    seen = []
    for event in client.watch_job(job_id):
        seen.append(event)
        if event.step >= step:
            break
    return seen


def wait_for_the_checkpoint(client: Client, version: int) -> None:
    """Of a job's end it is taken before the job is known to have ended, and written beside."""
    deadline = time.monotonic() + WAIT_S
    while version not in [checkpoint.version for checkpoint in client.checkpoints()]:
        assert time.monotonic() < deadline, client.checkpoints()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[JobEvent]:
    with running(config_in(tmp_path_factory.mktemp("s"), **{"checkpoint.every_steps": 0})) as client:
        return finish(client, client.submit_job(JOB).id)


VICTIM = """
import sys
from pathlib import Path
import psutil
from tests.integration.test_resume import JOB, config_in, freeze, running, watch_to_a_checkpoint
with running(config_in(Path(sys.argv[1]))) as client:
    processes = psutil.Process().children(recursive=True)
    seen = watch_to_a_checkpoint(client, client.submit_job(JOB, request_id="mine").id, 40)
    freeze(processes)
    for event in seen:
        print(event.kind, event.step, event.metrics.get("loss", 0.0).hex(), flush=True)
    print("far enough", flush=True)
    sys.stdin.read()
"""


def watch_to_a_checkpoint(client: Client, job_id: str, step: int) -> list[JobEvent]:
    """To this step, and until a checkpoint is there beside that of the job's begin."""
    seen: list[JobEvent] = []
    is_saved = False
    for event in client.watch_job(job_id):
        seen.append(event)
        is_saved = is_saved or (event.step > 15 and any(saved.version >= 15 for saved in client.checkpoints()))
        if event.step >= step and is_saved:
            break
    return seen


def freeze(processes: Sequence[psutil.Process]) -> None:
    """They do nothing more until they are killed, however long it takes to find all that are to be."""
    for process in processes:
        with suppress(psutil.Error):
            process.suspend()


def kill_everything(root: Path) -> dict[int, float]:
    """A cluster in a process of its own, kill -9 of all of it after 40 steps or some more. -> losses so far."""
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    seen = {}
    for line in process.stdout:
        if line.startswith("far enough"):
            break
        kind, step, loss = line.split()
        if kind == "step":
            seen[int(step)] = float.fromhex(loss)
    everybody = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for victim in everybody:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(everybody, timeout=WAIT_S)
    process.wait(WAIT_S)
    return seen


def test_after_kill_9_of_everything_the_job_goes_on_with_another_number_of_actors(
    tmp_path: Path, unbroken: list[JobEvent]
) -> None:
    seen = kill_everything(tmp_path)
    assert len(seen) >= 40
    with running(config_in(tmp_path, **{"experts.actors": 3, "ray.nodes": 3, "experts.group_size": 2})) as client:
        job = client.submit_job(JOB, request_id="mine")
        assert job.id == "job-1"
        events = finish(client, job.id)
        assert client.status().version == STEPS
        first = min(losses(events))
        assert first > 1, "from a checkpoint, and not from the start"
        assert "resumed version" in events[0].message or any("resumed version" in e.message for e in events)
        same(events, unbroken)
        assert seen == pytest.approx({step: losses(unbroken)[step] for step in seen}, rel=1e-9)
    # An orderly end waits for the last checkpoint: there is nothing to resume, and the job is still known.
    with running(config_in(tmp_path)) as client:
        assert client.status().version == STEPS
        job = client.submit_job(JOB, request_id="mine")
        list(client.watch_job(job.id))  # its last checkpoint may have been written before it was known to have ended
        job = client.get_job(job.id)
        assert (job.state, job.step) == (JobState.SUCCEEDED, STEPS)
    with (
        pytest.raises(MoeClusterError, match=r"model\.dtype"),
        running(config_in(tmp_path, **{"router.dtype": "float32"})),
    ):
        pass


def an_expert_actor(client: Client) -> ActorStatus:
    return next(actor for actor in client.status().actors if actor.role == "expert" and actor.state == "ready")


def kill(actor: ActorStatus) -> str:
    """To be found before the moment in which it is to die: on a busy machine asking takes as long as many steps."""
    os.kill(actor.pid, signal.SIGKILL)
    return actor.id


def test_groups_without_a_copy_come_back_from_the_last_checkpoint(tmp_path: Path, unbroken: list[JobEvent]) -> None:
    with running(config_in(tmp_path)) as client:
        actor = an_expert_actor(client)
        job = client.submit_job(JOB)
        watch_to(client, job.id, 25)
        victim = kill(actor)
        events = finish(client, job.id)
        same(events, unbroken)
        steps = [event.step for event in events if event.kind == "step"]
        assert len(steps) > STEPS, "some ran again"
        notes = [event.message for event in events if event.kind == "note"]
        assert any(victim in note and "the last checkpoint brings them back" in note for note in notes)
        assert any("restored version" in note and "steps run again" in note for note in notes)
        deadline = time.monotonic() + WAIT_S
        while len({actor.id for actor in client.status().actors if actor.state == "ready"}) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert client.status().version == STEPS
        # Without a job the cluster goes back by itself.
        wait_for_the_checkpoint(client, STEPS)
        victim = kill(an_expert_actor(client))
        deadline = time.monotonic() + WAIT_S
        while victim in client.status().owners.values() or not client.status().ready or client.status().message:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert client.status().version == STEPS
        assert len(list(client.generate("def "))) > 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    job = replace(JOB, steps=20)
    with running(config_in(tmp_path)) as client:
        list(client.watch_job(client.submit_job(job, request_id="mine").id))
        deadline = time.monotonic() + WAIT_S
        while not list((tmp_path / "checkpoints").glob("step-0000000020*")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    (newest,) = (tmp_path / "checkpoints").glob("step-0000000020*")
    shard = newest / "expert-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with running(config_in(tmp_path)) as client:
        known = client.submit_job(job, request_id="mine")
        events = list(client.watch_job(known.id))
        assert any("expert-0.safetensors is truncated" in event.message for event in events)
        assert client.get_job(known.id).step == 20
    for manifest in (tmp_path / "checkpoints").glob("step-*/manifest.json"):
        manifest.write_text("{")
    with pytest.raises(InvalidInput, match="no checkpoint can be used"), running(config_in(tmp_path)):
        pass


class SmallDisk:
    """A file system of its own; without the right to mount one, a folder whose writers find it full when told so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
        self.is_real = subprocess.run(mount, capture_output=True).returncode == 0
        self._filler = folder / ("filler" if self.is_real else "full")

    def fill(self) -> None:
        if not self.is_real:
            self._filler.touch()
            return
        with suppress(OSError), self._filler.open("wb", buffering=0) as handle:
            for size in (1 << 20, 1 << 12):
                with suppress(OSError):
                    while handle.write(bytes(size)) == size:
                        pass

    def free(self) -> None:
        self._filler.unlink()

    def close(self) -> None:
        if self.is_real:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    if not disk.is_real:
        monkeypatch.setenv("FULL_DISK", str(disk.folder))
        path = [str(Path(__file__).parent / "fulldisk"), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    yield disk
    disk.close()


def fill_after(client: Client, job_id: str, step: int, disk: SmallDisk) -> None:
    """With nothing else in between: the job goes on to its checkpoints meanwhile."""
    for event in client.watch_job(job_id):
        if event.step >= step:
            disk.fill()
            return


def wait_for_message(client: Client, job_id: str, text: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while text not in client.status().message:
        assert time.monotonic() < deadline, client.get_job(job_id)
        time.sleep(0.1)


def test_a_full_disk_pauses_the_job_and_nothing_else(
    tmp_path: Path, small_disk: SmallDisk, unbroken: list[JobEvent]
) -> None:
    with running(config_in(tmp_path, **{"checkpoint.url": f"file://{small_disk.folder}/here"})) as client:
        job = client.submit_job(JOB)
        fill_after(client, job.id, 2, small_disk)
        wait_for_message(client, job.id, f"paused: no room for a checkpoint at {small_disk.folder}/here; waiting")
        step = client.get_job(job.id).step
        assert client.status().ready
        assert len(list(client.generate("def "))) > 0
        assert client.get_job(job.id).step == step < STEPS
        small_disk.free()
        events = finish(client, job.id)
        same(events, unbroken)
        assert client.status().message == ""
        assert any("there is room again" in event.message for event in events)
        filled = client.submit_job(replace(JOB, steps=100_000))  # until it is cancelled
        fill_after(client, filled.id, 2, small_disk)
        wait_for_message(client, filled.id, "paused")
        client.cancel_job(filled.id)
        list(client.watch_job(filled.id))
        assert client.get_job(filled.id).state is JobState.CANCELLED
