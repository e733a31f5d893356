"""Demand adds expert actors and idleness takes them away, without anybody asking."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cluster.serve import served
from cluster.service.client import Client
from tests.integration.test_copies import STREAM_S, WAIT_S, config_in, text

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

NUM_STREAMS = 4


def test_waiting_requests_add_an_actor_and_idleness_takes_it_away(tmp_path: Path) -> None:
    policy = {"enabled": True, "rise_s": 1.0, "idle_s": 4.0, "cool_down_s": 2.0, "max_queue_s": 0.2}
    changes = {
        "experts.actors": 1,
        "experts.redundancy": 1,
        "experts.max_actors": 2,
        "ray.nodes": 2,
        "router.max_sessions": 1,
        **{f"experts.autoscale.{name}": value for name, value in policy.items()},
    }
    with served(config_in(tmp_path, **changes)) as service, Client(service.target, timeout_s=WAIT_S) as client:
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                text(client)

        threads = [threading.Thread(target=serve) for _ in range(NUM_STREAMS)]
        for thread in threads:
            thread.start()
        try:
            wait_for_actors(client, 2)
        finally:
            stop.set()
            for thread in threads:
                thread.join(STREAM_S)
        wait_for_actors(client, 1)
        assert client.status().ready
        assert [entry.kind for entry in client.ledger().entries] == ["scale_up", "scale_down"]


def wait_for_actors(client: Client, count: int) -> None:
    deadline = time.monotonic() + 2 * WAIT_S
    while len(set(client.status().owners.values())) != count:
        assert time.monotonic() < deadline, client.operations()
        time.sleep(0.2)
