"""Over Ray: the coordinator's process, or Ray's own head, is killed at any moment. Steps and streams go on, and nothing
is forgotten."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray

from actors.errors import MoeClusterError
from actors.values import Growth
from cluster.backend import JobState, OperationState, SamplingParams
from cluster.service.client import Client
from tests.integration.load import streams
from tests.integration.test_resume import JOB, STEPS, WAIT_S, config_in, finish, losses, running, watch_to

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

SAMPLING = SamplingParams(max_tokens=300, temperature=0.8, top_p=0.95, seed=7)

AWAY_S = 5.0
NUM_STREAMS = 4
LASTING_STEPS = 5 * STEPS
STREAM_S = 240.0
"""Of one with so many tokens, on a machine that does much else."""


class Head:
    """Ray's own control process (GCS), of the cluster that this process has started."""

    def __init__(self) -> None:
        own = psutil.Process().children(recursive=True)
        (self._process,) = (process for process in own if name_of(process) == "gcs_server")
        port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
        command = self._process.cmdline()
        self._command = [f"--gcs_server_port={port}" if "gcs_server_port" in word else word for word in command]
        self._env, self._cwd = self._process.environ(), self._process.cwd()
        self._again: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def start(self) -> None:
        executable = Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server"
        self._again = subprocess.Popen(
            [str(executable), *self._command[1:]], env=self._env, cwd=self._cwd, start_new_session=True
        )

    def end(self) -> None:
        if self._again is not None:
            with suppress(ProcessLookupError):
                os.kill(self._again.pid, signal.SIGKILL)
            self._again.wait(10)


def name_of(process: psutil.Process) -> str:
    """Empty if it has ended meanwhile, as many do that a start begins."""
    with suppress(psutil.Error):
        return process.name()
    return ""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Head]]:
    """The head keeps what it knows on disk, so that it can come back."""
    root = tmp_path_factory.mktemp("s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_gcs_storage", "rocksdb")
        patch.setenv("RAY_gcs_storage_path", str(root / "gcs"))
        with running(config_in(root)) as client:
            head = Head()
            processes = psutil.Process().children(recursive=True)
            yield client, head
            processes += psutil.Process().children(recursive=True)
    head.end()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


@pytest.fixture
def client(service: tuple[Client, Head]) -> Client:
    return service[0]


def coordinator() -> psutil.Process:
    """The one that runs now, of the cluster that this process has started."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith("ray::ControlWorker") and process.is_running():
                    return process
        time.sleep(0.1)
    raise AssertionError("no coordinator came back")


def wait_until_back(client: Client) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            if (status := client.status()).ready and not status.message:
                return
        except Exception as error:
            status = error
        assert time.monotonic() < deadline, status
        time.sleep(0.1)


def tokens(client: Client, kill_after: int | None = None) -> list[int]:
    victim = coordinator() if kill_after is not None else None
    found: list[int] = []
    for chunk in client.generate("def main(", SAMPLING, timeout_s=STREAM_S):
        found += chunk.token_ids
        if victim is not None and len(found) == kill_after:
            victim.kill()
    return found


def test_a_stream_does_not_notice(client: Client) -> None:
    expected = tokens(client)
    assert tokens(client, kill_after=10) == expected
    wait_until_back(client)
    entry = client.ledger().entries[-1]
    assert entry.kind == "coordinator_restart"


def test_a_job_ends_as_if_nothing_had_been_and_jobs_behind_it_run(client: Client) -> None:
    client.import_model(client.export_model("same").path)
    first = finish(client, client.submit_job(JOB).id)
    version = client.status().version
    client.import_model("same")
    victim = coordinator()
    job = client.submit_job(JOB, request_id="mine")
    queued = client.submit_job(replace(JOB, steps=2), request_id="behind")
    ends: list[str] = []

    def read() -> None:
        watch_to(client, job.id, 20)
        ends.append(list(client.generate("def ", SAMPLING, timeout_s=STREAM_S))[-1].finish_reason)

    stream = threading.Thread(target=read)
    stream.start()
    seen = watch_to(client, job.id, 25)
    victim.kill()
    seen += client.watch_job(job.id, after=seen[-1].number)
    stream.join(STREAM_S)
    assert ends in (["length"], ["end_of_text"])
    numbers = [event.number for event in seen]
    assert numbers == sorted(set(numbers))
    assert losses(seen) == pytest.approx(losses(first), rel=1e-9)
    assert client.get_job(job.id).state is JobState.SUCCEEDED
    assert any("the coordinator died and is back" in event.message for event in seen)
    assert client.submit_job(JOB, request_id="mine").id == job.id
    list(client.watch_job(queued.id))
    assert client.get_job(queued.id).state is JobState.SUCCEEDED
    assert client.status().version == version + STEPS + 2, "no step was done twice"
    entry = client.ledger().entries[-1]
    assert entry.kind == "coordinator_restart"
    assert entry.recovered_s is not None


def wait_for_a_checkpoint(client: Client, since_s: float) -> None:
    """One that the death came before may have been due."""
    deadline = time.monotonic() + WAIT_S
    while not any(checkpoint.created_s > since_s for checkpoint in client.checkpoints()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def expert_processes() -> int:
    titles = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            titles.append(" ".join(process.cmdline()))
    return sum(title.startswith("ray::ExpertWorker") for title in titles)


def test_an_operation_under_way_fails_and_what_it_had_started_ends(client: Client) -> None:
    victim = coordinator()  # found first, as everywhere: on a busy machine that takes as long as scaling
    operation = client.scale(3)
    victim.kill()
    wait_until_back(client)
    failed = client.operation(operation.id)
    assert failed.state is OperationState.FAILED
    assert "the coordinator died" in failed.error
    assert sum(actor.role == "expert" for actor in client.status().actors) == 2
    deadline = time.monotonic() + WAIT_S
    while expert_processes() != 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_afterwards_the_cluster_scales(client: Client) -> None:
    done = list(client.watch_operation(client.scale(3).id))[-1]
    assert done.state is OperationState.SUCCEEDED
    victim, killed_s = coordinator(), time.time()
    victim.kill()
    wait_until_back(client)
    assert client.operation(done.id) == done
    wait_for_a_checkpoint(client, killed_s)
    assert sum(actor.role == "expert" for actor in client.status().actors) == 3
    done = list(client.watch_operation(client.scale(2).id))[-1]
    assert done.state is OperationState.SUCCEEDED


def test_a_growth_and_a_checkpoint_under_way_are_done_or_undone(client: Client) -> None:
    num_experts, expected = client.status().num_experts, tokens(client)
    victim = coordinator()
    saving = threading.Thread(target=save, args=(client,), daemon=True)
    saving.start()
    operation = client.grow(Growth(2 * num_experts))
    time.sleep(0.2)  # whatever it has come to
    victim.kill()
    saving.join(WAIT_S)
    wait_until_back(client)
    status = client.status()
    ended = client.operation(operation.id)
    assert ended.state is OperationState.FAILED or status.num_experts == 2 * num_experts
    assert status.num_experts in (num_experts, 2 * num_experts)
    assert len(status.owners) == status.num_experts, "every group has a holder"
    assert tokens(client) == expected
    if status.num_experts == num_experts:
        again = list(client.watch_operation(client.grow(Growth(2 * num_experts)).id))[-1]
        assert again.state is OperationState.SUCCEEDED, again.error
    assert client.save_checkpoint().version == client.status().version


def save(client: Client) -> None:
    with suppress(MoeClusterError):
        client.save_checkpoint()


def test_training_and_streams_go_on_while_the_head_is_away(service: tuple[Client, Head]) -> None:
    client, head = service
    job = client.submit_job(replace(JOB, steps=LASTING_STEPS))
    watch_to(client, job.id, 5)
    with streams(client, NUM_STREAMS) as texts:  # none of them fails
        head.kill()
        away_since = time.monotonic()
        step = client.get_job(job.id).step
        chunks = list(client.generate("def ", replace(SAMPLING, max_tokens=50)))
        assert chunks[-1].finish_reason in ("length", "end_of_text")
        while client.get_job(job.id).step <= step + 3:
            assert time.monotonic() < away_since + WAIT_S
            time.sleep(0.05)
        assert client.status().ready
        scaling = threading.Thread(target=lambda: scaled.append(scale(client)), daemon=True)
        scaled: list[OperationState | MoeClusterError] = []
        scaling.start()
        time.sleep(max(0.0, away_since + AWAY_S - time.monotonic()))
        before = len(texts)
        head.start()
        list(client.watch_job(job.id))
        assert client.get_job(job.id).state is JobState.SUCCEEDED
        scaling.join(WAIT_S)
        assert scaled == [OperationState.SUCCEEDED]
        assert sum(actor.role == "expert" for actor in client.status().actors) == 3
    assert before >= 1, "streams ended while the head was away"
    assert len(texts) > before
    assert client.ledger().entries[-1].requests_failed == 0


def scale(client: Client) -> OperationState | MoeClusterError:
    try:
        return list(client.watch_operation(client.scale(3).id))[-1].state
    except MoeClusterError as error:
        return error
