"""The actors of a cluster: started, loaded, watched, ended. Handles and contacts live here, decisions elsewhere."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ray

from actors.errors import MoeClusterError
from actors.values import Pinned, Placement
from cluster.backend import ActorStatus, ExpertCache
from cluster.config import ClusterConfig
from cluster.control.journal import Process
from cluster.control.model import ModelFacts
from cluster.errors import StartupError, Unavailable
from cluster.fabric.calls import call
from cluster.fabric.contacts import ExpertContact, RouterContact
from cluster.fabric.factory import ActorFactory
from cluster.fabric.fencing import end_process
from cluster.fabric.links import link_keys
from cluster.fabric.lookout import Lookout, Signs
from cluster.fabric.measures import status_fields
from cluster.fabric.nodes import expert_room, node_names, node_zones, nodes_with_room, short_name
from cluster.fabric.options import ROUTER
from cluster.fabric.standing import ExpertStanding, RouterStanding
from cluster.placement.placement import ActorSlot

if TYPE_CHECKING:
    from actors.transport.curve import LinkKeys
    from cluster.checkpoint.store import Found

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Survivors:
    """Actors that outlived a coordinator: handles, and what they say of themselves."""

    routers: dict[str, tuple[Any, RouterStanding]]
    """Those that have the trunk."""
    leader: str
    """One of them; empty where there are none."""
    experts: dict[str, tuple[Any, ExpertStanding]]

    @property
    def lead(self) -> RouterStanding | None:
        return self.routers[self.leader][1] if self.leader else None


class Crew:
    """Thread-safe."""

    def __init__(self, config: ClusterConfig, cluster: str) -> None:
        """`cluster`: what its actors are named after; see `options.lasting`."""
        self._config = config
        self._factory = ActorFactory(config, cluster)
        self._lock = threading.RLock()
        self._handles: dict[str, Any] = {}
        self._experts: dict[str, ExpertContact] = {}
        self._routers: dict[str, RouterContact] = {}
        """Those that have the trunk."""
        self._leader = ROUTER
        """Empty while none leads."""
        self._lookout = Lookout(self._lock)
        self._nodes: dict[str, str] = {}
        """Names of those that have or had an actor: asked for when one starts, since Ray's head may be away later."""
        self.leaving: Mapping[str, str] = {}
        """Id -> name of the nodes on which no new actor is to be started. Replaced, never changed."""
        self._ending: list[tuple[str, str, Any]] = []
        """Expert actors that were ended, their nodes, and what tells that the process is gone."""
        self.num_experts = 0
        """Of every MoE layer, for a model that has grown; 0: as the config says."""
        self._layouts: dict[int, str | None] = {}
        """By `num_experts`, as JSON: to import what they are made of takes a second and more."""

    @cached_property
    def link_keys(self) -> LinkKeys | None:
        """Of all links of this cluster. Made when they are first needed, so that an error is that of the start."""
        return link_keys(self._config.links)

    # -- starting -----------------------------------------------------------------------------------------------------

    @property
    def router(self) -> Any:
        """That leads; `Unavailable` while none does."""
        with self._lock:
            if not self._leader:
                raise Unavailable("no router leads at the moment; try again")
            return self.handle(self._leader)

    @property
    def leader(self) -> str:
        """Empty while no router leads."""
        with self._lock:
            return self._leader

    def lead(self, name: str) -> None:
        """It has been promoted. `Unavailable` if it has died since: nobody would look for another heir."""
        with self._lock:
            _found(self._routers, name)
            self._leader = name

    def routers(self) -> dict[str, tuple[RouterContact, Any]]:
        """Contact and Ray handle of every router that has the trunk."""
        with self._lock:
            return {name: (contact, self._handles[name]) for name, contact in self._routers.items()}

    def start_replicas(self, count: int, control: Any) -> list[RouterContact]:
        """Routers that have yet to join. `StartupError` if there is no room for one of them: then none is started."""
        names = self._factory.router_names(count)
        self._create_routers(names)
        loading = {
            name: self._handles[name].load_replica.remote(control, self.num_experts, self.link_keys) for name in names
        }
        try:
            return [self._factory.started(name, ref) for name, ref in loading.items()]
        except MoeClusterError:
            self.end(names)
            raise

    def joined(self, contact: RouterContact, leader: str) -> None:
        """It has the trunk from this leader: it is watched from now on, and serves. `Unavailable` if that one leads no
        more: who leads now does not know it."""
        self._learn_nodes()
        with self._lock:
            if self._leader != leader:
                raise Unavailable(f"{leader}, which {contact.name} joined, has ended")
            self._routers[contact.name] = contact
            self._lookout.watch(contact.name, self.handle(contact.name))

    def status_of(self, name: str) -> ActorStatus:
        """Asked now. `Unavailable` if it has ended."""
        vitals = call(name, self.handle(name).vitals.remote(), ASK_TIMEOUT_S)
        with self._lock:
            self._lookout.check(name)
            return self._status(name, vitals)

    def start_router(self) -> ModelFacts:
        """Its process, in the place of all before; `load_router` gives it its weights."""
        self.end([ROUTER, *self.routers()])
        self._create_routers([ROUTER])
        with self._lock:
            self._leader = ROUTER
        return self.facts()

    def _create_routers(self, names: Sequence[str]) -> None:
        handles = self._factory.routers(names)
        with self._lock:
            self._handles |= handles

    def facts(self, num_experts: int = 0) -> ModelFacts:
        """Of the model as the config says, or grown to so many experts."""
        facts: ModelFacts = self._factory.started(ROUTER, self.router.facts.remote(num_experts))
        return facts

    def start_experts(self, count: int, avoid: Collection[str] = ()) -> list[ActorSlot]:
        """Processes without weights, not on the nodes with the ids `avoid`. `StartupError` if one finds no room."""
        return self.await_experts(self.create_experts(count, avoid))

    def await_experts(self, where: Mapping[str, Any]) -> list[ActorSlot]:
        """Those of `create_experts`. `StartupError` if one has not found room: then none is left."""
        try:
            return [_slot(name, self._factory.started(name, ref)) for name, ref in where.items()]
        except MoeClusterError:
            self.end(where)
            raise

    def start_experts_where_room(self, count: int, patience_s: float) -> list[ActorSlot]:
        """As `start_experts`, but those that have not found room and started within `patience_s` are left out."""
        where = self.create_experts(min(count, self._most_room()))
        ready, _ = ray.wait(list(where.values()), num_returns=len(where), timeout=patience_s) if where else ([], [])
        started: list[ActorSlot] = []
        for name, ref in where.items():
            try:
                if ref not in ready:
                    raise StartupError(f"{name} found no room within {patience_s:.1f} s")
                started.append(_slot(name, call(name, ref, 1.0)))
            except MoeClusterError as error:
                logger.info("not started: %s", error)
                self.end([name])
        return started

    def occupied_nodes(self) -> set[str]:
        """Ids of the nodes that carry an expert actor."""
        with self._lock:
            return {contact.node_id for contact in self._experts.values()}

    def open_nodes(self) -> set[str]:
        """Ids of the nodes that carry none and have room for one."""
        return nodes_with_room(self.leaving) - self.occupied_nodes()

    def may_have_room(self) -> bool:
        """Whether more expert actors may find a node. Of a Ray cluster that exists nobody knows: nodes may be added."""
        return self._most_room() > 0

    def _most_room(self) -> int:
        return expert_room(self.leaving) if self._config.ray.mode == "embedded" else self._config.experts.max_actors

    def create_experts(self, count: int, avoid: Collection[str] = (), *, read_model: bool = False) -> dict[str, Any]:
        """Does not wait for their processes. -> actor -> what its node's id will be told by, once it has found one.

        `read_model`: their groups come from a model directory, and not from a seed or from others.
        """
        names = self._factory.expert_names(count)
        handles = self._factory.experts(names, {*self.leaving, *avoid}, read_model=read_model)
        with self._lock:
            self._handles |= handles
        return {name: handle.node_id.remote() for name, handle in handles.items()}

    def load_experts(self, placement: Placement, names: Sequence[str]) -> None:
        """Each takes the groups it holds from the model directory; without any it is there for those that arrive."""
        layout = self._layout()
        loading = {
            name: self._handles[name].load.remote(placement.held_by(name), self.num_experts, self.link_keys, layout)
            for name in names
        }
        for name, ref in loading.items():
            contact = self._factory.started(name, ref)
            self._learn_nodes()
            with self._lock:
                self._experts[name] = contact
                self._lookout.watch(name, self._handles[name])

    def _layout(self) -> str | None:
        """Of the model, asked of the router once. Without an answer expert actors find out for themselves, which takes
        them longer."""
        with self._lock:
            num_experts = self.num_experts
            known = self._layouts.get(num_experts)
        if known is None:
            try:
                known = call(ROUTER, self.router.layout.remote(num_experts), ASK_TIMEOUT_S)
            except MoeClusterError as error:
                logger.info("no router tells the layout of the model: %s", error)
                return None
            with self._lock:
                self._layouts[num_experts] = known
        return known

    def load_router(self, placement: Placement, control: Any, found: Found | None, run: int) -> None:
        """After the expert actors of this placement: the trunk from the model directory, or from a checkpoint as this
        run. Only then is it watched, and taken for ready."""
        contacts = self.contacts(placement)
        ref = self.router.load.remote(placement, contacts, control, self.num_experts, found, run, self.link_keys)
        self.joined(self._factory.started(ROUTER, ref), ROUTER)

    def take_over(self, found: Survivors, numbers: tuple[int, int], num_experts: int, keys: LinkKeys | None) -> None:
        """Actors that another coordinator started, loaded all of them, and watched from now on. `numbers`: those that
        it would have given next, see `next_numbers`. `keys`: of their links."""
        self._learn_nodes()
        self.num_experts, self.link_keys = num_experts, keys
        # Whom the router that leads has left out is not to be mistaken for one that is new.
        left_out = found.lead.vitals["left_out"] if found.lead else ()
        self._factory.go_on(numbers, found.experts, (*found.routers, *left_out))
        with self._lock:
            for name, (handle, expert) in found.experts.items():
                self._handles[name], self._experts[name] = handle, expert.contact
            for name, (handle, router) in found.routers.items():
                self._handles[name], self._routers[name] = handle, router.contact
            self._leader = found.leader
            for name in (*found.routers, *found.experts):
                self._lookout.watch(name, self._handles[name])

    def processes(self) -> tuple[Process, ...]:
        with self._lock:
            contacts: list[RouterContact | ExpertContact] = [*self._routers.values(), *self._experts.values()]
            return tuple(Process(contact.name, contact.node_id, contact.pid) for contact in contacts)

    @property
    def next_numbers(self) -> tuple[int, int]:
        """Of the next expert actor, and of the next router."""
        return self._factory.next_numbers

    def leave_off(self, groups: dict[str, Sequence[int]]) -> None:
        """These are not awaited any more by these expert actors. It waits until they know, or else what is still on its
        way to one of them might meet a group that is brought there anew; who does not answer is found out by others."""
        with self._lock:
            refs = [self._handles[name].leave_off.remote(on_their_way) for name, on_their_way in groups.items()]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=ASK_TIMEOUT_S)

    def _learn_nodes(self) -> None:
        names = node_names()
        with self._lock:
            self._nodes |= names

    # -- who is there -------------------------------------------------------------------------------------------------

    def handle(self, name: str) -> Any:
        """`Unavailable` if it has ended."""
        with self._lock:
            return _found(self._handles, name)

    def contact(self, name: str) -> ExpertContact:
        """`Unavailable` if it has ended."""
        with self._lock:
            contact: ExpertContact = _found(self._experts, name)
            return contact

    def pid_of(self, name: str) -> int | None:
        """Of its process, once it has been loaded; None too if it has ended."""
        with self._lock:
            contact = self._experts.get(name) or self._routers.get(name)
            return contact.pid if contact else None

    def run(self) -> int:
        """The newest that any living actor knows of: jobs, and returns to checkpoints, are counted by it."""
        with self._lock:
            refs = {name: self._handles[name].vitals.remote() for name in self._lookout.watched}
        runs = [0]
        for name, ref in refs.items():
            try:
                runs.append(int(call(name, ref, ASK_TIMEOUT_S)["run"]))
            except MoeClusterError as error:
                logger.info("%s does not tell its run: %s", name, error)
        return max(runs)

    def contacts(self, placement: Placement) -> list[ExpertContact]:
        with self._lock:
            return [_found(self._experts, name) for name in placement.actors]

    def experts(self) -> list[tuple[ExpertContact, Any]]:
        """Data-plane contact and Ray handle of each expert actor."""
        with self._lock:
            return [(contact, self._handles[name]) for name, contact in self._experts.items()]

    # -- nodes that leave ---------------------------------------------------------------------------------------------

    def router_nodes(self) -> set[str]:
        """Ids of the nodes that carry a router."""
        return {contact.node_id for contact, _ in self.routers().values()}

    def num_staying(self) -> int:
        """Expert actors on nodes that do not leave."""
        return sum(contact.node_id not in self.leaving for contact, _ in self.experts())

    def on_node(self, node_id: str) -> list[str]:
        """Expert actors there whose processes have not ended."""
        with self._lock:
            self._forget_ended()
            living = [contact.name for contact in self._experts.values() if contact.node_id == node_id]
            return living + [name for name, node, _ in self._ending if node == node_id]

    def _forget_ended(self) -> None:
        refs = [ref for _, _, ref in self._ending]
        gone, _ = ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ([], [])
        self._ending = [ending for ending in self._ending if ending[2] not in gone]

    # -- ending -------------------------------------------------------------------------------------------------------

    def end(self, names: Iterable[str]) -> None:
        """Their processes end; they are not watched any more."""
        for name in names:
            with self._lock:
                handle = self._handles.pop(name, None)
                death = self._lookout.leave(name)
                contact = self._experts.pop(name, None)
                if contact is not None and death is not None:
                    self._forget_ended()
                    self._ending.append((name, contact.node_id, death))
                self._routers.pop(name, None)
                if name == self._leader:
                    self._leader = ""
            if handle is not None:
                ray.kill(handle)

    def cut_off(self, name: str) -> None:
        """Nobody waits any longer for an actor that does not answer and may hold its connections open for ever."""
        with self._lock:
            refs = [handle.cut.remote([name]) for other, handle in self._handles.items() if other != name]
            contact = self._experts.get(name) or self._routers.get(name)
        ray.wait(refs, num_returns=len(refs), timeout=1.0)
        if contact is not None:
            end_process(contact.node_id, contact.pid)

    def end_all(self) -> None:
        with self._lock:  # others may still be starting actors
            handles = list(self._handles.values())
        for handle in handles:
            ray.kill(handle)

    def ping(self) -> None:
        """Tells all, also those that are being loaded, that there is a coordinator."""
        with self._lock:
            for handle in self._handles.values():
                handle.ping.remote()

    # -- watching -----------------------------------------------------------------------------------------------------

    def look(self) -> Signs:
        """To be called several times a second."""
        with self._lock:
            signs = self._lookout.look(self._leader)
            signs.seen = [self._status(name, vitals) for name, vitals in signs.vitals.items()]
            return signs

    def pins_of(self, router: str) -> tuple[float, tuple[Pinned, ...]] | None:
        """When it last told which pins it has, by `time.monotonic`, and which."""
        return self._lookout.pins_of(router)

    def demand(self) -> tuple[dict[str, float], int, float]:
        """Share of the time that each expert actor was busy lately, requests that wait, how long the first has."""
        return self._lookout.demand()

    def _status(self, name: str, vitals: dict[str, Any]) -> ActorStatus:
        expert = self._experts.get(name)
        contact = expert or self._routers[name]
        return ActorStatus(
            id=name,
            role="expert" if expert else "router",
            node=self._nodes.get(contact.node_id, short_name(contact.node_id)),
            pid=contact.pid,
            state="ready",
            device=self._config.experts.device if expert else self._config.router.device,
            version=int(vitals.get("used", vitals["version"])),
            memory_bytes=int(vitals["memory_bytes"]),
            pinned_bytes=int(vitals["pinned_bytes"]),
            tokens=int(vitals.get("tokens", 0)),
            link=self._lookout.link_of(name),
            cache=ExpertCache(**vitals["cache"]) if vitals.get("cache") else None,
            merged_updates=int(vitals.get("merged", 0)),
            **status_fields(vitals),
        )


def _found(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise Unavailable(f"{name} has ended meanwhile; try again")
    return table[name]


def _slot(name: str, node_id: str) -> ActorSlot:
    return ActorSlot(name, node_id, node_zones().get(node_id, ""))
