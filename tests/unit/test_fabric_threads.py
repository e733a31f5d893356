"""Threads that look after nodes go on after what they could not do once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RaySystemError

from cluster.fabric import keeper, notices
from cluster.fabric.keeper import NodeKeeper
from cluster.fabric.notices import Notices

WAIT_S = 10.0


@contextmanager
def kept(nodes: Any, revive: Any) -> Iterator[None]:
    node_keeper = NodeKeeper(nodes, revive, 0.0)
    node_keeper.start()
    try:
        yield
    finally:
        node_keeper.stop()


def test_a_node_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "LOOK_EVERY_S", 0.01)
    dead: Any = SimpleNamespace(remaining_processes_alive=lambda: False)
    started, tries = threading.Event(), list[str]()

    def revive(name: str) -> Any:
        tries.append(name)
        if len(tries) == 1:
            raise OSError("no process can be started now")
        started.set()
        return SimpleNamespace(poll=lambda: None, terminate=lambda: None, wait=lambda timeout: 0)

    with kept({"node-1": dead}, revive):
        assert started.wait(WAIT_S)


def test_notices_are_looked_for_though_the_control_store_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that comes back may begin while Ray's head is away."""
    monkeypatch.setattr(notices, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(notices, "node_names", lambda: {"id": "node-1"})
    monkeypatch.setattr(notices.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="here"))
    looked, tries = threading.Event(), list[str]()

    class Store:
        def __init__(self, address: str) -> None:
            tries.append(address)
            if len(tries) == 1:
                raise RaySystemError("it is away")

        def get_draining_nodes(self, timeout: float) -> dict[str, int]:
            if len(tries) > 1:
                looked.set()
            return {"id": 5000}

    monkeypatch.setattr(notices, "GcsClient", Store)
    watch = Notices()
    try:
        assert looked.wait(WAIT_S)
    finally:
        watch.stop()
