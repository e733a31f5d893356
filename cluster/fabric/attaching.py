"""Clusters that outlive the process that has started them: found by their checkpoint folder, which is of one alone."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import replace
from typing import Any

import ray

from actors.differences import first_difference, leaves
from actors.errors import InvalidInput
from cluster.config import ClusterConfig, FrontConfig
from cluster.configfile import to_dict
from cluster.errors import StartupError, Unavailable
from cluster.fabric.calls import call
from cluster.fabric.checkpoints import vault_url
from cluster.fabric.options import COORDINATOR, NAMESPACE

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0
AGAIN_S = 0.5


def name_of(config: ClusterConfig) -> str:
    return hashlib.sha256(vault_url(config).encode()).hexdigest()[:12]


def coordinator_of(cluster: str) -> Any | None:
    """Handle of a detached coordinator; None if there is none. Blocks while Ray's head is away."""
    try:
        return ray.get_actor(f"{cluster}/{COORDINATOR}", NAMESPACE)
    except ValueError:
        return None


def router_of(control: Any, config: ClusterConfig) -> Any:
    """Of a cluster that runs, when it is ready. `InvalidInput` as `check_same`, `StartupError` if it takes too long."""
    deadline = time.monotonic() + config.ray.start_timeout_s
    problem = "it is not ready"
    while time.monotonic() < deadline:
        try:
            if (router := call(COORDINATOR, control.attach.remote(config), CALL_TIMEOUT_S)) is not None:
                return router
        except Unavailable as error:
            problem = str(error)
        time.sleep(AGAIN_S)
    raise StartupError(f"the cluster that runs already did not answer within ray.start_timeout_s: {problem}")


def check_same(running: ClusterConfig, wanted: ClusterConfig) -> None:
    """`InvalidInput` names the first value in which they differ. The front is each one's own, as is the way to Ray."""
    mine, theirs = dict(leaves(_common(running))), dict(leaves(_common(wanted)))
    if (path := first_difference(mine, theirs)) is not None:
        raise InvalidInput(
            f"the cluster that runs over this checkpoint folder has {mine.get(path)!r}",
            field=path,
            value=theirs.get(path),
            remedy="use its config, end it with `moe-cluster down`, or give this one another checkpoint.url",
        )


def _common(config: ClusterConfig) -> dict[str, Any]:
    ray_config = replace(config.ray, address=None, start_timeout_s=1.0)
    return to_dict(replace(config, front=FrontConfig(), ray=ray_config))
