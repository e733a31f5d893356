"""A Ray cluster of this machine whose nodes Ray's own autoscaler adds and takes away.

As `ray.cluster_utils.AutoscalingCluster`, but beside any other Ray cluster that runs here: that one calls `ray stop
--force`, which ends them all, needs port 6379, and a file that Ray's wheel lacks. Here the port is any free one, which
the provider is told (`gcs_address`; without it takes 6379 for granted), and the provider is named as an external one,
for which no file with defaults is read.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util import get_node_ip_address

from cluster.fabric.options import EXPERT_RESOURCE, NODE_LABEL, ROUTER_RESOURCE

START_TIMEOUT_S = 120.0
GRACE_S = 3.0
STOP_TIMEOUT_S = 20.0
OBJECT_STORE_BYTES = 80 << 20
NodeType = dict[str, Any]
"""As in the file of Ray's autoscaler, `available_node_types`."""
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


@contextmanager
def autoscaled_ray(node_types: Mapping[str, NodeType], idle_s: float) -> Iterator[str]:
    """Address of a cluster that begins with a head and what the types have at least. More nodes come when actors wait
    for them, and go when they were idle for so long. Without a type for routers the head has room for one. Afterwards
    all processes have ended."""
    # Not pytest's directory: paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        address = f"{get_node_ip_address()}:{free_port()}"
        config = Path(directory) / "autoscaler.json"
        config.write_text(json.dumps(_config(address, node_types, idle_s)))
        log = Path(directory) / "head.log"
        with log.open("wb") as output:
            head = subprocess.Popen(
                _command(address, directory, config, _of_head(node_types)),
                env=_environment(),
                stdout=output,
                stderr=output,
            )
        try:
            _wait_for(head, address, log)
            yield address
        finally:
            _end(head, directory)


def expert_nodes(max_nodes: int) -> dict[str, NodeType]:
    """Up to so many nodes with room for one expert actor each."""
    resources = {"CPU": 0, EXPERT_RESOURCE: 1, "object_store_memory": OBJECT_STORE_BYTES}
    return {"expert": {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": max_nodes}}


def worker_groups(cluster: Mapping[str, Any]) -> dict[str, NodeType]:
    """The groups of a RayCluster as KubeRay tells them to the autoscaler: bounds, resources, labels, priority. GPUs are
    numbers that nodes give: no node looks for one."""
    return {
        group["groupName"]: {
            "resources": {
                **{name: float(amount) for name, amount in group["resources"].items()},
                "object_store_memory": OBJECT_STORE_BYTES,
            },
            "labels": dict(group["labels"]),
            "node_config": {},
            "min_workers": group["minReplicas"],
            "max_workers": group["maxReplicas"],
            "priority": group.get("priority", 0),
        }
        for group in cluster["spec"]["workerGroupSpecs"]
    }


def _of_head(node_types: Mapping[str, NodeType]) -> dict[str, int]:
    has_routers = any(ROUTER_RESOURCE in node_type["resources"] for node_type in node_types.values())
    return {} if has_routers else {ROUTER_RESOURCE: 1}


def _config(address: str, node_types: Mapping[str, NodeType], idle_s: float) -> dict[str, object]:
    commands = "initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"
    return {
        **{f"{name}_commands": [] for name in commands},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "cluster_synced_files": [],
        "cluster_name": "autoscaled",
        "max_workers": sum(node_type["max_workers"] for node_type in node_types.values()),
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 10.0,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {
                "resources": {"CPU": 2, **_of_head(node_types)},
                "node_config": {},
                "max_workers": 0,
            },
            **node_types,
        },
    }


def _command(address: str, directory: str, config: Path, resources: Mapping[str, int]) -> list[str]:
    options = {
        "port": address.rpartition(":")[2],
        "temp-dir": directory,
        "autoscaling-config": config,
        "num-cpus": 2,
        "resources": json.dumps(resources),
        "labels": f"{NODE_LABEL}=head",
        "object-store-memory": OBJECT_STORE_BYTES,
        "include-dashboard": "false",
        "dashboard-agent-listen-port": 0,
    }
    return ["ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]


def _environment() -> dict[str, str]:
    # Nodes would offer fewer GPUs than they are told to if they knew which there are.
    others = "RAY_ADDRESS", "RAY_NAMESPACE", "CUDA_VISIBLE_DEVICES"
    environment = {name: value for name, value in os.environ.items() if name not in others}
    return environment | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_worker_niceness": "0",
    }


def free_port() -> int:
    """Should somebody take it before the head does, the head says so and ends."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
        return port


def num_nodes(address: str) -> int:
    """Living nodes beside the head, as the autoscaler counts them."""
    return sum(nodes_by_type(address).values())


def nodes_by_type(address: str) -> dict[str, int]:
    status = get_cluster_status(address)
    types = Counter(node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes))
    return {name: count for name, count in types.items() if name != FAKE_HEAD_NODE_TYPE}


def _wait_for(head: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        assert head.poll() is None, f"Ray's head ended: {log.read_text()}"
        assert time.monotonic() < deadline, f"Ray's head does not answer: {log.read_text()}"
        with suppress(Exception):  # of many classes, until it answers
            if get_cluster_status(address).stats.autoscaler_version is not None:
                return
        time.sleep(0.2)


def _end(head: subprocess.Popen[bytes], directory: str) -> None:
    """The head's descendants; and who lost their parent before, by the directory that only this cluster has."""
    with suppress(psutil.NoSuchProcess):
        ours = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        psutil.wait_procs(ours, timeout=GRACE_S)
    for process in [*ours, *_named(directory)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.kill()
    head.wait(STOP_TIMEOUT_S)
    assert not psutil.wait_procs(ours, timeout=STOP_TIMEOUT_S)[1]


def _named(directory: str) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid() and any(directory in part for part in process.info["cmdline"] or ())
    ]
