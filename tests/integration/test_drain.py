"""Nodes are emptied under a training job and streams: nobody fails, and nobody can tell from the numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import psutil
import pytest
import ray
from ray._raylet import GcsClient

from actors.errors import InvalidInput
from cluster.backend import Operation, OperationState
from cluster.cli import main
from cluster.errors import FailedPrecondition
from cluster.fabric.nodes import node_names
from cluster.serve import served
from cluster.service.client import Client
from tests.integration.load import DRAIN_S, LONG_JOB, streams
from tests.integration.test_copies import WAIT_S, config_in

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

NUM_STREAMS = 16
NODES = 3
FIRST_STEPS, MORE_STEPS = 5, 10
"""Before the node is told to leave, and after it is empty."""
PREEMPTION = 2
"""`DRAIN_NODE_REASON_PREEMPTION` of Ray."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Each node has room for two actors, and one of them begins empty: three actors are on three nodes."""
    changes = {
        "experts.redundancy": 1,
        "experts.max_actors": 2 * NODES,
        "ray.nodes": NODES,
        "ray.revive_after_s": 0,  # a node that was taken away stays away
    }
    config = config_in(tmp_path_factory.mktemp("storage"), **changes)
    with served(config) as service, Client(service.target, timeout_s=WAIT_S) as client:
        yield client


def run_until(client: Client, is_enough: Callable[[int], bool]) -> list[float]:
    """Losses of a long job from the weights `same`, which is cancelled when enough steps are committed."""
    client.import_model("same")
    job = client.submit_job(LONG_JOB)
    found: list[float] = []
    for event in client.watch_job(job.id):
        if event.kind == "step":
            found.append(event.metrics["loss"])
            if is_enough(len(found)):
                break
    client.cancel_job(job.id)
    deadline = time.monotonic() + WAIT_S
    while not client.get_job(job.id).state.is_final:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def emptied_under_load(client: Client, node: str, empty: Callable[[], Operation]) -> None:
    """`empty` makes the node leave and returns the operation at its end."""
    client.export_model("same")
    processes = [psutil.Process(actor.pid) for actor in client.status().actors if actor.node == node]
    assert processes
    running: list[Future[Operation]] = []
    last: list[int] = []
    """Steps that are to be run, once the node is empty."""
    with ThreadPoolExecutor(1) as pool, streams(client, NUM_STREAMS) as texts:

        def is_enough(step: int) -> bool:
            if step == FIRST_STEPS:
                running.append(pool.submit(empty))
            if running and running[0].done() and not last:
                last.append(step + MORE_STEPS)
            return step in last

        disturbed = run_until(client, is_enough)
        operation = running[0].result()
    assert (operation.state, operation.node) == (OperationState.SUCCEEDED, node), operation.error
    assert operation.ended_s is not None
    assert operation.ended_s - operation.created_s < DRAIN_S, "inside the grace period of a pod"
    assert all(texts)
    status = client.status()
    assert status.ready
    assert not any(actor.node == node for actor in status.actors)
    assert not psutil.wait_procs(processes, WAIT_S)[1]
    entry = [entry for entry in client.ledger().entries if entry.kind == "drain"][-1]
    assert (entry.subject, entry.requests_failed, entry.steps_replayed) == (node, 0, 0)
    assert entry.recovered_s is not None
    undisturbed = run_until(client, lambda step: step == len(disturbed))
    assert disturbed == pytest.approx(undisturbed[: len(disturbed)], rel=1e-9)


def expert_nodes(client: Client) -> list[str]:
    return sorted({actor.node for actor in client.status().actors if actor.role == "expert"})


def num_experts(client: Client) -> int:
    return sum(actor.role == "expert" for actor in client.status().actors)


def test_nodes_that_cannot_be_emptied_are_refused_by_name(client: Client) -> None:
    with pytest.raises(InvalidInput, match=r"'node-9'.*head, node-1, node-2, node-3") as caught:
        client.drain("node-9")
    assert caught.value.field == "node"
    with pytest.raises(FailedPrecondition, match="node head holds a router"):
        client.drain("head")
    assert client.operations() == []


def test_a_node_is_emptied_on_request_and_its_actors_replaced(client: Client) -> None:
    node = expert_nodes(client)[0]
    before = num_experts(client)

    def drained() -> Operation:
        asked = client.drain(node, DRAIN_S, request_id="once")
        with pytest.raises(FailedPrecondition, match=f"{asked.id} is under way"):
            client.scale(2)
        *_, operation = client.watch_operation(asked.id)
        assert client.drain(node, DRAIN_S, request_id="once") == operation
        return operation

    emptied_under_load(client, node, drained)
    deadline = time.monotonic() + 2 * WAIT_S
    while num_experts(client) != before:  # who did not find room in time is started when there is some
        assert time.monotonic() < deadline, client.status()
        time.sleep(0.1)
    assert main(["drain", "--node", node, "--target", client.target]) == 0, "there is nothing left to do"


def test_ray_s_notice_empties_a_node_and_the_others_take_over(client: Client) -> None:
    """There is room for one actor on the only node that is left."""
    node, stays = expert_nodes(client)
    node_id = next(node_id for node_id, name in node_names().items() if name == node)

    def preempted() -> Operation:
        before = {operation.id for operation in client.operations()}
        gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        until_ms = int((time.time() + DRAIN_S) * 1000)
        accepted, why = gcs.drain_node(node_id, PREEMPTION, "the machine is taken away", until_ms)
        assert accepted, why
        deadline = time.monotonic() + WAIT_S
        while not (news := [each for each in client.operations() if each.id not in before]):
            assert time.monotonic() < deadline, "the notice must be noticed"
            time.sleep(0.1)
        *_, operation = client.watch_operation(news[0].id)
        return operation

    emptied_under_load(client, node, preempted)
    assert expert_nodes(client) == [stays]
    deadline = time.monotonic() + WAIT_S
    while node_id in node_names():
        assert time.monotonic() < deadline, "Ray ends a node that it drains when it is idle"
        time.sleep(0.1)
    assert client.status().ready


def test_the_last_node_cannot_be_emptied_and_goes_on(client: Client) -> None:
    (node,) = expert_nodes(client)
    before = client.status().owners
    assert main(["drain", "--node", node, "--timeout-s", "3", "--target", client.target]) == 1
    operation = client.operations()[0]
    assert operation.state is OperationState.FAILED
    assert f"{node} still holds" in operation.error
    assert "no expert actor on a node that stays" in operation.error
    assert client.status().owners == before
    *_, scaled = client.watch_operation(client.scale(1).id)
    assert scaled.state is OperationState.SUCCEEDED, scaled.error
    *_, scaled = client.watch_operation(client.scale(2).id)
    assert scaled.state is OperationState.SUCCEEDED, "new actors are started on it again"
    assert expert_nodes(client) == [node]
