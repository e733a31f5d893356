"""A cluster from its config to its last process: nodes, coordinator, actors."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from actors.errors import MoeClusterError
from cluster.config import ClusterConfig
from cluster.fabric.backend import RayBackend
from cluster.fabric.calls import call
from cluster.fabric.comeback import end_all
from cluster.fabric.control import ControlWorker
from cluster.fabric.jobs import RayRouter
from cluster.fabric.nodes import connected
from cluster.fabric.options import coordinator_options
from cluster.fabric.workers import ExpertContact

if TYPE_CHECKING:
    from actors.transport.message import Message

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RunningCluster:
    backend: RayBackend
    router: RayRouter
    """For programs that measure: the router without the front."""
    control: Any

    def ask_expert(self, number: int) -> tuple[ExpertContact, Callable[[Message], Message]]:
        """Where expert actor `number` listens, and a function that asks it by a Ray call instead."""
        contact, handle = call("coordinator", self.control.experts.remote(), STOP_TIMEOUT_S)[number]
        return contact, lambda question: call(contact.name, handle.handle.remote(question), CALL_TIMEOUT_S)


@contextmanager
def launched(config: ClusterConfig) -> Iterator[RunningCluster]:
    """A ready cluster; on leaving, also by an error or Ctrl-C, every process it started has ended."""
    with connected(config):
        cluster = uuid.uuid4().hex[:12]
        control: Any = ray.remote(**coordinator_options())(ControlWorker).remote(config, cluster)
        try:
            router = call("coordinator", control.start.remote(), 3 * config.ray.start_timeout_s)
            yield RunningCluster(RayBackend(control, router, config.model), RayRouter(router), control)
        finally:
            _end(control, cluster)


def _end(control: Any, cluster: str) -> None:
    try:
        call("coordinator", control.stop.remote(), STOP_TIMEOUT_S)
    except MoeClusterError as error:
        logger.warning("the coordinator does not end its actors: %s", error)
    ray.kill(control)
    end_all(cluster)  # it may have died a moment ago, and have left some
