"""The keys on their way through the Ray edge, called as plain objects: router and expert actors of one cluster reach
each other over tcp:// and ipc://, and nobody else reaches them. No Ray process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray

from actors.compress.settings import CompressionSettings
from actors.errors import PeerLost
from actors.moe.settings import BalanceSettings
from actors.transport.curve import LinkKeys
from actors.transport.message import Message
from actors.transport.socket import SocketLink
from actors.values import Course, Placement, VersionChoice
from cluster.backend import Job, JobState
from cluster.config import ClusterConfig, JobConfig, LinksConfig, OptimizerConfig
from cluster.configfile import load_cluster
from cluster.fabric.contacts import ExpertContact
from cluster.fabric.expertworker import ExpertWorker
from cluster.fabric.links import link_keys
from cluster.fabric.measures import status_fields
from cluster.fabric.options import ZONE_LABEL
from cluster.fabric.routerworker import RouterWorker
from cluster.fabric.standing import Following

NAMES = ("expert-0", "expert-1")
PLACEMENT = Placement(1, tuple((name,) for name in NAMES), 4)


@pytest.fixture
def config() -> ClusterConfig:
    return load_cluster("local_cpu", {"model": "tiny", "experts.group_size": 4, "router.threads": 1})


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {ZONE_LABEL: "zone-2"}
    context = SimpleNamespace(get_node_id=lambda: "node", get_node_labels=lambda: labels)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)


@pytest.fixture(params=["tcp", "ipc"])
def secured(
    request: pytest.FixtureRequest, config: ClusterConfig, no_ray: None
) -> Iterator[tuple[list[ExpertWorker], list[ExpertContact], LinkKeys]]:
    """Two expert actors, and where they say that they are."""
    keys = link_keys(LinksConfig(secure="auto" if request.param == "tcp" else "on"))
    experts = [ExpertWorker(name, config) for name in NAMES]
    contacts = [worker.load([group], 0, keys, None) for group, worker in enumerate(experts)]
    if request.param == "tcp":  # as if they were on other hosts
        contacts = [
            replace(c, address=replace(c.address, host_id="x"), exchange=replace(c.exchange, host_id="x"))
            for c in contacts
        ]
    yield experts, contacts, keys
    for worker in experts:
        worker._server.stop()
        worker._exchange.stop()
        worker._host.close()


def test_they_reach_each_other(config, secured):
    experts, contacts, keys = secured
    router = RouterWorker("router-0", config)
    router.load(PLACEMENT, contacts, None, 0, None, 0, keys)
    logprobs, version = router.score([1, 2, 3, 4], VersionChoice())
    assert len(logprobs) == 3
    assert version == 0
    kinds = set(router.vitals()["links"].values())
    assert kinds in ({"socket/tcp+curve"}, {"socket/ipc+curve+shm"})
    for worker, other in zip(experts, reversed(contacts), strict=True):
        link = worker._open_peer(other.name, other.exchange)
        assert link.kind in kinds
        link.close()
        assert status_fields(worker.vitals())["zone"] == "zone-2"
        assert {use.kind for use in status_fields(worker.vitals())["link_use"]} == kinds
    (use,) = status_fields(router.vitals())["link_use"]
    assert use.sent_bytes > 0 < use.received_bytes
    assert use.wait_s > 0
    router._router.close()


def test_routers_tell_a_new_coordinator_who_leads(config, secured):
    experts, contacts, keys = secured
    job = Job("job-1", "mine", JobConfig(), JobState.RUNNING, 0, 1.0)
    first, second = (RouterWorker(f"router-{number}", config) for number in (0, 1))
    leader = first.load(PLACEMENT, contacts, None, 0, None, 0, keys)
    replica = second.load_replica(None, 0, keys)
    assert second.standing() is None
    first.begin_run(OptimizerConfig(), BalanceSettings(), CompressionSettings(), job)
    first.join(replica)
    second.follow(first.following())
    second.follow(Following(None, Course(0, 0)))
    said, other = first.standing(), second.standing()
    assert (said.contact, said.leads, said.followers) == (leader, True, ("router-1",))
    assert (other.contact, other.leads, other.followers) == (replica, False, ())
    assert other.placement == said.placement == PLACEMENT
    assert other.following == said.following == Following(job, Course(1, 0))
    assert first.link_keys() == second.link_keys() == experts[0].link_keys() == keys
    first._server.stop()
    first._router.close()
    second.promote([], said.term + 1)
    now = second.standing()
    assert (now.leads, now.term, now.following, now.vitals["run"]) == (True, said.term + 1, said.following, 1)
    second._server.stop()
    second._router.close()


@pytest.mark.parametrize("keys", [None, LinkKeys.generate(on_ipc=True)], ids=["no keys", "other keys"])
def test_nobody_else_reaches_them(secured, keys):
    _, contacts, _ = secured
    for contact in contacts:
        for address in (contact.address, contact.exchange):
            with pytest.raises(PeerLost, match="handshake"):
                SocketLink(contact.name, address, name="stranger", max_bytes=1 << 20, timeout_s=20, keys=keys)


def test_without_keys_nothing_is_encrypted(config, no_ray):
    worker = ExpertWorker(NAMES[0], config)
    contact = worker.load([], 0, link_keys(LinksConfig(secure="off")), None)
    link = SocketLink(contact.name, contact.address, name="r", max_bytes=1 << 20, timeout_s=20)
    assert link.call(Message("status"), 20).op == "ok"
    link.close()
    worker._server.stop()
    worker._exchange.stop()
    worker._host.close()
