"""The endpoint that Prometheus scrapes, over HTTP, in front of a cluster in memory."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from actors.errors import MoeClusterError
from cluster.backend import GpuUse, SamplingParams
from cluster.config import FrontConfig, JobConfig
from cluster.errors import PortInUse, Unavailable
from cluster.service.client import Client
from cluster.service.server import Front
from tests.fakes.backend import NUM_EXPERTS, MemoryBackend
from tests.fakes.front import WAIT_S, run, running_front

MONITORING = Path(__file__).resolve().parents[2] / "k8s" / "monitoring"
CONFIG = FrontConfig(port=0, metrics_port=0)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def front(backend: MemoryBackend) -> Iterator[Front]:
    with running_front(backend, CONFIG) as front:
        yield front


@pytest.fixture
def client(front: Front) -> Iterator[Client]:
    with closing(Client(front.target)) as client:
        yield client


def scrape(front: Front) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{front.metrics_port}/metrics", timeout=WAIT_S) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"moe_cluster_{name}", frozenset(labels.items())]


def scraped_after(front: Front, method: str, calls: int) -> Samples:
    """Once so many are counted: a call that fails is after its answer is sent, and its time comes last."""
    deadline = time.monotonic() + WAIT_S
    count = "moe_cluster_rpc_seconds_count", frozenset({("method", method)})
    while scrape(front).get(count, 0) < calls:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return scrape(front)


def test_calls_are_counted_by_method_and_code(front: Front, backend: MemoryBackend, client: Client) -> None:
    client.score("a")
    client.score("a")
    backend.failures["score"] = [Unavailable("not now")]  # not "status", which the front asks for too
    with pytest.raises(MoeClusterError):
        client.score("a")
    samples = scraped_after(front, "InferenceService/Score", 3)
    assert value(samples, "rpcs_total", method="InferenceService/Score", code="OK") == 2
    assert value(samples, "rpcs_total", method="InferenceService/Score", code="UNAVAILABLE") == 1
    assert value(samples, "rpc_seconds_count", method="InferenceService/Score") == 3
    assert value(samples, "rpcs_running") == 0


def test_tokens_of_streams_are_counted_and_timed(front: Front, client: Client) -> None:
    list(client.generate("abc", SamplingParams(max_tokens=5)))
    samples = scrape(front)
    assert value(samples, "generated_tokens_total") == 5
    assert value(samples, "first_token_seconds_count") == 1
    assert value(samples, "next_token_seconds_count") == 4


def test_the_cluster_as_it_is(front: Front, backend: MemoryBackend, client: Client) -> None:
    list(client.watch_job(client.submit_job(JobConfig(steps=3)).id))
    backend.costs.add(backend.costs.open("actor_death", "expert-0", 100.0), stall_s=0.5, steps_replayed=2)
    samples = scrape(front)
    status, load = client.status(), client.load()
    assert value(samples, "up") == 1
    assert value(samples, "ready") == 1
    assert value(samples, "steps_committed_total") == status.version == 3
    assert value(samples, "expert_groups") == status.num_experts // status.group_size
    assert value(samples, "expert_groups_single") == len(status.owners)
    assert value(samples, "expert_groups_lost") == 0
    assert value(samples, "jobs", state="succeeded") == 1
    for actor in status.actors:
        labels = {"actor": actor.id, "role": actor.role, "node": actor.node}
        assert value(samples, "actor_ready", **labels) == 1
        assert value(samples, "actor_memory_bytes", device=actor.device, **labels) == actor.memory_bytes
        assert value(samples, "actor_pinned_bytes", **labels) == actor.pinned_bytes
        assert value(samples, "actor_staleness_steps", **labels) == status.version - actor.version
        if actor.role == "expert":
            assert value(samples, "actor_merged_updates_total", **labels) == actor.merged_updates
    for layer, (max_vio, std) in enumerate(zip(load.max_vio_L, load.utilisation_std_L, strict=True)):
        assert value(samples, "load_max_vio_ratio", layer=str(layer)) == pytest.approx(max_vio)
        assert value(samples, "load_std_ratio", layer=str(layer)) == pytest.approx(std)
    pairs = [value(samples, "expert_pairs", expert=str(expert)) for expert in range(NUM_EXPERTS)]
    assert pairs == [sum(column) for column in zip(*load.load_LE, strict=True)]
    assert value(samples, "disturbances_total", kind="actor_death") == 1
    assert value(samples, "disturbance_stall_seconds_total", kind="actor_death") == 0.5
    assert value(samples, "steps_replayed_total", kind="actor_death") == 2
    assert value(samples, "disturbances_open") == 1


def test_the_running_job_shows_its_last_step(backend: MemoryBackend) -> None:
    backend.step_s = 0.05
    with running_front(backend, CONFIG) as front, Client(front.target) as client:
        job = client.submit_job(JobConfig(steps=1000))
        with closing(client.watch_job(job.id)) as events:
            last = next(event for event in events if event.kind == "step" and event.step == 2)
        samples = scrape(front)
        assert value(samples, "train_step") >= 2
        assert value(samples, "train_loss_nats") <= last.metrics["loss"]
        client.cancel_job(job.id)


def test_what_crossed_links_and_who_waits(front: Front) -> None:
    samples = scrape(front)
    labels = {"actor": "router-0", "role": "router", "kind": "socket/ipc"}
    assert value(samples, "link_sent_bytes_total", **labels) == 5000
    assert value(samples, "link_received_bytes_total", **labels) == 4000
    assert value(samples, "link_wait_seconds_total", **labels) == 0.25
    labels = {"actor": "router-0", "role": "router", "node": "node-0"}
    assert value(samples, "requests_waiting", **labels) == 2
    assert value(samples, "request_queue_seconds", **labels) == 0.75


def test_pinned_versions_show_what_they_take(front: Front, client: Client) -> None:
    labels = {"actor": "router-0", "role": "router", "node": "node-0"}
    assert value(scrape(front), "actor_pinned_bytes", **labels) == 0
    client.pin_version("prod")
    samples = scrape(front)
    assert value(samples, "pins") == 1
    assert value(samples, "actor_pinned_bytes", **labels) == 1000
    client.unpin_version("prod")
    assert value(scrape(front), "pins") == 0


def test_a_gpu_shows_its_memory_and_how_busy_it_is_if_that_can_be_told(front: Front, backend: MemoryBackend) -> None:
    labels = {"actor": "router-0", "role": "router", "node": "node-0"}
    assert not any("gpu" in name for name, _ in scrape(front))
    backend.gpu = GpuUse(used_bytes=30, total_bytes=80, allocated_bytes=20)
    samples = scrape(front)
    assert value(samples, "gpu_memory_used_bytes", **labels) == 30
    assert value(samples, "gpu_memory_total_bytes", **labels) == 80
    assert value(samples, "gpu_memory_allocated_bytes", **labels) == 20
    assert not any("busy" in name for name, _ in samples)
    backend.gpu = replace(backend.gpu, busy_ratio=0.5)
    assert value(scrape(front), "gpu_busy_ratio", **labels) == 0.5


def test_a_cluster_that_does_not_answer_is_down_and_the_calls_are_still_told(
    front: Front, backend: MemoryBackend, client: Client
) -> None:
    client.status()
    backend.failures["load_report"] = [Unavailable("the coordinator is away")]
    samples = scrape(front)
    assert value(samples, "up") == 0
    assert ("moe_cluster_ready", frozenset()) not in samples
    assert value(samples, "rpcs_total", method="ClusterService/GetStatus", code="OK") == 1


def test_the_port_is_free_again_afterwards_and_refused_by_name_while_it_is_taken(backend: MemoryBackend) -> None:
    with running_front(backend, CONFIG) as front:
        taken = front.metrics_port
        with (
            pytest.raises(PortInUse, match=r"front\.metrics_port"),
            running_front(backend, FrontConfig(port=0, metrics_port=taken)),
        ):
            pass
    with running_front(backend, FrontConfig(port=0, metrics_port=taken)) as front:
        assert value(scrape(front), "up") == 1


def names_in(text: str) -> set[str]:
    return set(re.findall(r"moe_cluster_[a-z_]+", text))


def expressions() -> dict[str, str]:
    """Of every alert and every panel, by its title."""
    alerts = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    found = {rule["alert"]: rule["expr"] for group in alerts for rule in group["rules"]}
    return found | {panel["title"]: " ".join(t["expr"] for t in panel["targets"]) for panel in panels}


def test_every_metric_that_an_alert_or_a_panel_names_is_there(backend: MemoryBackend) -> None:
    """After a request, and in a job, of a cluster with a GPU that was disturbed."""
    backend.step_s = 0.05
    backend.gpu = GpuUse(used_bytes=30, total_bytes=80, allocated_bytes=20, busy_ratio=0.5)
    backend.costs.open("actor_death", "expert-0", 100.0)
    with running_front(backend, CONFIG) as front, Client(front.target) as client:
        list(client.generate("abc", SamplingParams(max_tokens=3)))
        job = client.submit_job(JobConfig(steps=1000))
        with closing(client.watch_job(job.id)) as events:
            next(event for event in events if event.kind == "step")
        seen = {name for name, _ in scrape(front)}
        client.cancel_job(job.id)
    for title, expression in expressions().items():
        assert names_in(expression), title
        assert names_in(expression) <= seen, title


def test_without_a_port_nothing_listens(backend: MemoryBackend) -> None:
    with running_front(backend) as front:
        assert front.metrics_port == 0
        run(front.stop())
