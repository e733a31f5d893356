"""Expert actors come and go under a training job and streams: nobody fails, and nobody can tell from the numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors.errors import InvalidInput
from cluster.backend import JobState, OperationState
from cluster.errors import FailedPrecondition
from cluster.serve import served
from cluster.service.client import Client
from tests.integration.load import streams
from tests.integration.test_copies import JOB, WAIT_S, config_in, losses, wait_for_step

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

NUM_STREAMS = 4
MOST_STALL_S = 10.0
"""Of a step for a switch, which takes some messages: a busy machine may keep each of them waiting."""


@pytest.fixture(scope="module")
def config_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def client(config_root: Path) -> Iterator[Client]:
    changes = {"experts.actors": 2, "experts.redundancy": 1, "ray.nodes": 2, "experts.max_actors": 4}
    with served(config_in(config_root, **changes)) as service, Client(service.target, timeout_s=WAIT_S) as client:
        yield client


def scale(client: Client, actors: int) -> float:
    """-> longest wait of a step, in seconds."""
    *_, operation = client.watch_operation(client.scale(actors).id)
    assert operation.state is OperationState.SUCCEEDED, operation.error
    experts = [actor for actor in client.status().actors if actor.role == "expert"]
    assert len(experts) == actors
    assert all(actor.groups for actor in experts)
    return operation.stall_s


def test_up_and_down_under_training_and_serving(client: Client) -> None:
    undisturbed = losses(client, client.submit_job(JOB).id)
    pids = {actor.pid for actor in client.status().actors}
    job = client.submit_job(JOB)
    with streams(client, NUM_STREAMS):
        wait_for_step(client, job.id, 5)
        stalls = [scale(client, actors) for actors in (3, 2, 4, 3)]
    assert max(stalls) < MOST_STALL_S
    found = losses(client, job.id)
    assert len(found) == len(undisturbed)
    assert client.get_job(job.id).state is JobState.SUCCEEDED
    deadline = time.monotonic() + WAIT_S
    gone = pids - {actor.pid for actor in client.status().actors}
    while any(map(psutil.pid_exists, gone)):
        assert time.monotonic() < deadline, "actors that left must end"
        time.sleep(0.1)


def test_losses_do_not_change_with_the_number_of_actors(client: Client, config_root: Path) -> None:
    """From the same weights: once undisturbed, once with actors that come and go."""
    client.export_model("same")
    client.import_model("same")
    expected = losses(client, client.submit_job(JOB).id)
    client.import_model("same")
    job = client.submit_job(JOB)
    wait_for_step(client, job.id, 3)
    here = len([a for a in client.status().actors if a.role == "expert"])
    scale(client, here - 1)
    scale(client, here)
    assert losses(client, job.id) == pytest.approx(expected, rel=1e-9)


def test_numbers_that_cannot_be_are_refused(client: Client) -> None:
    for actors, remedy in ((9, "use at most 8"), (5, "use at most 4"), (0, "give a number")):
        with pytest.raises(InvalidInput, match=remedy):
            client.scale(actors)
    scale(client, 1)
    operation = client.scale(4)  # three processes have to start: it does not end between two questions
    with pytest.raises(FailedPrecondition, match="under way"):
        client.scale(2)
    with pytest.raises(FailedPrecondition, match="under way"):
        client.rebalance()
    client.cancel_operation(operation.id)
    *_, ended = client.watch_operation(operation.id)
    assert ended.state.is_final
    assert client.status().ready
