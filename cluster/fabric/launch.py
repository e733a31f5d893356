"""A cluster from its config to its last process: nodes, coordinator, actors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from actors.errors import MoeClusterError
from cluster.config import ClusterConfig
from cluster.fabric.backend import RayBackend
from cluster.fabric.calls import call
from cluster.fabric.control import ControlWorker
from cluster.fabric.jobs import RayRouter
from cluster.fabric.nodes import connected
from cluster.fabric.options import coordinator_options
from cluster.fabric.workers import ExpertContact

if TYPE_CHECKING:
    from actors.transport.curve import LinkKeys
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

    def link_keys(self) -> LinkKeys | None:
        """What a link to an expert actor needs, where links are secured."""
        keys: LinkKeys | None = call("coordinator", self.control.link_keys.remote(), STOP_TIMEOUT_S)
        return keys


@contextmanager
def launched(config: ClusterConfig) -> Iterator[RunningCluster]:
    """A ready cluster; on leaving, also by an error or Ctrl-C, every process it started has ended."""
    with connected(config):
        options = coordinator_options(ray.get_runtime_context().get_node_id())
        control: Any = ray.remote(**options)(ControlWorker).remote(config)
        try:
            router = call("coordinator", control.start.remote(), 3 * config.ray.start_timeout_s)
            yield RunningCluster(RayBackend(control, router, config.model), RayRouter(router), control)
        finally:
            with suppress(MoeClusterError):
                call("coordinator", control.stop.remote(), STOP_TIMEOUT_S)
