"""The Ray edge of an expert host. Nothing is decided here."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray

from actors.errors import StepAborted
from actors.values import Address
from cluster.config import ClusterConfig
from cluster.fabric.contacts import ExpertContact
from cluster.fabric.measures import Measures
from cluster.fabric.options import CONTROL
from cluster.fabric.standing import ExpertStanding, Watch
from cluster.fabric.workertools import (
    brake_of,
    has_relays,
    import_torch,
    import_transformers,
    of_version,
    open_link,
    payload_settings,
    way_of,
)

if TYPE_CHECKING:
    from actors.relay.relay import Relay
    from actors.transport.contract import Link
    from actors.transport.curve import LinkKeys
    from actors.transport.message import Message
    from actors.transport.socket import SocketServer
    from actors.transport.turns import Lane
    from cluster.checkpoint.manifest import Shard
    from cluster.checkpoint.memory import Holder, KeptDraft, Told, Way
    from cluster.checkpoint.store import Draft, Found

RESTORE_TURN_S = 600.0
"""For an earlier return to end."""


class ExpertWorker:
    """Holds an `ExpertHost` and serves its links from threads of their own; Ray calls only look after it."""

    def __init__(self, name: str, config: ClusterConfig, read_model: bool = False) -> None:
        """`read_model`: its groups will come from a model directory, which takes transformers."""
        import_torch(config.experts.threads)
        if read_model:
            import_transformers()
        self._name, self._config = name, config
        self._measures = Measures(config.experts.device)
        self._watch = Watch(config)
        self._contact: ExpertContact | None = None
        self._restoring = threading.Lock()
        self._bind_host = "127.0.0.1" if config.ray.mode == "embedded" else ray.util.get_node_ip_address()

    def node_id(self) -> str:
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def load(self, groups: Sequence[int], num_experts: int, keys: LinkKeys | None, layout: str | None) -> ExpertContact:
        """Takes the weights of its groups and begins to serve. Without groups it is there for those that arrive.

        `num_experts` of every layer, for a model that has grown; 0: as the config says. `keys`: of the cluster's links,
        where they are secured. `layout`: of that model, as JSON, so that nobody has to import transformers here to find
        out.
        """
        from actors.expert.host import ExpertHost
        from actors.moe.cache import CacheSettings
        from actors.trunk.layout import layout_from_json
        from cluster.fabric.source import model_source

        self._keys, experts = keys, self._config.experts
        self._host = ExpertHost(
            self._name,
            model_source(self._config, num_experts),
            groups,
            group_size=experts.group_size,
            device=experts.device,
            open_peer=self._open_peer,
            timeout_s=self._config.router.request_timeout_s,
            cache=CacheSettings(experts.expert_cache_size, experts.cache_dir) if experts.expert_cache_size else None,
            max_pairs=experts.max_pairs,
            layout=None if layout is None else layout_from_json(layout),
        )
        host = self._host
        host.updates.brake = brake_of(os.environ)
        self._server = self._serve(host.handle, host.idle, host.ready, host.lane, device=experts.device)
        self._exchange = self._serve(self._host.exchange.handle)
        self._relay = self._new_relay() if has_relays(self._config) else None
        relay = self._relay.address if self._relay else None
        self._contact = ExpertContact(
            self._name, self.node_id(), os.getpid(), self._server.address, self._exchange.address, relay
        )
        return self._contact

    @ray.method(concurrency_group=CONTROL)
    def ping(self) -> None:
        """There is a coordinator."""
        self._watch.pinged()

    @ray.method(concurrency_group=CONTROL)
    def standing(self) -> ExpertStanding | None:
        """None as long as it has not been loaded."""
        if self._contact is None:
            return None
        heard_s = self._watch.heard_s
        return ExpertStanding(self._contact, self.vitals(), heard_s)

    @ray.method(concurrency_group=CONTROL)
    def link_keys(self) -> LinkKeys | None:
        """As it was given them: for a coordinator that is new to it."""
        return self._keys

    def _serve(
        self,
        handler: Any,
        idle: Callable[[], bool] = lambda: False,
        ready: Callable[[Message], bool] = lambda question: True,
        lane: Callable[[Message], Lane] = lambda question: "training",
        device: str = "cpu",
    ) -> SocketServer:
        from actors.transport.socket import SocketServer

        server = SocketServer(
            self._name,
            handler,
            host=self._bind_host,
            max_bytes=self._config.links.max_message_bytes,
            idle=idle,
            ready=ready,
            keep_s=self._config.router.request_timeout_s,
            keys=self._keys,
            lane=lane,
            serving_weight=self._config.experts.serving_weight,
            payload=payload_settings(self._config, device),
        )
        server.start()
        return server

    def _new_relay(self) -> Relay:
        from actors.relay.relay import Relay

        relay = Relay(
            self._name,
            self._open_peer,
            host=self._bind_host,
            max_bytes=self._config.links.max_message_bytes,
            timeout_s=self._config.router.request_timeout_s,
            keys=self._keys,
            payload=payload_settings(self._config),
        )
        relay.start()
        return relay

    def _open_peer(self, name: str, address: Address) -> Link:
        return self._measures.opened(open_link(name, address, self._name, self._config, self._keys))

    def arrive(self, group: int, owner: ExpertContact, timeout_s: float) -> int:
        """Brings a group here from its owner, which goes on meanwhile. -> bytes that came."""
        return self._host.placing.arrive(group, owner.name, owner.exchange, self._exchange.address, timeout_s)

    @ray.method(concurrency_group=CONTROL)
    def leave_off(self, groups: Sequence[int]) -> None:
        """Gives up groups that are on their way here."""
        for group in groups:
            self._host.placing.leave_off(group)

    def write_snapshot(self, draft: Draft) -> Shard:
        """Beside steps. Its memory is free afterwards, written or not."""
        from actors.snapshots import taken_over
        from cluster.checkpoint.state import write_experts

        return write_experts(draft, self._name, taken_over(self._host.saving, draft.version))

    def keep_snapshot(self, draft: KeptDraft, peer: Holder | None) -> Shard:
        """In memory here and at the peer, beside steps."""
        from cluster.checkpoint.memory import keep_part
        from cluster.checkpoint.state import experts_shard

        snapshot, self._host.saving.for_peers = self._host.saving.for_peers, None
        content = experts_shard(of_version(snapshot, draft))
        return keep_part(draft, self._name, content, self._host.exchange.keeper, peer, self._way())

    @ray.method(concurrency_group=CONTROL)
    def drop_kept(self, snapshots: Sequence[str]) -> None:
        """Of those in memory these go."""
        self._host.exchange.keeper.drop(snapshots)

    @ray.method(concurrency_group=CONTROL)
    def remember_kept(self, told: Told) -> None:
        """The last complete one, for the next coordinator."""
        from cluster.checkpoint.memory import later

        keeper = self._host.exchange.keeper
        keeper.complete = later(keeper.complete, told)

    @ray.method(concurrency_group=CONTROL)
    def last_kept(self) -> Told | None:
        told: Told | None = self._host.exchange.keeper.complete
        return told

    def restore(self, groups: Sequence[int], found: Found, run: int) -> None:
        """These groups as they were saved, and nothing else, from now on.

        One at a time, and none of an earlier run: a try that has failed at another actor may still be loading here when
        the next one begins, and must not be the last to end. `StepAborted` for one that comes too late.
        """
        from cluster.checkpoint.memory import saved_experts

        if not self._restoring.acquire(timeout=RESTORE_TURN_S):
            raise StepAborted(f"{self._name} is still at an earlier return after {RESTORE_TURN_S:.0f} s")
        try:
            if run < (now := int(self._host.status()["run"])):
                raise StepAborted(f"a return to run {run} of {self._name}, which is at run {now}")
            with saved_experts(found, self._host.exchange.keeper, self._way()) as saved:
                self._host.saving.restore(groups, saved, run)
        finally:
            self._restoring.release()

    def _way(self) -> Way:
        return way_of(self._open_peer, self._config)

    @ray.method(concurrency_group=CONTROL)
    def cut(self, names: Sequence[str]) -> None:
        """Nothing is waited for from these actors any longer."""
        self._host.exchange.cut(names)

    def handle(self, question: Message) -> Message:
        """The data plane's question as a Ray call: what the links are measured against."""
        return self._host.handle("ray", question)

    @ray.method(concurrency_group=CONTROL)
    def vitals(self) -> dict[str, Any]:
        self._watch.vitals_asked()
        return {**self._host.status(), **self._measures.told(), "busy_s": self._server.busy_s}

    @ray.method(concurrency_group=CONTROL)
    def wait_until_death(self) -> None:
        """Does not return: the caller's reference fails the moment this process is gone. Only when another coordinator
        waits here it ends."""
        self._watch.wait()
