"""A cluster from its config to its last process: nodes, coordinator, actors."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from actors.errors import MoeClusterError
from cluster.config import ClusterConfig
from cluster.fabric.attaching import coordinator_of, name_of, router_of
from cluster.fabric.backend import RayBackend
from cluster.fabric.calls import call
from cluster.fabric.comeback import end_all
from cluster.fabric.contacts import ExpertContact
from cluster.fabric.control import ControlWorker
from cluster.fabric.jobs import RayRouter
from cluster.fabric.nodes import connected, joined
from cluster.fabric.options import COORDINATOR, ROUTER, coordinator_options, lasting

if TYPE_CHECKING:
    from actors.transport.curve import LinkKeys
    from actors.transport.message import Message

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 30.0
"""For the last checkpoint (`control.FINISH_S`), and the actors."""
CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RunningCluster:
    backend: RayBackend
    router: RayRouter
    """For programs that measure: the router without the front."""
    control: Any

    def ask_expert(self, number: int) -> tuple[ExpertContact, Callable[[Message], Message]]:
        """Where expert actor `number` listens, and a function that asks it by a Ray call instead."""
        contact, handle = call(COORDINATOR, self.control.experts.remote(), ASK_TIMEOUT_S)[number]
        return contact, lambda question: call(contact.name, handle.handle.remote(question), CALL_TIMEOUT_S)

    def link_keys(self) -> LinkKeys | None:
        """What a link to an expert actor needs, where links are secured."""
        keys: LinkKeys | None = call(COORDINATOR, self.control.link_keys.remote(), ASK_TIMEOUT_S)
        return keys


@contextmanager
def launched(config: ClusterConfig) -> Iterator[RunningCluster]:
    """A ready cluster; on leaving, also by an error or Ctrl-C, every process it started has ended.

    With `ray.detached` the one that runs already is taken, and a ready one goes on afterwards.
    """
    with connected(config):
        if config.ray.detached:
            yield _running(config, *_attached(config))
            return
        cluster = uuid.uuid4().hex[:12]
        control: Any = ray.remote(**_options(config))(ControlWorker).remote(config, cluster)
        try:
            yield _running(config, control, _started(control, config))
        finally:
            _end(control, cluster, config)


def end_detached(address: str, cluster: str) -> None:
    """Every process of a detached cluster ends. `StartupError` if no Ray cluster answers at the address."""
    with joined(address):
        if (control := coordinator_of(cluster)) is not None:
            with suppress(MoeClusterError):
                call(COORDINATOR, control.stop.remote(), STOP_TIMEOUT_S)
            ray.kill(control)
        end_all(cluster)


def _running(config: ClusterConfig, control: Any, router: Any) -> RunningCluster:
    # The first call of all asks Ray's head where the actor is; later ones go on while the head is away.
    call(ROUTER, router.ping.remote(), CALL_TIMEOUT_S)
    return RunningCluster(RayBackend(control, router, config.model), RayRouter(router), control)


def _options(config: ClusterConfig) -> dict[str, Any]:
    # An embedded cluster is there as long as its head; its other nodes are for expert actors.
    return coordinator_options(ray.get_runtime_context().get_node_id(), may_move=config.ray.mode == "existing")


def _started(control: Any, config: ClusterConfig) -> Any:
    return call(COORDINATOR, control.start.remote(), 3 * config.ray.start_timeout_s)


def _attached(config: ClusterConfig) -> tuple[Any, Any]:
    """-> coordinator, router."""
    cluster = name_of(config)
    if (control := coordinator_of(cluster)) is not None:
        logger.info("joins the cluster that runs over this checkpoint folder")
        return control, router_of(control, config)
    options = {**_options(config), **lasting(cluster, COORDINATOR)}
    control = ray.remote(**options)(ControlWorker).remote(config, cluster)
    try:
        return control, _started(control, config)
    except BaseException:
        _end(control, cluster, config)
        raise


def _end(control: Any, cluster: str, config: ClusterConfig) -> None:
    try:
        call(COORDINATOR, control.stop.remote(), STOP_TIMEOUT_S)
    except MoeClusterError as error:
        logger.warning("the coordinator does not end its actors: %s", error)
        if config.ray.mode == "existing":  # nobody else would; an embedded cluster ends with its nodes
            end_all(cluster)
    if config.ray.detached:
        ray.kill(control)
