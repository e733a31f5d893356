"""Nodes in zones, over Ray: the loss of a whole zone under a job loses nothing, and copies are apart again after it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.backend import ActorStatus, ClusterStatus, JobState
from cluster.chaos.strikes import kill, raylet_of
from cluster.config import BatchConfig, DataConfig, EvalConfig, JobConfig
from cluster.configfile import find_config, load_cluster
from cluster.serve import served
from cluster.service.client import Client

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

WAIT_S = 240.0
VALUES = {
    "model": "tiny",
    "experts.group_size": 1,
    "experts.actors": 3,
    "experts.redundancy": 2,
    "ray.nodes": 3,
    "ray.zones": 2,  # node-1 and node-3 in zone-1
    "ray.start_timeout_s": 240.0,
    "front.port": 0,
    "checkpoint.every_steps": 0,
}
JOB = JobConfig(
    steps=100_000,
    batch=BatchConfig(sequences=2, sequence_length=32),
    data=DataConfig(heldout_every=0),
    eval=EvalConfig(every_steps=0),
)


def experts(status: ClusterStatus) -> list[ActorStatus]:
    return [actor for actor in status.actors if actor.role == "expert" and actor.state == "ready"]


def zones_of_groups(status: ClusterStatus) -> list[set[str]]:
    zone_of = {actor.id: actor.zone for actor in experts(status)}
    holders = [{owner, *status.copies.get(group, ())} for group, owner in status.owners.items()]
    return [{zone_of[actor] for actor in held if actor in zone_of} for held in holders]


def wait_until_apart(client: Client) -> ClusterStatus:
    deadline = time.monotonic() + WAIT_S
    while True:
        status = client.status()
        if not status.message and all(zones == {"zone-1", "zone-2"} for zones in zones_of_groups(status)):
            return status
        assert time.monotonic() < deadline, status
        time.sleep(0.2)


def test_the_loss_of_a_zone_loses_nothing(tmp_path: Path) -> None:
    config = load_cluster(find_config("local_cpu"), {**VALUES, "storage.root": str(tmp_path)})
    with served(config) as service, Client(service.target, timeout_s=WAIT_S) as client:
        status = client.status()
        nodes = {(actor.node, actor.zone) for actor in experts(status)}
        assert nodes == {("node-1", "zone-1"), ("node-2", "zone-2"), ("node-3", "zone-1")}
        assert all(zones == {"zone-1", "zone-2"} for zones in zones_of_groups(status))
        job = client.submit_job(JOB)
        events = (event for event in client.watch_job(job.id) if event.kind == "step")
        next(event for event in events if event.step >= 5)
        lost = [actor for actor in experts(status) if actor.zone == "zone-1"]
        raylets = [raylet_of(actor) for actor in lost]
        kill(lost)
        for raylet in raylets:
            assert raylet is not None
            raylet.kill()
        after = client.get_job(job.id).step
        assert next(event.step for event in events if event.step >= after + 10), "the job goes on"
        whole = wait_until_apart(client)
        assert not {actor.id for actor in lost} & set(whole.owners.values())
        assert client.get_job(job.id).state is JobState.RUNNING
        links = [use for actor in whole.actors if actor.role == "router" for use in actor.link_use]
        assert sum(use.sent_bytes for use in links) > 0
        ledger = client.ledger()
        assert not any(entry.updates_lost for entry in ledger.entries)
        client.cancel_job(job.id)
