"""How Ray makes a cluster's actors."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import ray

from actors.errors import InvalidInput, MoeClusterError
from cluster.config import ClusterConfig
from cluster.errors import StartupError
from cluster.fabric.calls import call
from cluster.fabric.expertworker import ExpertWorker
from cluster.fabric.options import away_from, expert_options, lasting, router_options
from cluster.fabric.routerworker import RouterWorker


class ActorFactory:
    """Names that nobody had before, and handles of actors with them. Thread-safe.

    While Ray's head is away, an actor with a name keeps whoever creates it waiting: no lock is held meanwhile.
    """

    def __init__(self, config: ClusterConfig, cluster: str) -> None:
        """`cluster`: what its actors are named after; see `options.lasting`."""
        self._config, self._cluster = config, cluster
        self._lock = threading.Lock()
        self._next_expert, self._next_router = 0, 1

    # Made once each: of every class that it is given to start actors of, Ray keeps all methods until the process ends.

    @cached_property
    def _expert_class(self) -> Any:
        return ray.remote(**expert_options(self._config))(ExpertWorker)

    @cached_property
    def _router_class(self) -> Any:
        return ray.remote(**router_options(self._config))(RouterWorker)

    def expert_names(self, count: int) -> list[str]:
        with self._lock:
            first, self._next_expert = self._next_expert, self._next_expert + count
        return [f"expert-{first + i}" for i in range(count)]

    def router_names(self, count: int) -> list[str]:
        with self._lock:
            first, self._next_router = self._next_router, self._next_router + count
        return [f"router-{first + i}" for i in range(count)]

    @property
    def next_numbers(self) -> tuple[int, int]:
        """Of the next expert actor, and of the next router."""
        with self._lock:
            return self._next_expert, self._next_router

    def go_on(self, numbers: tuple[int, int], experts: Iterable[str], routers: Iterable[str]) -> None:
        """From these `next_numbers`, or after these names, whichever is later."""
        with self._lock:
            self._next_expert = max([numbers[0], *(number_of(name) + 1 for name in experts)])
            self._next_router = max([numbers[1], *(number_of(name) + 1 for name in routers)])

    def experts(self, names: Iterable[str], avoid: Collection[str], *, read_model: bool) -> dict[str, Any]:
        """Not on the nodes with the ids `avoid`. `read_model`: see `ExpertWorker`."""
        where = away_from(avoid)
        return {
            name: self._expert_class.options(**where, **lasting(self._cluster, name)).remote(
                name, self._config, read_model
            )
            for name in names
        }

    def routers(self, names: Iterable[str]) -> dict[str, Any]:
        # Ray's name of an actor is free again only some time after it has ended; a router's own may be needed at once.
        own = {name: lasting(self._cluster, f"{name}/{uuid.uuid4().hex[:8]}") for name in names}
        return {name: self._router_class.options(**own[name]).remote(name, self._config) for name in own}

    def started(self, name: str, ref: Any) -> Any:
        """What the actor answers once its process is there. `StartupError` if that takes too long."""
        try:
            return call(name, ref, self._config.ray.start_timeout_s)
        except InvalidInput:
            raise
        except MoeClusterError as error:
            resources = {k: v for k, v in ray.cluster_resources().items() if k.startswith(("moe_", "GPU"))}
            raise StartupError(
                f"{name} did not start within ray.start_timeout_s: {error}; the nodes offer {resources}"
            ) from error


def number_of(actor: str) -> int:
    """In the name of an expert actor or router."""
    return int(actor.rpartition("-")[2])
