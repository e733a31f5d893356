"""Expert actors on Ray's own autoscaler: nodes come for actors that are asked for, and go when they are empty."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.backend import JobState, OperationState
from cluster.serve import served
from cluster.service.client import Client
from tests.integration.load import LONG_JOB, streams
from tests.integration.test_copies import WAIT_S, config_in, wait_for_step
from tests.ray_autoscaler import autoscaled_ray, num_nodes

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

IDLE_S = 4.0
"""After which Ray takes an idle node away."""


@pytest.fixture
def address() -> Iterator[str]:
    with autoscaled_ray(max_nodes=4, idle_s=IDLE_S) as address:
        yield address


def test_nodes_come_for_expert_actors_and_go_when_they_are_drained(address: str, tmp_path: Path) -> None:
    assert num_nodes(address) == 0
    changes = {
        "ray.mode": "existing",
        "ray.address": address,
        "experts.actors": 2,
        "experts.redundancy": 1,
        "experts.max_actors": 4,
    }
    with served(config_in(tmp_path, **changes)) as service, Client(service.target) as client:
        wait_for_nodes(address, 2)
        job = client.submit_job(LONG_JOB)
        wait_for_step(client, job.id, 5)
        with streams(client, 2) as texts:
            scale(client, 4)
            wait_for_nodes(address, 4)
            scale(client, 1)
            wait_for_nodes(address, 1)
        assert all(texts)
        client.cancel_job(job.id)
        for _ in client.watch_job(job.id):
            pass
        assert client.get_job(job.id).state is JobState.CANCELLED
        status = client.status()
        assert status.ready
        assert len(set(status.owners.values())) == 1
        assert [entry.kind for entry in client.ledger().entries] == ["scale_up", "scale_down"], "nobody died"
    wait_for_nodes(address, 0)


def scale(client: Client, actors: int) -> None:
    *_, operation = client.watch_operation(client.scale(actors).id)
    assert operation.state is OperationState.SUCCEEDED, operation.error
    experts = [actor for actor in client.status().actors if actor.role == "expert"]
    assert len({actor.node for actor in experts}) == len(experts) == actors


def wait_for_nodes(address: str, count: int) -> None:
    deadline = time.monotonic() + 2 * WAIT_S
    while (found := num_nodes(address)) != count:
        assert time.monotonic() < deadline, f"{found} nodes instead of {count}"
        time.sleep(0.2)
