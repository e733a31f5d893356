"""Over Ray with a store of its own: its head process is killed and comes back. Nothing that runs waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray

from actors.errors import MoeClusterError
from cluster.backend import JobState, OperationState, SamplingParams
from cluster.service.client import Client
from tests.integration.test_resume import JOB, WAIT_S, config_in, running, watch_to

pytestmark = pytest.mark.timeout(600)
AWAY_S = 5.0
SAMPLING = SamplingParams(max_tokens=60, seed=7)


class Head:
    """Ray's own control process (GCS), of the cluster that this process has started."""

    def __init__(self) -> None:
        own = psutil.Process().children(recursive=True)
        (self._process,) = (process for process in own if process.name() == "gcs_server")
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


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Client, Head]]:
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path / "gcs"))
    with running(config_in(tmp_path)) as client:
        head = Head()
        yield client, head
    head.end()


def test_training_and_streams_go_on_while_the_head_is_away(service: tuple[Client, Head]) -> None:
    client, head = service
    job = client.submit_job(JOB)
    watch_to(client, job.id, 5)
    head.kill()
    away_since = time.monotonic()
    step = client.get_job(job.id).step
    assert [chunk.finish_reason for chunk in client.generate("def ", SAMPLING)][-1] in ("length", "end_of_text")
    while client.get_job(job.id).step <= step + 3:
        assert time.monotonic() < away_since + WAIT_S
        time.sleep(0.05)
    assert client.status().ready
    scaling = threading.Thread(target=lambda: scaled.append(scale(client)), daemon=True)
    scaled: list[OperationState | MoeClusterError] = []
    scaling.start()
    time.sleep(max(0.0, away_since + AWAY_S - time.monotonic()))
    head.start()
    list(client.watch_job(job.id))
    assert client.get_job(job.id).state is JobState.SUCCEEDED
    scaling.join(WAIT_S)
    assert scaled == [OperationState.SUCCEEDED]
    assert len({actor.id for actor in client.status().actors if actor.role == "expert"}) == 3


def scale(client: Client) -> OperationState | MoeClusterError:
    try:
        return list(client.watch_operation(client.scale(3).id))[-1].state
    except MoeClusterError as error:
        return error
