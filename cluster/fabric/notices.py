"""What Ray says of nodes that it is going to take away: before a preemption, or by `ray drain-node`.

Asked for in a thread of its own: while Ray's control store is away such a call waits, and nobody else should.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stubs leave it out
from ray.exceptions import RayError

from cluster.fabric.nodes import node_names

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class News:
    notices: Mapping[str, float | None] = field(default_factory=dict)
    """Node id -> Unix time at which it may end; None if none was given."""
    nodes: Mapping[str, str] = field(default_factory=dict)
    """Node id -> name, of all living nodes."""
    looked_s: float = 0.0
    """When it was asked for (Unix)."""


class Notices:
    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._latest: News | None = None
        threading.Thread(target=self._watch, name="notices", daemon=True).start()

    @property
    def latest(self) -> News | None:
        """None before the first answer. While there is no answer, the last one."""
        return self._latest

    def stop(self) -> None:
        self._stopping.set()

    def _watch(self) -> None:
        client: GcsClient | None = None
        while not self._stopping.wait(LOOK_EVERY_S):
            try:
                client = client or GcsClient(address=ray.get_runtime_context().gcs_address)
                looked_s = time.time()
                # Milliseconds, 0 for no deadline. No public call of Ray tells which nodes it drains.
                ends_ms = client.get_draining_nodes(timeout=TIMEOUT_S)
                notices = {node_id: ms / 1000 or None for node_id, ms in ends_ms.items()}
                self._latest = News(notices, node_names(), looked_s)
            except RayError as error:
                logger.info("Ray does not say which nodes leave: %s", error)
            except Exception:  # the watch must survive: without it a preemption comes as a surprise
                logger.exception("the watch for notices stumbled")
