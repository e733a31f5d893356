"""Expert actors with copies, over Ray: killed under training and serving, restored, moved; nothing is lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.backend import ActorStatus, ClusterStatus, JobState, SamplingParams
from cluster.config import BatchConfig, ClusterConfig, DataConfig, EvalConfig, JobConfig, OptimizerConfig
from cluster.configfile import find_config, load_cluster
from cluster.serve import served
from cluster.service.client import Client

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

WAIT_S = 60.0
STEPS = 60


def config_in(root: Path, **overrides: object) -> ClusterConfig:
    values = {
        "model": "tiny",
        "experts.group_size": 1,
        "experts.actors": 3,
        "experts.redundancy": 2,
        "ray.nodes": 3,
        "ray.start_timeout_s": 240.0,
        "router.dtype": "float64",
        "front.port": 0,
        "storage.root": str(root),
        "checkpoint.every_steps": 0,
        **overrides,
    }
    return load_cluster(find_config("local_cpu"), values)


JOB = JobConfig(
    steps=STEPS,
    batch=BatchConfig(sequences=2, sequence_length=32),
    optimizer=OptimizerConfig(lr=3e-3),
    data=DataConfig(heldout_every=0),
    eval=EvalConfig(every_steps=0),
)
PROMPT, SAMPLING = "def main(", SamplingParams(max_tokens=24)
STREAM_S = 240.0
"""Of one of many beside a job, on a machine that does much else."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], str]:
    """Losses of the job, and what is generated after it, on two actors without copies."""
    config = config_in(tmp_path_factory.mktemp("s"), **{"experts.actors": 2, "experts.redundancy": 1, "ray.nodes": 2})
    with served(config) as service, Client(service.target, timeout_s=WAIT_S) as client:
        return losses(client, client.submit_job(JOB).id), text(client)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with served(config_in(tmp_path)) as service, Client(service.target, timeout_s=WAIT_S) as client:
        yield client


def losses(client: Client, job_id: str) -> list[float]:
    found = [event.metrics["loss"] for event in client.watch_job(job_id) if event.kind == "step"]
    job = client.get_job(job_id)
    assert job.state is JobState.SUCCEEDED, job.error
    return found


def text(client: Client) -> str:
    return "".join(chunk.text for chunk in client.generate(PROMPT, SAMPLING, timeout_s=STREAM_S))


def wait_for_step(client: Client, job_id: str, step: int) -> None:
    for event in client.watch_job(job_id):
        if event.step >= step:
            return


def an_expert_actor(client: Client) -> ActorStatus:
    return next(actor for actor in client.status().actors if actor.role == "expert" and actor.state == "ready")


def kill(actor: ActorStatus) -> str:
    """To be found before the moment in which it is to die: on a busy machine asking takes as long as many steps."""
    os.kill(actor.pid, signal.SIGKILL)
    return actor.id


def wait_until(client: Client, what: str) -> ClusterStatus:
    deadline = time.monotonic() + WAIT_S
    while what not in (status := client.status()).message:
        assert time.monotonic() < deadline, status.message
        time.sleep(0.05)
    return status


def test_a_killed_actor_costs_neither_a_batch_nor_a_request(
    client: Client, undisturbed: tuple[list[float], str]
) -> None:
    actor = an_expert_actor(client)
    job = client.submit_job(JOB)
    streams: list[str] = []
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set() or len(streams) < 2:
            streams.append(text(client))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    wait_for_step(client, job.id, 10)
    victim = kill(actor)
    try:
        assert losses(client, job.id) == pytest.approx(undisturbed[0], rel=1e-9)
    finally:
        stop.set()
        thread.join(STREAM_S)
    assert len(streams) > 1
    assert all(streams), "every stream has ended with all of its tokens"
    assert text(client) == undisturbed[1]
    status = client.status()
    assert status.ready
    assert victim not in set(status.owners.values())
    notes = [event.message for event in client.watch_job(job.id) if event.kind == "note"]
    assert any(victim in note and "copies took over" in note for note in notes)


def test_the_cluster_heals_itself_while_a_job_trains(client: Client, undisturbed: tuple[list[float], str]) -> None:
    actor = an_expert_actor(client)
    job = client.submit_job(JOB)
    wait_for_step(client, job.id, 5)
    first = kill(actor)
    deadline = time.monotonic() + WAIT_S
    while not client.ledger().entries:  # from then on the status tells what is missing, until it has healed
        assert time.monotonic() < deadline
        time.sleep(0.05)
    status = wait_until_whole(client)
    assert first not in {actor.id for actor in status.actors if actor.state == "ready"}
    assert len(status.copies) == len(status.owners), "every group has a copy again"
    second = kill(an_expert_actor(client))
    assert losses(client, job.id) == pytest.approx(undisturbed[0], rel=1e-9)
    assert text(client) == undisturbed[1]
    wait_until_whole(client)
    deadline = time.monotonic() + WAIT_S
    while (entries := client.ledger().entries)[-1].recovered_s is None:  # the coordinator's next look writes it down
        assert time.monotonic() < deadline, entries
        time.sleep(0.1)
    assert [(entry.kind, entry.subject) for entry in entries] == [("actor_death", first), ("actor_death", second)]
    assert all(entry.recovered_s and not entry.updates_lost for entry in entries)


def wait_until_whole(client: Client) -> ClusterStatus:
    """Three expert actors live, each with groups, and every group has both of its copies."""
    deadline = time.monotonic() + 2 * WAIT_S
    while True:
        status = client.status()
        holding = [a for a in status.actors if a.role == "expert" and a.state == "ready" and a.groups]
        if not status.message and len(holding) == 3:
            return status
        assert time.monotonic() < deadline, status
        time.sleep(0.2)


def test_two_deaths_without_time_to_copy_fail_the_job_by_name(client: Client) -> None:
    experts = [actor for actor in client.status().actors if actor.role == "expert"]
    job = client.submit_job(replace(JOB, steps=100_000))
    wait_for_step(client, job.id, 5)
    for victim in experts[:2]:
        os.kill(victim.pid, signal.SIGKILL)
    for _ in client.watch_job(job.id):
        pass
    ended = client.get_job(job.id)
    assert ended.state is JobState.FAILED
    assert "no actor holds group" in ended.error
    assert "no actor holds group" in wait_until(client, "no actor holds").message


def test_a_frozen_actor_is_cut_off_and_killed(client: Client, undisturbed: tuple[list[float], str]) -> None:
    """Its connections stay open, so only heartbeats tell. It must not come back with old weights."""
    victim = an_expert_actor(client)
    process = psutil.Process(victim.pid)
    job = client.submit_job(JOB)
    wait_for_step(client, job.id, 10)
    process.suspend()
    try:
        assert losses(client, job.id) == pytest.approx(undisturbed[0], rel=1e-9)
        assert text(client) == undisturbed[1]
        assert victim.id not in client.status().owners.values()
        process.wait(WAIT_S)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    times = [event.time_s for event in client.watch_job(job.id) if event.kind == "step"]
    assert max(b - a for a, b in itertools.pairwise(times)) < 40, "detection takes 6 s by its settings"
