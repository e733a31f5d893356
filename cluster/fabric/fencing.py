"""The end of a process that does not answer."""

from __future__ import annotations

import os
import re
import signal
import threading

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def end_process(node_id: str, pid: int) -> None:
    """Fencing: a frozen process does not hear Ray's own kill, and must not come back with old weights."""

    def kill() -> None:
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": strategy, "max_retries": 0}
        ray.remote(**options)(_kill).remote(pid)

    # While Ray's head is away this waits for it, and nobody may wait with it.
    threading.Thread(target=kill, name="fencing", daemon=True).start()


def _kill(pid: int) -> None:
    """Only if the process is still one of our workers: numbers of processes are used again."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if re.search(rb"(Expert|Router)Worker", file.read()):
                os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
