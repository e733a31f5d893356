"""The nodes: our own simulated ones on this machine (embedded), or a Ray cluster that exists."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import ray
from ray._private import services
from ray._private.state import GlobalState, available_resources_per_node
from ray.cluster_utils import Cluster

from cluster.config import ClusterConfig, RayConfig
from cluster.errors import FailedPrecondition, StartupError
from cluster.fabric.keeper import NodeKeeper, started_node
from cluster.fabric.options import EXPERT_RESOURCE, FRUGAL, NODE_LABEL, ROUTER_RESOURCE, ZONE_LABEL

logger = logging.getLogger(__name__)

DATA_CPUS = 2
"""Logical CPUs of the embedded head: Ray Data reads and tokenises there, nothing else asks for CPUs."""
OBJECT_STORE_BYTES = 128 << 20
LOOK_EVERY_S = 0.05
"""For a node that is being started."""


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Inside, this process is a driver of the cluster; afterwards everything that was started here has ended."""
    if ray.is_initialized():
        raise FailedPrecondition(
            "this process is connected to a Ray cluster already; call ray.shutdown() first, "
            "or set ray.mode to existing in a process of its own"
        )
    if config.ray.mode == "existing":
        assert config.ray.address is not None  # the config's checks hold it
        with joined(config.ray.address):
            yield
    else:
        with _embedded(config):
            yield


@contextmanager
def joined(address: str) -> Iterator[None]:
    """As a driver of a Ray cluster that exists, which goes on afterwards."""
    try:
        with _keeping_sigterm():
            _connect(address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StartupError(f"no Ray cluster answers at ray.address {address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _embedded(config: ClusterConfig) -> Iterator[None]:
    """A head and `ray.nodes` nodes as processes of this machine, beside any other Ray cluster that runs here."""
    _isolate()
    with ExitStack() as stack:
        with _keeping_sigterm(), _patience(config.ray.start_timeout_s):
            cluster = _start_head(config)
            stack.callback(cluster.shutdown)
            stack.callback(ray.shutdown)
            _connect(cluster.address)  # while there is only the head: a driver shares the fate of the node it joins by
            resources = {EXPERT_RESOURCE: math.ceil(config.experts.max_actors / config.ray.nodes)}
            labels = {name: _labels(config.ray, name) for name in _names(config.ray.nodes)}
            nodes = {name: _start_node(cluster, name, labels[name], resources) for name in labels}
        _wait_for_nodes(cluster, config.ray.start_timeout_s)
        if config.ray.revive_after_s:
            keeper = NodeKeeper(nodes, partial(_revived, cluster.address, resources, labels), config.ray.revive_after_s)
            stack.callback(keeper.stop)
            keeper.start()
        yield


def _start_head(config: ClusterConfig) -> Cluster:
    head = {
        "num_cpus": DATA_CPUS,
        "resources": {ROUTER_RESOURCE: config.router.max_actors},
        "labels": {NODE_LABEL: "head"},
        "include_dashboard": False,
        # Nobody reads what these would tell, and each is a process that imports Ray before the first node starts.
        "include_log_monitor": False,
        "no_monitor": True,  # of Ray's autoscaler
        "object_store_memory": OBJECT_STORE_BYTES,
        "gcs_server_port": 0,
        # By default every head asks for the same port; where another cluster's holds it, the start takes seconds more.
        "dashboard_agent_listen_port": 0,
    }
    try:
        with _without_api_server():
            return Cluster(initialize_head=True, head_node_args=head)
    except Exception as error:  # Ray raises no class of its own here
        raise StartupError(f"Ray's head node did not start: {error}") from error


def _names(num_nodes: int) -> list[str]:
    return [f"node-{number}" for number in range(1, num_nodes + 1)]


def _labels(config: RayConfig, name: str) -> dict[str, str]:
    """Of a simulated node."""
    number = _names(config.nodes).index(name)
    return {NODE_LABEL: name} | ({ZONE_LABEL: f"zone-{number % config.zones + 1}"} if config.zones else {})


def _start_node(cluster: Cluster, name: str, labels: Mapping[str, str], resources: Mapping[str, float]) -> Any:
    """Ray's handle of it; it joins soon."""
    node = {
        "num_cpus": 0,
        "num_gpus": 0,
        "resources": dict(resources),
        "labels": dict(labels),
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    try:
        return cluster.add_node(wait=False, **node)
    except Exception as error:  # as above
        raise StartupError(f"{name} did not start: {error}") from error


def _revived(
    address: str, resources: Mapping[str, float], labels: Mapping[str, Mapping[str, str]], name: str
) -> subprocess.Popen[bytes]:
    return started_node(address, resources=resources, labels=labels[name], object_store_bytes=OBJECT_STORE_BYTES)


def _wait_for_nodes(cluster: Cluster, timeout_s: float) -> None:
    try:
        cluster.wait_for_nodes(timeout=timeout_s)
    except TimeoutError as error:
        raise StartupError(f"nodes did not start within ray.start_timeout_s: {error}") from error


def _connect(address: str | None) -> None:
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)


@contextmanager
def _patience(timeout_s: float) -> Iterator[None]:
    """Ray gives a node that it starts 30 s to appear, which a machine that does much else may not keep. And it looks
    once a second."""
    ask = services.get_node

    def ask_until_there(address: str, node_id: str) -> Any:
        deadline = time.monotonic() + timeout_s
        with _state_of(address) as state:
            while time.monotonic() < deadline and all(node["NodeID"] != node_id for node in state.node_table()):
                time.sleep(LOOK_EVERY_S)
        return ask(address, node_id)  # RuntimeError if it is not there

    services.get_node = ask_until_there
    try:
        yield
    finally:
        services.get_node = ask


@contextmanager
def _state_of(address: str) -> Iterator[GlobalState]:
    """What Ray's head at this address knows, e.g. of the nodes that have told it that they are there."""
    state = GlobalState()
    state._initialize_global_state(services._get_gcs_client_options(address))
    try:
        yield state
    finally:
        state.disconnect()


@contextmanager
def _without_api_server() -> Iterator[None]:
    """Ray starts the dashboard's server without a dashboard, too, for usage statistics alone, and waits for it."""
    start = services.start_api_server
    services.start_api_server = lambda *args, **kwargs: (None, None)  # as where it did not start, which is no error
    try:
        yield
    finally:
        services.start_api_server = start


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Starting nodes and `ray.init` put handlers of their own on SIGTERM, which drain for half a minute or abort the
    process. Afterwards the one that was there before, which unwinds, is back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _isolate() -> None:
    """An embedded cluster is private to this process: no address, token or telemetry from the environment."""
    for name in ("RAY_ADDRESS", "RAY_NAMESPACE"):
        os.environ.pop(name, None)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray gives its workers the lowest priority; here they are the service, and Ray's own processes would go first.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.update(FRUGAL)


def node_names() -> dict[str, str]:
    """Ray node id -> name, of the living nodes."""
    return {
        node["NodeID"]: (node.get("Labels") or {}).get(NODE_LABEL, short_name(node["NodeID"]))
        for node in ray.nodes()
        if node["Alive"]
    }


def node_zones() -> dict[str, str]:
    """Ray node id -> zone, of the living nodes; empty where it is not known."""
    return {node["NodeID"]: (node.get("Labels") or {}).get(ZONE_LABEL, "") for node in ray.nodes() if node["Alive"]}


def short_name(node_id: str) -> str:
    """Of a node without a name: the end of its id, since some of Ray's node providers count there."""
    return node_id[-12:]


def expert_room(leaving: Collection[str]) -> int:
    """Expert actors for which the living nodes have room now, without those that leave; up to a second old."""
    return sum(_free_places(leaving).values())


def nodes_with_room(leaving: Collection[str]) -> set[str]:
    """Ids of the living nodes, without those that leave, that have room for an expert actor; as fresh as that."""
    return {node_id for node_id, free in _free_places(leaving).items() if free}


def _free_places(leaving: Collection[str]) -> dict[str, int]:
    free = available_resources_per_node()
    nodes = node_names().keys() - set(leaving)
    return {node_id: int(free.get(node_id, {}).get(EXPERT_RESOURCE, 0)) for node_id in nodes}
