"""Relays through the Ray edge, called as plain objects: who has one, who uses it, over secured links. Without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray

from actors.compress.settings import CompressionSettings
from actors.moe.settings import BalanceSettings
from actors.values import Address, Placement
from cluster.config import ClusterConfig, LinksConfig, OptimizerConfig
from cluster.configfile import load_cluster
from cluster.fabric.contacts import ExpertContact
from cluster.fabric.expertworker import ExpertWorker
from cluster.fabric.links import link_keys
from cluster.fabric.routerworker import RELAYED_FROM_BYTES, RouterWorker
from cluster.fabric.workertools import has_relays

NAMES = ("expert-0", "expert-1")
PLACEMENT = Placement(1, tuple((name,) for name in NAMES), 4)
KEYS = link_keys(LinksConfig(secure="on"))


def config_of(**links: object) -> ClusterConfig:
    values = {f"links.{key}": value for key, value in links.items()}
    return load_cluster("local_cpu", {"model": "tiny", "experts.group_size": 4, "router.threads": 1, **values})


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "node", get_node_labels=dict)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)


@pytest.fixture
def contacts() -> Iterator[list[ExpertContact]]:
    experts = [ExpertWorker(name, config_of(relay="on")) for name in NAMES]
    yield [worker.load([group], 0, KEYS, None) for group, worker in enumerate(experts)]
    for worker in experts:
        for server in (worker._server, worker._exchange, worker._relay):
            server.stop()
        worker._host.close()


def test_every_router_relays_over_secured_links(contacts: list[ExpertContact]) -> None:
    first, second = (RouterWorker(f"router-{number}", config_of(relay="on")) for number in (0, 1))
    first.load(PLACEMENT, contacts, None, 0, None, 0, KEYS)
    first.begin_run(OptimizerConfig(), BalanceSettings(), CompressionSettings())
    replica = second.load_replica(None, 0, KEYS)
    first.join(replica)
    batch = [[token % 250 for token in range(n, n + 32)] for n in range(4)]
    assert first.train_step([batch], 1e-3, 1.0, 0.0).retries == 0
    for router in (first, second):
        kinds = router.vitals()["links"]
        assert kinds == dict.fromkeys(NAMES, "socket/ipc+curve+shm via expert-0")
    for router in (first, second):
        router._server.stop()
        router._router.close()


AWAY = Address("another host", "", "tcp://10.0.0.2:1")


@pytest.mark.parametrize(
    ("relay", "is_away", "worth_bytes"),
    [
        ("auto", True, RELAYED_FROM_BYTES),
        ("auto", False, None),
        ("on", True, 0),
        ("on", False, 0),
    ],
)
def test_what_is_relayed_by_itself_is_on_other_hosts(
    contacts: list[ExpertContact], relay: str, is_away: bool, worth_bytes: int | None
) -> None:
    contact = replace(contacts[0], address=AWAY, relay=AWAY) if is_away else contacts[0]
    relaying = RouterWorker("router-0", config_of(relay=relay))._relaying(contact)
    assert (relaying.worth_bytes if relaying else None) == worth_bytes
    if relaying:
        assert relaying.address == contact.address
        assert relaying.node == f"node of {contact.address.host_id}"


def test_an_actor_without_a_relay_is_asked_directly(contacts: list[ExpertContact]) -> None:
    assert RouterWorker("router-0", config_of(relay="on"))._relaying(replace(contacts[0], relay=None)) is None


@pytest.mark.parametrize(
    ("relay", "mode", "has"),
    [
        ("auto", "embedded", False),
        ("auto", "existing", True),
        ("on", "embedded", True),
        ("off", "embedded", False),
        ("off", "existing", False),
    ],
)
def test_who_may_be_on_other_hosts_has_a_relay(relay: str, mode: str, has: bool) -> None:
    config = config_of(relay=relay)
    assert has_relays(replace(config, ray=replace(config.ray, mode=mode))) is has  # type: ignore[arg-type]
