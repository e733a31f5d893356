"""Tokens over relays between real actors. `links.relay: on` takes the simulated nodes for other hosts."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from cluster.config import OptimizerConfig
from cluster.configfile import find_config, load_cluster
from cluster.fabric.launch import launched

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

WAIT_S = 60.0


def test_a_node_is_reached_over_the_relay_of_its_first_actor(tmp_path: Path) -> None:
    values = {"experts.actors": 2, "experts.group_size": 2, "ray.nodes": 1, "links.relay": "on"}
    values |= {
        "ray.start_timeout_s": 240.0,
        "model": "tiny",
        "storage.root": str(tmp_path),
        "checkpoint.every_steps": 0,
    }
    batch = [[token % 250 for token in range(n, n + 32)] for n in range(8)]
    with launched(load_cluster(find_config("local_cpu"), values)) as running:
        running.router.begin_run(OptimizerConfig())
        for _ in range(2):
            assert running.router.train_step([batch], lr=1e-3, clip_norm=1.0).retries == 0
        deadline = time.monotonic() + WAIT_S
        while True:  # the router tells it with its next heartbeat
            actors = asyncio.run(running.backend.status(timeout_s=10)).actors
            links = {actor.id: actor.link for actor in actors if actor.role == "expert"}
            if all("via" in link for link in links.values()) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        assert {name: link.partition(" ")[2] for name, link in links.items()} == {
            "expert-0": "via expert-0",
            "expert-1": "via expert-0",
        }
