"""Experts are added to the model under a training job and streams, over Ray: nobody fails, and the loss goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from actors.errors import InvalidInput
from actors.values import Growth
from cluster.backend import JobState, OperationState
from cluster.serve import served
from cluster.service.client import Client
from tests.integration.load import LONG_JOB, streams
from tests.integration.test_copies import WAIT_S, config_in, text, wait_for_step
from tests.integration.test_scaling import MOST_STALL_S

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

NUM_STREAMS = 2
MORE_STEPS = 30
"""After the growth, with experts that are open to tokens."""
START_S = 240.0
"""Of an actor, on a machine that does much else."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    changes = {"experts.actors": 2, "ray.nodes": 2, "checkpoint.every_steps": 20}
    config = config_in(tmp_path_factory.mktemp("storage"), **changes)
    with served(config) as service, Client(service.target, timeout_s=WAIT_S) as client:
        yield client


def test_under_training_and_serving(client: Client) -> None:
    num_experts, size = client.status().num_experts, client.status().num_parameters
    with pytest.raises(InvalidInput, match="only added"):
        client.grow(Growth(num_experts))
    job = client.submit_job(LONG_JOB)
    with streams(client, NUM_STREAMS):
        wait_for_step(client, job.id, 5)
        started = client.grow(Growth(2 * num_experts, open_steps=10), request_id="once")
        *_, operation = client.watch_operation(started.id)
    assert operation.state is OperationState.SUCCEEDED, operation.error
    assert client.grow(Growth(2 * num_experts, open_steps=10), request_id="once").id == operation.id
    wait_for_step(client, job.id, client.get_job(job.id).step + MORE_STEPS)
    client.cancel_job(job.id)
    events = list(client.watch_job(job.id))
    (grown_after,) = [e.step for e in events if "experts a layer now" in e.message]
    steps = [e.step for e in events if e.kind == "step"]
    assert steps == list(range(1, len(steps) + 1)), "each step is told once"
    assert client.get_job(job.id).state is JobState.CANCELLED
    assert 5 <= grown_after <= len(steps) - MORE_STEPS
    status = client.status()
    assert (status.num_experts, len(status.owners)) == (2 * num_experts, 2 * num_experts)
    assert all(len(held) == 1 for held in status.copies.values())
    assert len(status.copies) == 2 * num_experts
    assert status.num_parameters > size
    assert sum(map(sum, (row[num_experts:] for row in status.load_LE))) > 0, "no new expert got a token"
    (entry,) = [entry for entry in client.ledger().entries if entry.kind == "grow"]
    assert 0 < entry.stall_s < MOST_STALL_S


def test_a_grown_model_goes_out_and_in(client: Client) -> None:
    before = text(client)
    assert "config.json" in client.export_model("grown").files
    assert client.import_model("grown").num_experts == client.status().num_experts
    assert text(client) == before


def test_the_loss_of_a_text_stays(client: Client) -> None:
    def loss() -> float:
        return -sum(client.score("import os\nimport sys\n").logprobs)

    before, num_experts = loss(), client.status().num_experts
    *_, operation = client.watch_operation(client.grow(Growth(2 * num_experts)).id)
    assert operation.state is OperationState.SUCCEEDED, operation.error
    assert client.status().num_experts == 2 * num_experts
    assert loss() == pytest.approx(before, rel=0.01)


def test_new_groups_reach_an_actor_that_is_started_later(client: Client) -> None:
    """In the place of one that died. Its own config knows nothing of these groups."""
    before, status = text(client), client.status()
    known = {actor.id for actor in status.actors}
    victim = next(actor for actor in status.actors if actor.role == "expert")
    os.kill(victim.pid, signal.SIGKILL)
    assert text(client) == before
    deadline = time.monotonic() + START_S
    added: set[int] = set()
    while not added:
        assert time.monotonic() < deadline, client.status().message
        time.sleep(0.2)
        added = {group for actor in client.status().actors if actor.id not in known for group in actor.groups}
    assert max(added) >= 8, "a group that the model did not begin with"
    assert text(client) == before
