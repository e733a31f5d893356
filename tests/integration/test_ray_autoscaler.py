"""Expert actors on Ray's own autoscaler: nodes come for actors that are asked for, and go when they are empty."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.backend import JobState, OperationState
from cluster.serve import served
from cluster.service.client import Client
from tests.contract.test_metrics import expressions, names_in
from tests.integration.load import DRAIN_S, LONG_JOB, streams
from tests.integration.test_autoscaling import wait_for_actors
from tests.integration.test_copies import WAIT_S, config_in, wait_for_step
from tests.manifests.kustomize import K8S, find_kubectl, overlay, ray_cluster
from tests.ray_autoscaler import (
    NodeType,
    autoscaled_ray,
    expert_nodes,
    free_port,
    nodes_by_type,
    num_nodes,
    worker_groups,
)

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

IDLE_S = 4.0
"""After which Ray takes an idle node away."""


@pytest.fixture
def address() -> Iterator[str]:
    with autoscaled_ray(expert_nodes(max_nodes=4), idle_s=IDLE_S) as address:
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
    with served(config_in(tmp_path, **changes)) as service, Client(service.target, timeout_s=WAIT_S) as client:
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


@pytest.fixture
def groups() -> dict[str, NodeType]:
    """Of the overlay for a laptop, whose actors need no GPU; without kubectl, of what it is made from."""
    if find_kubectl():
        return worker_groups(ray_cluster(overlay("kind")))
    return worker_groups(yaml.safe_load((K8S / "base" / "raycluster.yaml").read_text()))


def test_the_groups_on_kubernetes_offer_what_actors_ask_for(groups: dict[str, NodeType], tmp_path: Path) -> None:
    least = {name: group["min_workers"] for name, group in groups.items()}
    assert least == {"router": 1, "experts": 2}
    with autoscaled_ray(groups, idle_s=IDLE_S) as address:
        wait_for_nodes(address, 3)
        metrics_port = free_port()
        changes = {
            "ray.mode": "existing",
            "ray.address": address,
            "experts.actors": 2,
            "experts.max_actors": 3,
            "front.metrics_port": metrics_port,
        }
        with served(config_in(tmp_path, **changes)) as service, Client(service.target, timeout_s=WAIT_S) as client:
            job = client.submit_job(LONG_JOB)
            wait_for_step(client, job.id, 3)
            with streams(client, 2):
                scale(client, 3)
                wait_for_nodes(address, 4)
                scale(client, 2)
                wait_for_nodes(address, 3)
                pod_ends(client)
            wait_until_apart(client, 3)
            step = client.get_job(job.id).step
            wait_for_step(client, job.id, step + 3)
            wait_for_metrics(metrics_port)
            client.cancel_job(job.id)
            assert [entry.kind for entry in client.ledger().entries] == ["scale_up", "scale_down", "drain"]


def wait_until_apart(client: Client, count: int) -> None:
    """So many actors, the router and the expert actors, on a node each. One that did not find room in time is started
    when there is some."""
    deadline = time.monotonic() + 2 * WAIT_S
    while True:
        actors = [actor for actor in client.status().actors if actor.state == "ready"]
        if len({actor.node for actor in actors}) == len(actors) == count:
            return
        assert time.monotonic() < deadline, actors
        time.sleep(0.2)


def wait_for_metrics(port: int) -> None:
    """Until each has a value: some have one only when something has been measured."""
    deadline = time.monotonic() + WAIT_S
    while missing := metrics_without_a_value(port):
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)


def metrics_without_a_value(port: int) -> set[str]:
    """Of those that alerts and panels name, but for GPUs."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as response:
        families = text_string_to_metric_families(response.read().decode())
    seen = {sample.name for family in families for sample in family.samples}
    named = set().union(*(names_in(expression) for expression in expressions().values()))
    return {name for name in named - seen if not name.startswith("moe_cluster_gpu_")}


@pytest.mark.skipif(find_kubectl() is None, reason="kubectl is not installed, which renders the overlays")
def test_load_brings_a_spot_machine_and_its_end_takes_it_away(tmp_path: Path) -> None:
    """On the groups of the overlay that has most of them. Its nodes offer GPUs, which actors on CPUs do not ask for."""
    groups = worker_groups(ray_cluster(overlay("spot")))
    assert {name: group["resources"].get("GPU") for name, group in groups.items()} == dict.fromkeys(groups, 1.0)
    least = {"router": 1, "experts": 2}
    with autoscaled_ray(groups, idle_s=IDLE_S) as address:
        wait_for_nodes(address, 3)
        assert nodes_by_type(address) == least
        policy = {"enabled": True, "rise_s": 1.0, "idle_s": 4.0, "cool_down_s": 2.0, "max_queue_s": 0.2}
        changes = {
            "ray.mode": "existing",
            "ray.address": address,
            "experts.actors": 2,
            "experts.max_actors": 3,
            "router.max_sessions": 1,
            **{f"experts.autoscale.{name}": value for name, value in policy.items()},
        }
        with served(config_in(tmp_path, **changes)) as service, Client(service.target, timeout_s=WAIT_S) as client:
            with streams(client, 4):
                wait_for_nodes(address, 4)
                assert nodes_by_type(address) == {**least, "experts-spot": 1}, "the cheaper ones first"
                wait_for_actors(client, 3)
            wait_for_actors(client, 2)
            wait_for_nodes(address, 3)
            assert nodes_by_type(address) == least
            entries = client.ledger().entries
            assert [entry.kind for entry in entries] == ["scale_up", "scale_down"], "its groups went first: nobody died"
            assert sum(entry.requests_failed for entry in entries) == 0


def pod_ends(client: Client) -> None:
    """Kubernetes ends an expert pod: it runs the preStop hook there first, and waits for it within the grace period."""
    node = next(actor.node for actor in client.status().actors if actor.role == "expert")
    here = os.path.dirname(sys.executable)
    environment = os.environ | {"NODE_NAME": node, "MOE_CLUSTER_TARGET": client.target, "DRAIN_LOG": os.devnull}
    environment["PATH"] = f"{here}:{environment['PATH']}"
    hook = [str(K8S / "hooks" / "drain.sh")]
    subprocess.run(hook, env=environment | {"DRAIN_TIMEOUT_S": str(DRAIN_S)}, check=True, timeout=DRAIN_S + 30)
    assert not any(actor.node == node for actor in client.status().actors)


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
