"""What is kept of actors that are gone."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.fabric import lookout as lookout_module
from cluster.fabric.lookout import Lookout


def test_links_of_actors_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a router that has not noticed yet tells them once more."""
    told: dict[str, Any] = {"links": {"e0": "socket", "e1": "socket"}, "num_waiting": 0, "queue_s": 0.0, "pins": []}
    told |= {"left_out": []}
    monkeypatch.setattr(lookout_module, "call", lambda name, ref, timeout_s: ref)
    monkeypatch.setattr(lookout_module, "_ready", lambda refs: [name for name, ref in refs.items() if ref == told])
    lookout = Lookout(threading.RLock())  # type: ignore[arg-type]
    remote = SimpleNamespace(remote=lambda: "pending")
    for name in ("e0", "e1"):
        lookout.watch(name, SimpleNamespace(wait_until_death=remote, vitals=remote))
    router = SimpleNamespace(wait_until_death=remote, vitals=SimpleNamespace(remote=lambda: told))
    lookout.watch("router-0", router)
    lookout.look("router-0")
    assert (lookout.link_of("e0"), lookout.link_of("e1")) == ("socket", "socket")
    lookout.leave("e1")
    lookout._next_ping_s = 0.0
    lookout.look("router-0")
    assert (lookout.link_of("e0"), lookout.link_of("e1")) == ("socket", "")
    assert set(lookout._links) == {"e0"}
