"""Every Ray option of every actor, in one place."""

from __future__ import annotations

from typing import Any

from cluster.config import ClusterConfig

ROUTER_RESOURCE = "moe_router"
EXPERT_RESOURCE = "moe_expert"
"""Custom resources that nodes offer: one router or expert actor takes one."""
NODE_LABEL = "moe-cluster.io/node"
"""Name of a node, where one is set; otherwise the Ray node id stands for it."""

NAMESPACE = "moe-cluster"
"""Of all clusters that run on one Ray cluster."""

COORDINATOR, ROUTER = "coordinator", "router-0"
"""Names of the actors of which there is one."""

TRAIN, SERVE, CONTROL = "train", "serve", "control"
"""Concurrency groups of a router actor."""


def coordinator_options() -> dict[str, Any]:
    """It comes back whenever it dies, and the others go on meanwhile."""
    return {"num_cpus": 0, "max_concurrency": 64, "max_restarts": -1}


def lasting(cluster: str, name: str) -> dict[str, Any]:
    """Of an actor that outlives the coordinator that has started it, and that the next one finds. `name`: of this
    process; the one that takes its place has another."""
    return {"name": f"{cluster}/{name}", "namespace": NAMESPACE, "lifetime": "detached"}


def expert_options(config: ClusterConfig) -> dict[str, Any]:
    on_gpu = config.experts.device == "cuda"
    return {
        "num_cpus": 0,
        "num_gpus": 1 if on_gpu else 0,
        "resources": {EXPERT_RESOURCE: 1},
        "scheduling_strategy": "SPREAD",
        "max_restarts": 0,
        "max_concurrency": 16,  # one waits for the end; groups arrive while a snapshot is written and vitals are asked
        "runtime_env": {"env_vars": thread_env(config.experts.threads)},
    }


def router_options(config: ClusterConfig) -> dict[str, Any]:
    on_gpu = config.router.device == "cuda"
    return {
        "num_cpus": 0,
        "num_gpus": 1 if on_gpu else 0,
        "resources": {ROUTER_RESOURCE: 1},
        "max_restarts": 0,
        "concurrency_groups": {TRAIN: 1, SERVE: config.router.max_sessions + 8, CONTROL: 8},
        "runtime_env": {"env_vars": thread_env(config.router.threads)},
    }


def thread_env(threads: int) -> dict[str, str]:
    """Intra-op threads of one actor. Waiting threads sleep: a spinning one would take the core of another actor."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
