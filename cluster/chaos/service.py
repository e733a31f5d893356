"""A served cluster as a process tree of its own, so that its memory and handles are not those of the benchmark."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import yaml

from cluster.backend import ClusterStatus
from cluster.chaos.channels import num_channels
from cluster.chaos.record import Record, Vitals
from cluster.config import ClusterConfig
from cluster.configfile import to_dict
from cluster.errors import StartupError

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
LINGER_S = 10.0
"""Processes that Ray tells to end may take so long."""
COORDINATOR_TITLE = "ray::ControlWorker"
OWN_TITLES = ("ray::ControlWorker", "ray::RouterWorker", "ray::ExpertWorker")
"""Other workers of Ray come and go as it sees fit: it reads data in them, and keeps some in store."""


OF_NODES = ("ray.scripts.scripts start", "log_monitor.py")
"""Of a node that was started again, and not of one that is there from the start: no leak."""


def counts(title: str) -> bool:
    """Whether a process of this title is one of those whose number must not grow."""
    is_at_work = title.startswith(OWN_TITLES) or not title.startswith("ray::")
    return is_at_work and not any(name in title for name in OF_NODES)


class ServiceProcess:
    """`moe-cluster up` and all that descends from it."""

    def __init__(self, process: subprocess.Popen[bytes], target: str) -> None:
        self.target = target
        self._process = process
        self._front = psutil.Process(process.pid)
        self._coordinator: psutil.Process | None = None
        self._seen: dict[int, tuple[psutil.Process, str]] = {}
        self._lives: dict[str, list[int]] = {}
        """Process ids that a name has had."""

    def vitals(self, status: ClusterStatus, *, without_channels: bool = False) -> Vitals:
        """Now, of those of the three lasting processes that live. Who took the place of a dead one has a number.

        `without_channels`: the connections that Ray keeps between these processes are no part of the handles.
        """
        num_processes = self._remember()
        connections = psutil.net_connections("tcp") if without_channels else []
        members = {process.pid for process in (self._front, *(each for each, _ in self._seen.values()))}
        lasting = {"front": self._front, "coordinator": self._coordinator}
        for actor in status.actors:
            if actor.role == "router":
                with suppress(psutil.Error):
                    lasting["router"] = psutil.Process(actor.pid)
        rss_bytes, own_bytes, handles = {}, {}, {}
        for name, process in lasting.items():
            if process is not None:
                with suppress(psutil.Error):
                    memory, num_handles = process.memory_info(), process.num_fds()
                    life = self._life(name, process.pid)
                    rss_bytes[life], own_bytes[life] = memory.rss, memory.rss - memory.shared
                    handles[life] = num_handles - num_channels(process.pid, connections, members)
        return Vitals(time.time(), rss_bytes, own_bytes, handles, num_processes)

    def _life(self, name: str, pid: int) -> str:
        """`router`, then `router 2`: memory and handles of two processes are not to be compared."""
        pids = self._lives.setdefault(name, [])
        if pid not in pids:
            pids.append(pid)
        number = pids.index(pid) + 1
        return name if number == 1 else f"{name} {number}"

    def kill_coordinator(self) -> bool:
        """kill -9. -> whether there was one."""
        self._remember()
        process, self._coordinator = self._coordinator, None
        with suppress(psutil.Error):
            if process is not None:
                process.kill()
                return True
        return False

    def end(self) -> list[str]:
        """As Ctrl-C does. -> titles of the processes that outlived it, which are killed."""
        with suppress(psutil.Error):
            self._remember()
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, alive = psutil.wait_procs([process for process, _ in self._seen.values()], timeout=LINGER_S)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        return [self._seen[process.pid][1] for process in alive]

    def _remember(self) -> int:
        """Every process of the tree is known from now on, even if its parent dies. -> how many there are at work."""
        count = 0
        for process in self._front.children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(process.cmdline())[:120]
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                self._seen[process.pid] = process, title
                count += counts(title)
                if title.startswith(COORDINATOR_TITLE):
                    self._coordinator = process
        return count


@contextmanager
def service_process(
    config: ClusterConfig, output: Path, name: str, record: Record, environment: Mapping[str, str]
) -> Iterator[ServiceProcess]:
    """Ready when entered; ended afterwards. Its config and log are `output`/`name`.yaml and .log. `environment`: of all
    its processes, beside this one's own."""
    file, log, ready = (output / f"{name}{suffix}" for suffix in (".yaml", ".log", ".json"))
    file.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    command = [sys.executable, "-m", "cluster.cli", "-v", "up", "--json", "--config", str(file)]
    with log.open("wb") as errors, ready.open("wb") as answers:
        process = subprocess.Popen(
            command,
            stdout=answers,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        target = _target(process, ready, log)
    except BaseException:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)
        raise
    finally:
        ready.unlink()
    service = ServiceProcess(process, target)
    try:
        yield service
    finally:
        record.left_over += service.end()


def _target(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(ValueError, KeyError):
            return str(json.loads(ready.read_text())["target"])
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise StartupError(lines[-1].removeprefix("moe-cluster: ") if lines else f"it ended; see {log}")
        time.sleep(0.1)
    raise StartupError(f"not ready within {START_TIMEOUT_S:.0f} s; see {log}")
