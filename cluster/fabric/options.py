"""Every Ray option of every actor, in one place."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cluster.config import ClusterConfig

ROUTER_RESOURCE = "moe_router"
EXPERT_RESOURCE = "moe_expert"
"""Custom resources that nodes offer: one router or expert actor takes one."""
NODE_LABEL = "moe-cluster.io/node"
"""Name of a node, of no other one; where none is set the end of the Ray node id stands for it."""
ZONE_LABEL = "ray.io/availability-zone"
"""Zone of a node. Ray takes it from `RAY_NODE_ZONE` in the environment of the node's processes."""

NODE_ID_LABEL = "ray.io/node-id"
"""Given by Ray to every node."""

NAMESPACE = "moe-cluster"
"""Of all clusters that run on one Ray cluster."""

COORDINATOR, ROUTER = "coordinator", "router-0"
"""Names of the coordinator and of the first router; checkpoints have the trunk under the latter, whoever leads."""

TRAIN, SERVE, FILES, CONTROL = "train", "serve", "files", "control"
"""Concurrency groups of a router actor, the last one of an expert actor too: there nothing takes long, since an actor
that does not say how it is for some seconds counts as frozen, and is killed."""
FRUGAL = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "2"}
"""Waiting threads sleep: a spinning one would take the core of another actor. And glibc does not give each of the
hundred threads that Ray and gRPC start in a process an arena of its own, whose free memory no other thread uses."""
WATCH = "watch"
"""One of the coordinator: calls that wait for news. Any number of watchers may keep its threads, and no others."""


def coordinator_options(node_id: str, *, may_move: bool) -> dict[str, Any]:
    """It comes back whenever it dies, and the others go on meanwhile.

    `node_id`: where whoever starts it lives; nodes of expert actors come and go, and are for them. `may_move`: when
    that node is gone any other will do. Said by labels: for an actor without resources Ray 2.60 takes a soft node
    affinity for none.
    """
    beside: dict[str, Any] = {"label_selector": {NODE_ID_LABEL: node_id}}
    elsewhere: dict[str, Any] = {"fallback_strategy": [{"label_selector": {}}]} if may_move else {}
    threads = {"max_concurrency": 64, "concurrency_groups": {WATCH: 64}}
    return {"num_cpus": 0, **threads, "max_restarts": -1, **beside, **elsewhere}


def lasting(cluster: str, name: str) -> dict[str, Any]:
    """Of an actor that outlives the coordinator that has started it, and that the next one finds. `name`: of this
    process; the one that takes its place has another."""
    return {"name": f"{cluster}/{name}", "namespace": NAMESPACE, "lifetime": "detached"}


def away_from(leaving: Collection[str]) -> dict[str, Any]:
    """Of an actor that none of the nodes with these ids is to carry."""
    return {"label_selector": {NODE_ID_LABEL: f"!in({','.join(sorted(leaving))})"}} if leaving else {}


def expert_options(config: ClusterConfig) -> dict[str, Any]:
    on_gpu = config.experts.device == "cuda"
    return {
        "num_cpus": 0,
        "num_gpus": 1 if on_gpu else 0,
        "resources": {EXPERT_RESOURCE: 1},
        "scheduling_strategy": "SPREAD",
        "max_restarts": 0,
        "max_concurrency": 16,  # groups arrive, however many, while a snapshot is written
        "concurrency_groups": {CONTROL: 8},
        **_own_env(config, config.experts.threads),
    }


def router_options(config: ClusterConfig) -> dict[str, Any]:
    on_gpu = config.router.device == "cuda"
    return {
        "num_cpus": 0,
        "num_gpus": 1 if on_gpu else 0,
        "resources": {ROUTER_RESOURCE: 1},
        "max_restarts": 0,
        "concurrency_groups": {TRAIN: 1, SERVE: config.router.max_sessions + 8, FILES: 8, CONTROL: 8},
        **_own_env(config, config.router.threads),
    }


def _own_env(config: ClusterConfig, threads: int) -> dict[str, Any]:
    """A process that is this actor's from the beginning: in another one of Ray's torch may have been imported already.
    Embedded, all of them have what counts from us (`nodes.connected`), and one that is there will do: for one with an
    environment of its own Python imports Ray twice."""
    return {} if config.ray.mode == "embedded" else {"runtime_env": {"env_vars": thread_env(threads)}}


def thread_env(threads: int) -> dict[str, str]:
    """Intra-op threads of one actor."""
    return {"OMP_NUM_THREADS": str(threads), **FRUGAL}
