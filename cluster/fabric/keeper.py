"""Embedded nodes that die are started again, as a cluster's own manager would."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from cluster.fabric.loops import each

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
END_TIMEOUT_S = 10.0


class NodeKeeper:
    """Looks after the nodes of a `ray.cluster_utils.Cluster` from a thread of its own, between `start` and `stop`."""

    def __init__(self, nodes: Mapping[str, Any], revive: Callable[[str], subprocess.Popen[bytes]], after_s: float):
        """`nodes`: Ray's own, by name. `revive` starts the process that stands for a new one of that name."""
        self._first = dict(nodes)
        self._revive, self._after_s = revive, after_s
        self._revived: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No node is started any more, and those that were have ended."""
        self._stopping.set()
        self._thread.join(END_TIMEOUT_S)
        for process in self._revived.values():
            process.terminate()
        for process in self._revived.values():
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_EVERY_S):
            each("the keeper of nodes", [partial(self._look_after, name) for name in self._first])

    def _look_after(self, name: str) -> None:
        if not self._is_alive(name):
            logger.warning("%s is dead; it is started again in %g s", name, self._after_s)
            if not self._stopping.wait(self._after_s):
                self._revived[name] = self._revive(name)

    def _is_alive(self, name: str) -> bool:
        if name in self._revived:
            return self._revived[name].poll() is None
        is_alive: bool = self._first[name].remaining_processes_alive()
        return is_alive


def started_node(
    address: str, *, resources: Mapping[str, float], labels: Mapping[str, str], object_store_bytes: int
) -> subprocess.Popen[bytes]:
    """A node that joins the Ray cluster at `address`; it lives and ends with this process.

    Ray's own `Cluster.add_node` sets signal handlers, which only a main thread can.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += ["--address", address, "--num-cpus", "0", "--num-gpus", "0"]
    command += ["--resources", json.dumps(resources), "--object-store-memory", str(object_store_bytes)]
    command += ["--labels", ",".join(f"{key}={value}" for key, value in labels.items())]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
