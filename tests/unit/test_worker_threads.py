"""An actor says how it is whatever else it was asked for, or it would be taken for frozen and killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.configfile import find_config, load_cluster
from cluster.fabric.expertworker import ExpertWorker
from cluster.fabric.options import CONTROL, expert_options, router_options
from cluster.fabric.routerworker import RouterWorker

ROOT = Path(__file__).resolve().parents[2]
SLOW = {
    ExpertWorker: ("load", "arrive", "restore", "write_snapshot", "keep_snapshot", "handle"),
    RouterWorker: ("train_step", "generate", "score", "export", "write_snapshot", "keep_snapshot", "restore", "join"),
}
"""Any number of these may wait: as many `arrive` as groups are on their way to an actor."""


def group_of(worker: type, method: str) -> str:
    return getattr(getattr(worker, method), "__ray_concurrency_group__", "")


@pytest.mark.parametrize("worker", [ExpertWorker, RouterWorker])
def test_what_tells_how_an_actor_is_has_threads_of_its_own(worker: type) -> None:
    for method in ("vitals", "ping", "cut", "wait_until_death"):
        assert group_of(worker, method) == CONTROL
    for method in SLOW[worker]:
        assert group_of(worker, method) != CONTROL


def test_actors_of_a_cluster_that_is_shared_have_processes_of_their_own() -> None:
    """Embedded, any process of Ray's will do."""
    for mode, address in (("existing", "auto"), ("embedded", None)):
        config = load_cluster(find_config("local_cpu"), {"model": "tiny", "ray.mode": mode, "ray.address": address})
        for options in (expert_options(config), router_options(config)):
            assert ("runtime_env" in options) == (mode == "existing")


THREADS = """
import threading
from cluster.fabric.workertools import import_torch
import_torch(3)
import torch
counts = [torch.get_num_threads()]
other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
other.start()
other.join()
print(*counts)
"""


def test_all_threads_of_an_actor_compute_with_as_many_as_its_config_says() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT
    )
    assert done.stdout.split() == ["3", "3"], done.stderr


def test_the_groups_are_there() -> None:
    config = load_cluster(find_config("local_cpu"), {"model": "tiny"})
    options: dict[type, dict[str, Any]] = {ExpertWorker: expert_options(config), RouterWorker: router_options(config)}
    for worker, given in options.items():
        used = {group_of(worker, name) for name in vars(worker)} - {""}
        assert used == set(given["concurrency_groups"])
    assert expert_options(config)["max_concurrency"] > 1, "a snapshot is written while groups arrive"
