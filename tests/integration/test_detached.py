"""On a Ray cluster that exists: the process that has started a service is killed. A detached service goes on, another
one ends by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from cluster.config import BatchConfig, DataConfig, EvalConfig, JobConfig
from cluster.fabric import nodes
from cluster.service.client import Client
from tests.integration.requests import asking

pytestmark = pytest.mark.timeout(600)
WAIT_S = 150.0
START_S = 240.0
ORPHAN_TIMEOUT_S = 12.0
GRACE_S = 60.0
"""Requests that a front has begun when it is told to end may take so long."""
OURS = ("ray::ControlWorker", "ray::RouterWorker", "ray::ExpertWorker")
JOB = JobConfig(
    steps=100_000,
    batch=BatchConfig(sequences=2, sequence_length=32),
    data=DataConfig(heldout_every=20),
    eval=EvalConfig(every_steps=0),
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    resources = {"moe_router": 2, "moe_expert": 5}
    head = {
        "num_cpus": 2,
        "resources": resources,
        "include_dashboard": False,
        "object_store_memory": 128 << 20,
        "gcs_server_port": 0,
        "dashboard_agent_listen_port": 0,
    }
    with nodes._patience(START_S):
        cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield str(cluster.address)
    finally:
        cluster.shutdown()


class Services:
    def __init__(self, address: str, root: Path) -> None:
        self._env = {**os.environ, "XDG_STATE_HOME": str(root), "RAY_worker_niceness": "0"}
        self._values = {
            "model": "tiny",
            "experts.group_size": 1,
            "ray.mode": "existing",
            "ray.address": address,
            "ray.start_timeout_s": START_S,
            "front.port": 0,
            "storage.root": str(root),
        }

    def command(self, *words: str, **values: object) -> subprocess.Popen[str]:
        sets = [f"{key}={json.dumps(value)}" for key, value in {**self._values, **values}.items()]
        pairs = [word for value in sets for word in ("--set", value)] if words == ("up",) else []
        command = [sys.executable, "-m", "cluster.cli", *words, "--json", *pairs]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=self._env
        )

    @contextmanager
    def up(self, **values: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
        """Ready when entered, killed afterwards."""
        process = self.command("up", **values)
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                with suppress(ValueError):
                    yield json.loads("".join(lines))["target"], process
                    return
            raise AssertionError(process.communicate(timeout=10)[1][-2000:])
        finally:
            process.kill()
            process.communicate(timeout=10)


@dataclass(frozen=True)
class Orphans:
    """A service that ends with its front, and has been there since."""

    front: subprocess.Popen[str]
    processes: set[int]
    since_s: float


@pytest.fixture(scope="module")
def orphans(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orphans]:
    services = Services(address, tmp_path_factory.mktemp("orphans"))
    with services.up(**{"ray.orphan_timeout_s": ORPHAN_TIMEOUT_S}) as (_, front):
        yield Orphans(front, ours(), time.monotonic())


def ours() -> set[int]:
    """Process ids of coordinators, routers and expert actors."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(OURS):
                found.add(process.pid)
    return found


def wait_until_gone(others: Set[int] = frozenset()) -> None:
    deadline = time.monotonic() + WAIT_S
    while left := ours() - others:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def step_beyond(client: Client, job_id: str, step: int) -> int:
    deadline = time.monotonic() + WAIT_S
    while (job := client.get_job(job_id)).step <= step:
        assert not job.state.is_final, job
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    return job.step


@contextmanager
def replaced(
    services: Services, target: str, front: subprocess.Popen[str]
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Under requests one front after the other ends as Kubernetes ends a pod, when another is there: none fails, and
    those that are under way at a front that ends are finished there. Gives the one that is left."""
    detached, limit_s = {"ray.detached": True, "front.shutdown_grace_s": GRACE_S}, GRACE_S + 30
    with services.up(**detached) as (second_target, second), asking(target, second_target) as asked:
        asked.wait_for(6)
        front.terminate()
        asked.wait_for(6)
        assert front.wait(limit_s) == 0
        with services.up(**detached, **{"front.port": int(target.rpartition(":")[2])}) as (third_target, third):
            assert third_target == target, "a new front in the old one's place"
            second.terminate()
            asked.wait_for(6)
            assert second.wait(limit_s) == 0
            asked.wait_for(6)
            asked.end()
            assert asked.failed == []
            yield third_target, third


def test_a_detached_service_goes_on_without_its_front(address: str, orphans: Orphans, tmp_path: Path) -> None:
    services = Services(address, tmp_path)
    detached = {"ray.detached": True}
    with services.up(**detached) as (target, front), Client(target, timeout_s=WAIT_S) as client:
        job_id = client.submit_job(JOB).id
        step = step_beyond(client, job_id, 3)
        before = ours()
        assert len(before - orphans.processes) >= 4
        front.kill()
        front.wait(10)
    refused = services.command("up", **detached, **{"experts.actors": 3})
    _, errors = refused.communicate(timeout=WAIT_S)
    assert refused.returncode == 2
    assert "experts.actors: the cluster that runs over this checkpoint folder has 2 (got 3)" in errors
    with services.up(**detached, **{"front.shutdown_grace_s": GRACE_S}) as (target, front):
        with Client(target, timeout_s=WAIT_S) as client:
            step_beyond(client, job_id, step)
            assert len(list(client.generate("def "))) > 0
        assert ours() == before, "the same processes, which nobody has disturbed"
        with replaced(services, target, front) as (target, last):
            with Client(target, timeout_s=WAIT_S) as client:
                step_beyond(client, job_id, client.get_job(job_id).step)
                assert client.ledger().entries == (), "nothing was disturbed"
            last.terminate()
            assert last.wait(GRACE_S + 30) == 0
            assert ours() == before, "fronts that end leave the cluster alone"
            down = services.command("down", "--target", target)
            _, errors = down.communicate(timeout=WAIT_S)
            assert down.returncode == 0, errors
    wait_until_gone(orphans.processes)


def test_actors_of_another_service_end_themselves(orphans: Orphans) -> None:
    assert len(orphans.processes) >= 4
    time.sleep(max(0.0, orphans.since_s + 1.5 * ORPHAN_TIMEOUT_S - time.monotonic()))
    assert ours() == orphans.processes, "they are asked after"
    orphans.front.kill()
    orphans.front.wait(10)
    wait_until_gone()
