"""Snapshots in memory: what is lost comes back from them as from a checkpoint, as long as they are complete.

The fabric's own code over hosts and a router in this process; no Ray starts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.compress.settings import CompressionSettings
from actors.errors import CheckpointError, InvalidInput
from actors.moe.settings import BalanceSettings
from actors.optim import OptimizerSettings
from actors.peer_snapshots import Keeper
from actors.transport.contract import Link
from actors.transport.local import LocalLink
from actors.trunk.model import ModelSource
from actors.values import Address, Growth, Placement, SnapshotTaken
from cluster.backend import ActorStatus
from cluster.checkpoint.manifest import Manifest, Shard
from cluster.checkpoint.memory import Kept, Told, Way, keep_part, later, saved_experts, saved_router
from cluster.checkpoint.state import experts_shard, router_shard, write_experts, write_router
from cluster.checkpoint.store import CheckpointStore, Found
from cluster.config import JobConfig
from cluster.control.coordinator import Coordinator
from cluster.control.model import ModelFacts
from cluster.fabric import recovery, snapshots
from cluster.fabric.guarded import Guarded
from cluster.fabric.recovery import Recovery
from cluster.fabric.snapshots import Snapshots
from tests.families import save
from tests.local import LocalCluster, cluster

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)
STEPS = 12
BATCHES = [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(t)) for t in range(STEPS)]
BALANCE = BalanceSettings(bias_speed=0.01)
OPTIMIZER = OptimizerSettings(weight_decay=0.3)
NO_COMPRESSION = CompressionSettings()
WAIT_S = 30.0
PIECE_BYTES = 1000


class Remote:
    """A remote method: `call`, patched, gets what was asked; what nobody waits for is done at once."""

    def __init__(self, method: Callable[..., Any], *, at_once: bool = False) -> None:
        self._method, self._at_once = method, at_once

    def remote(self, *args: Any) -> Any:
        if self._at_once:
            return self._method(*args)
        return lambda: self._method(*args)


class Crew:
    """What `Snapshots` and `Recovery` want of the cluster's crew, over a cluster in this process."""

    leader = "router-0"

    def __init__(self, local: LocalCluster, nodes: Mapping[str, str]) -> None:
        self._local, self._nodes = local, nodes
        self.num_experts = 0
        self.before_keeping: Callable[[str], object] = lambda name: None
        self.router_pid = 1
        router = local.router
        self.router = SimpleNamespace(
            take_snapshot=Remote(lambda for_peers: router.take_snapshot(for_peers=for_peers)),
            keep_snapshot=Remote(lambda draft, peer: self._keep(self.leader, draft, peer)),
            drop_kept=Remote(lambda ids: router.keeper.drop(ids), at_once=True),
            remember_kept=Remote(lambda told: setattr(router.keeper, "complete", told), at_once=True),
            last_kept=Remote(lambda: router.keeper.complete),
            restore=Remote(self._restore_router),
        )

    def run(self) -> int:
        return max(member.host.status()["run"] for member in self._living())

    def experts(self) -> list[tuple[Any, Any]]:
        return [(self._contact(member.name), self.handle(member.name)) for member in self._living()]

    def routers(self) -> dict[str, tuple[Any, Any]]:
        contact = SimpleNamespace(name=self.leader, pid=self.router_pid, node_id="head", address=Address("", "", ""))
        return {self.leader: (contact, self.router)}

    def contacts(self, placement: Placement) -> list[Any]:
        return [self._contact(name) for name in placement.actors]

    def handle(self, name: str) -> Any:
        if name == self.leader:
            return self.router
        host = self._local.members[name].host
        keeper = host.exchange.keeper
        return SimpleNamespace(
            remember_kept=Remote(lambda told: setattr(keeper, "complete", told), at_once=True),
            last_kept=Remote(lambda: keeper.complete),
            keep_snapshot=Remote(lambda draft, peer: self._keep(name, draft, peer)),
            drop_kept=Remote(keeper.drop, at_once=True),
            restore=Remote(lambda groups, found, run: self._restore(name, groups, found, run)),
        )

    def facts(self, num_experts: int) -> Any:
        return SimpleNamespace(num_parameters=1000)

    def _living(self) -> list[Any]:
        return [member for member in self._local.members.values() if not member.dead]

    def _contact(self, name: str) -> Any:
        member = self._local.members[name]
        return SimpleNamespace(
            name=name, pid=100 + member.number, node_id=self._nodes[name], exchange=member.exchange_address
        )

    def _open(self, name: str, address: Address) -> Link:
        if name == self.leader:
            return LocalLink(name, self._local.router.keeper.handle)
        return self._local.members[name].open_exchange()

    @property
    def _way(self) -> Way:
        return Way(self._open, 10.0, PIECE_BYTES)

    def _keep(self, name: str, draft: Any, peer: Any) -> Shard:
        self.before_keeping(name)
        router = self._local.router
        if name == self.leader:
            assert router.saving.for_peers is not None
            return keep_part(draft, name, router_shard(router.saving.for_peers), router.keeper, peer, self._way)
        host = self._local.members[name].host
        assert host.saving.for_peers is not None
        return keep_part(draft, name, experts_shard(host.saving.for_peers), host.exchange.keeper, peer, self._way)

    def _restore(self, name: str, groups: Any, found: Found, run: int) -> None:
        host = self._local.members[name].host
        with saved_experts(found, host.exchange.keeper, self._way) as saved:
            host.saving.restore(groups, saved, run)

    def _restore_router(self, placement: Placement, contacts: Any, found: Found, run: int) -> None:
        router = self._local.router
        with saved_router(found, router.keeper, self._way) as saved:
            router.restore(self._local.roster(placement), saved, run)


class Storage:
    """The vault, over a store that is written to by `save`."""

    url = "here"

    def __init__(self, root: Path) -> None:
        self._store = CheckpointStore(str(root))

    def newest(self) -> Found | None:
        return self._store.latest()

    def newest_version(self) -> int:
        return max((found.manifest.version for found in self._store.committed()), default=-1)

    def manifest_of(self, taken: SnapshotTaken, job: Mapping[str, Any] | None, shards: tuple[Shard, ...]) -> Manifest:
        return Manifest(taken.version, 0.0, {"num_experts": taken.num_experts}, job, shards)

    def save(self, local: LocalCluster, job: Mapping[str, Any]) -> None:
        taken = local.router.take_snapshot()
        draft = self._store.begin(taken.version)
        shards = [write_experts(draft, name, local.members[name].host.saving.snapshot) for name in taken.actors]
        shards.append(write_router(draft, "router-0", local.router.saving.snapshot))
        self._store.commit(draft, self.manifest_of(taken, job, tuple(shards)))


class Bench:
    """A cluster that trains a job, as the fabric sees it."""

    def __init__(
        self,
        local: LocalCluster,
        root: Path,
        every_steps: int,
        nodes: Mapping[str, str],
        optimizer: OptimizerSettings = OPTIMIZER,
        compression: CompressionSettings = NO_COMPRESSION,
    ) -> None:
        self.local, self.compression = local, compression
        self.coordinator = Coordinator(MODEL, local.placement)
        for name in ("router-0", *local.members):
            role = "router" if name == "router-0" else "expert"
            node = nodes.get(name, "head")
            self.coordinator.actor_seen(ActorStatus(name, role, node, 1, "ready", device="cpu", version=0), 0.0)
        self.crew = Crew(local, nodes)
        self.storage = Storage(root)
        state = Guarded(self.coordinator)
        checkpoints: Any = SimpleNamespace(
            vault=self.storage, job_at=lambda taken: self.job_dict, begun_at=lambda _: None
        )
        self.snapshots = Snapshots(every_steps, state, self.crew, checkpoints)  # type: ignore[arg-type]
        changes: Any = SimpleNamespace(try_begin=lambda what: True, end=lambda: None)
        scaling: Any = SimpleNamespace(wanted=0)
        self.recovery = Recovery(
            state,
            self.crew,
            changes,
            scaling,
            checkpoints,
            self.snapshots,
            None,
            1,  # type: ignore[arg-type]
        )
        self.job = self.coordinator.jobs.submit(JobConfig(steps=100), "mine", 1.0).id
        self.coordinator.step(1.0)
        local.router.begin_run(optimizer, BALANCE, compression)
        self.losses: dict[int, float] = {}

    @property
    def job_dict(self) -> dict[str, Any]:
        from cluster.control.jobtable import job_to_dict

        return job_to_dict(self.coordinator.jobs.get(self.job))

    def train(self, *steps: int) -> None:
        """Each is waited for, with its snapshot."""
        for step in steps:
            report = self.local.router.train_step([BATCHES[step - 1]], lr=1e-2, clip_norm=1.0, bias_speed=0.01)
            self.losses[step] = report.loss
            self.coordinator.step_committed(self.job, step, {"loss": report.loss}, float(step))
            self.snapshots.after_step(self.job, step)
            self.settle()

    def come_back(self) -> None:
        """The coordinator has died, and another is in its place, which knows what the actors tell it."""
        every_steps = self.snapshots._every_steps
        self.coordinator.health.can_restore = False
        self.snapshots = Snapshots(every_steps, self.snapshots._state, self.crew, self.snapshots._checkpoints)  # type: ignore[arg-type]
        self.recovery._snapshots = self.snapshots
        self.snapshots.recall(self.coordinator.status().version)

    def settle(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while self.snapshots._turn.locked():
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def kill(self, *names: str) -> None:
        for name in names:
            self.local.members[name].kill()
            self.coordinator.actor_lost(name, 50.0, "killed")

    def go_back(self) -> int | None:
        step = self.recovery.go_back(self.job, lambda: False)
        self.local.placement = self.coordinator.placement
        if step is not None:
            assert self.local.router.continue_run(BALANCE, self.compression).version == step
        return step

    @property
    def kept_ids(self) -> set[str]:
        keepers = [self.local.router.keeper, *(host.exchange.keeper for host in self.local.hosts)]
        return {snapshot for keeper in keepers for snapshot, _ in keeper._parts}

    def last_note(self) -> str:
        events, _ = self.coordinator.jobs.events(self.job, 0, 1000)
        return [event.message for event in events if event.kind == "note"][-1]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (recovery, snapshots):
        monkeypatch.setattr(module, "call", lambda who, ref, timeout_s: ref())
    monkeypatch.setattr(recovery, "AGAIN_S", 0.01)
    monkeypatch.setattr(recovery.ray, "available_resources", dict)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


@pytest.fixture(scope="module")
def unbroken(source: ModelSource) -> dict[int, float]:
    with cluster(source, 2) as local:
        local.router.begin_run(OPTIMIZER, BALANCE)
        return {
            step: local.router.train_step([BATCHES[step - 1]], lr=1e-2, clip_norm=1.0, bias_speed=0.01).loss
            for step in range(1, STEPS + 1)
        }


@contextmanager
def bench(
    source: ModelSource,
    root: Path,
    actors: int = 3,
    every_steps: int = 5,
    links: str = "local",
    redundancy: int = 1,
    group_size: int = 1,
    **of_the_job: Any,
) -> Iterator[Bench]:
    nodes = {f"expert-{i}": f"node-{i}" for i in range(actors)}
    with cluster(source, actors, group_size=group_size, links=links, redundancy=redundancy) as local:
        yield Bench(local, root, every_steps, nodes, **of_the_job)


def same(found: Mapping[int, float], unbroken: Mapping[int, float]) -> None:
    assert found == pytest.approx({step: unbroken[step] for step in found}, rel=1e-9)


@pytest.mark.parametrize(("actors", "links"), [(3, "socket"), (2, "local")])
def test_groups_come_back_from_the_memory_of_a_peer(
    source: ModelSource, tmp_path: Path, unbroken: dict[int, float], actors: int, links: str
) -> None:
    with bench(source, tmp_path, actors, links=links) as here:
        here.storage.save(here.local, here.job_dict)
        here.train(*range(1, 8))
        here.kill("expert-1")
        assert here.go_back() == 5
        assert "version 5 from the memory of the actors" in here.last_note()
        (entry,) = here.coordinator.ledger.entries()
        assert entry.steps_replayed == 2
        assert "from the memory of the actors" in entry.message
        here.train(*range(6, STEPS + 1))
        same(here.losses, unbroken)
        assert len(here.losses) == STEPS


def test_the_same_snapshot_serves_twice_and_no_storage_is_needed(
    source: ModelSource, tmp_path: Path, unbroken: dict[int, float]
) -> None:
    with bench(source, tmp_path) as here:
        here.train(*range(1, 7))
        assert here.coordinator.health.can_restore
        here.kill("expert-1")
        assert here.go_back() == 5
        here.train(6)
        here.kill("expert-0")
        # Of what expert-0 and expert-1 had, expert-2 keeps one and nobody the other.
        with pytest.raises(InvalidInput, match="holds no checkpoint"):
            here.go_back()
    with bench(source, tmp_path, 4) as here:
        here.train(*range(1, 7))
        here.kill("expert-1")
        assert here.go_back() == 5
        here.train(6)
        here.kill("expert-3")
        assert here.go_back() == 5
        here.train(*range(6, STEPS + 1))
        same(here.losses, unbroken)


def test_an_actor_and_its_peer_at_once_take_the_snapshot_with_them(
    source: ModelSource, tmp_path: Path, unbroken: dict[int, float]
) -> None:
    with bench(source, tmp_path) as here:
        here.train(1, 2)
        here.storage.save(here.local, here.job_dict)
        here.train(3, 4, 5, 6)
        here.kill("expert-0", "expert-1")
        assert here.go_back() == 2
        assert str(tmp_path) in here.last_note()
        here.train(*range(3, STEPS + 1))
        same(here.losses, unbroken)


def test_a_checkpoint_that_is_newer_is_taken(source: ModelSource, tmp_path: Path) -> None:
    with bench(source, tmp_path) as here:
        here.train(*range(1, 7))
        here.storage.save(here.local, here.job_dict)
        here.train(7)
        here.kill("expert-1")
        assert here.go_back() == 6
        # The snapshot is of a past that is no more.
        assert here.snapshots.newest() is None


def test_a_snapshot_that_was_being_made_is_not_used(
    source: ModelSource, tmp_path: Path, unbroken: dict[int, float]
) -> None:
    with bench(source, tmp_path) as here:
        here.train(*range(1, 10))

        def die(name: str) -> None:
            if name == "expert-0":  # whose peer it is
                here.kill("expert-1")

        here.crew.before_keeping = die
        here.train(10)
        assert "no snapshot is kept of version 10" in here.last_note()
        here.crew.before_keeping = lambda name: None
        assert len(here.kept_ids) == 1, "its parts are dropped"
        assert here.go_back() == 5
        here.train(*range(6, STEPS + 1))
        same(here.losses, unbroken)


def test_one_that_is_complete_only_after_a_return_is_not_used(source: ModelSource, tmp_path: Path) -> None:
    with bench(source, tmp_path) as here:
        here.train(*range(1, 10))
        go, asked = threading.Event(), threading.Event()

        def wait(name: str) -> None:
            asked.set()
            assert go.wait(WAIT_S)

        here.crew.before_keeping = wait
        stepping = threading.Thread(target=here.train, args=(10,))
        stepping.start()
        assert asked.wait(WAIT_S)
        kept = here.snapshots.newest()
        go.set()
        stepping.join(WAIT_S)
        here.settle()
        assert kept is not None
        assert here.snapshots.newest() is kept


def test_a_coordinator_that_comes_back_is_told_of_it(
    source: ModelSource, tmp_path: Path, unbroken: dict[int, float]
) -> None:
    with bench(source, tmp_path) as here:
        here.train(*range(1, 8))
        here.come_back()
        assert here.coordinator.health.can_restore
        here.kill("expert-1")
        assert here.go_back() == 5
        assert "version 5 from the memory of the actors" in here.last_note()
        here.train(6)
        here.come_back()  # the return was to the very snapshot: it serves on
        here.kill("expert-0")
        assert here.snapshots.newest() is None, "of two actors that have ended nobody has both parts"
        assert here.snapshots._last is not None
    with bench(source, tmp_path) as here:
        here.train(*range(1, 12))
        here.come_back()
        here.kill("expert-2")
        assert here.go_back() == 10
        here.train(11, 12)
        same(here.losses, unbroken)


def test_a_snapshot_of_a_past_that_is_no_more_is_not_recalled(source: ModelSource, tmp_path: Path) -> None:
    with bench(source, tmp_path) as here:
        here.train(*range(1, 7))
        here.storage.save(here.local, here.job_dict)
        here.kill("expert-1")
        assert here.go_back() == 6, "the checkpoint is newer"
        here.come_back()
        assert here.snapshots.newest() is None
    with bench(source, tmp_path / "other") as here:
        here.train(*range(1, 7))
        here.local.router.replace_weights(str(source.path))
        here.come_back()
        assert here.snapshots.newest() is None, "it would undo the import"
    with bench(source, tmp_path / "third") as here:
        here.train(*range(1, 7))
        here.snapshots.recall(version=4)
        assert here.snapshots._last is not None
        here.come_back()
        here.snapshots._last = None
        here.snapshots.recall(version=4)
        assert here.snapshots._last is None, "it is newer than the weights"


def test_two_generations_at_most(source: ModelSource, tmp_path: Path) -> None:
    with bench(source, tmp_path, every_steps=1) as here:
        counts = []
        here.crew.before_keeping = lambda name: counts.append(len(here.kept_ids))
        here.train(*range(1, 5))
        assert max(counts) == 2
        assert len(here.kept_ids) == 1
        kept = here.snapshots.newest()
        assert kept is not None
        assert kept.manifest.version == 4
        # Each part is where it was made and at a peer on another node.
        assert {part: [holder.name for holder in held] for part, held in kept.holders.items()} == {
            "expert-0": ["expert-0", "expert-1"],
            "expert-1": ["expert-1", "expert-2"],
            "expert-2": ["expert-2", "router-0"],
            "router-0": ["router-0", "expert-0"],
        }
        (host, *_) = here.local.hosts
        assert host.status()["memory_bytes"] == host.state.memory_bytes + host.exchange.keeper.num_bytes()


def test_a_drop_that_comes_late_leaves_the_next_snapshot_alone(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it, and an actor has several threads."""
    with bench(source, tmp_path, every_steps=1) as here:
        here.train(1)
        late: list[tuple[Keeper, list[str]]] = []
        with monkeypatch.context() as patch:
            patch.setattr(Keeper, "drop", lambda keeper, ids: late.append((keeper, list(ids))))
            here.train(2)
        here.train(3)
        for keeper, ids in late:
            keeper.drop(ids)
        kept = here.snapshots.newest()
        assert kept is not None
        assert (kept.manifest.version, here.kept_ids) == (3, {kept.id})
        keepers = {host.name: host.exchange.keeper for host in here.local.hosts}
        keepers["router-0"] = here.local.router.keeper
        assert len(late) == len(keepers)
        assert all(keepers[holder.name].has(kept.id, part) for part, held in kept.holders.items() for holder in held)


@pytest.mark.parametrize(
    ("told", "holds"),
    [((2, 11, 6.0), True), ((3, 8, 4.0), True), ((2, 10, 5.0), True), ((2, 10, 4.0), False), ((1, 12, 9.0), False)],
)
def test_what_an_actor_is_told_late_of_an_earlier_snapshot_does_not_hold(
    told: tuple[int, int, float], holds: bool
) -> None:
    def of(run: int, version: int, created_s: float) -> Told:
        kept: Any = SimpleNamespace(manifest=SimpleNamespace(version=version, created_s=created_s))
        return Told(kept, run)

    before, now = of(2, 10, 5.0), of(*told)
    assert later(None, now) is now
    assert (later(before, now) is now) is holds


def test_the_last_router_comes_back_from_its_peer(source: ModelSource, tmp_path: Path) -> None:
    with bench(source, tmp_path) as here:
        here.train(*range(1, 8))
        before = {name: tensor.clone() for name, tensor in here.local.router.learner.state().items()}
        kept = here.snapshots.newest()
        here.local.router.keeper.drop(here.kept_ids)
        here.crew.router_pid = 2  # another process under the same name
        assert here.snapshots.newest() is kept
        assert here.go_back() == 5
        now = here.local.router.learner.state()
        assert any(not torch.equal(before[name], tensor) for name, tensor in now.items())


def test_the_placement_may_have_changed_since(source: ModelSource, tmp_path: Path, unbroken: dict[int, float]) -> None:
    with bench(source, tmp_path, 2) as here:
        here.train(*range(1, 6))
        here.local.adopt("1", "1", "1", "0", "0", "0", "0", "0")
        here.coordinator.placed(here.local.placement)
        here.train(6)
        here.kill("expert-1")
        assert here.go_back() == 5
        here.train(*range(6, STEPS + 1))
        same(here.losses, unbroken)


def test_a_growth_since_then_is_undone(source: ModelSource, tmp_path: Path, unbroken: dict[int, float]) -> None:
    with bench(source, tmp_path) as here:
        here.train(*range(1, 6))
        grown = here.local.grow(Growth(16))
        here.coordinator.grown(grown.placement, 2000, 6.0)
        here.kill("expert-1")
        assert here.go_back() == 5
        assert here.local.router.placement.num_experts == 8
        here.train(*range(6, STEPS + 1))
        same(here.losses, unbroken)


def test_parts_that_nobody_has_are_an_error_that_names_them(source: ModelSource, tmp_path: Path) -> None:
    with bench(source, tmp_path) as here:
        here.train(*range(1, 6))
        kept = here.snapshots.newest()
        assert isinstance(kept, Kept)
        here.local.members["expert-0"].kill()
        here.local.members["expert-1"].kill()
        with (
            pytest.raises(CheckpointError, match="expert-0"),
            saved_experts(kept, here.local.hosts[2].exchange.keeper, here.crew._way),
        ):
            pass


def test_0_steps_means_never(source: ModelSource, tmp_path: Path) -> None:
    with bench(source, tmp_path, every_steps=0) as here:
        here.train(1, 2)
        here.snapshots.after_job()
        assert here.snapshots.newest() is None
        assert here.kept_ids == set()
