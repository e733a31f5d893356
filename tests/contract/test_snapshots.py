"""A cluster saved between two steps and brought back elsewhere: nobody can tell from the numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.errors import CheckpointError, InvalidInput, StepAborted
from actors.moe.settings import BalanceSettings, GateSettings
from actors.optim import OptimizerSettings
from actors.trunk.model import ModelSource
from actors.values import Placement
from cluster.checkpoint.manifest import Manifest
from cluster.checkpoint.state import read_experts, read_router, write_experts, write_router
from cluster.checkpoint.store import CheckpointStore, Found
from cluster.placement.placement import ActorSlot, spread
from tests.families import save
from tests.local import LocalCluster, cluster

BATCHES = [
    [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(6)
]
IDS = BATCHES[0][0]
SAVED_AT = 3
OPTIMIZER = OptimizerSettings(beta2=0.9, weight_decay=0.3)
BALANCE = BalanceSettings(bias_speed=0.01)
GATES = {"own": GateSettings(), "ours": GateSettings(kind="top_k", noise_std=0.5)}


Model = tuple[ModelSource, GateSettings, BalanceSettings]


@pytest.fixture(
    scope="module", params=[("deepseek_v3", "own"), ("deepseek_v3", "ours"), ("gpt_oss", "own"), ("gpt_oss", "ours")]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, gate = request.param
    directory = save(family, tmp_path_factory.mktemp("model") / "m", torch.float64)
    balance = BalanceSettings() if (family, gate) == ("gpt_oss", "own") else BALANCE
    return ModelSource(path=str(directory), dtype="float64"), GATES[gate], balance


@pytest.fixture(scope="module")
def unbroken(model: Model) -> tuple[list[float], torch.Tensor]:
    source, gate, balance = model
    with cluster(source, 2, gate=gate) as local:
        local.router.begin_run(OPTIMIZER, balance)
        return train(local, balance, range(6)), local.router.serving.logits(IDS)


def train(local: LocalCluster, balance: BalanceSettings, steps: range) -> list[float]:
    return [
        local.router.train_step(BATCHES[t], lr=1e-2, clip_norm=1.0, bias_speed=balance.bias_speed).loss for t in steps
    ]


def save_all(local: LocalCluster, store: CheckpointStore) -> Found:
    taken = local.router.take_snapshot()
    draft = store.begin(taken.version)
    shards = [write_experts(draft, name, local.members[name].host.saving.snapshot) for name in taken.actors]
    shards.append(write_router(draft, "router-0", local.router.saving.snapshot))
    return store.commit(draft, Manifest(taken.version, 0.0, {}, None, tuple(shards)))


def restore_all(local: LocalCluster, found: Found, placement: Placement, run: int = 7) -> None:
    for name in placement.actors:
        local.members[name].host.saving.restore(placement.held_by(name), read_experts(found), run)
    local.router.restore(local.roster(placement), read_router(found), run)
    local.placement = placement


def same(local: LocalCluster, losses: list[float], unbroken: tuple[list[float], torch.Tensor]) -> None:
    torch.testing.assert_close(losses, unbroken[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(local.router.serving.logits(IDS), unbroken[1], rtol=1e-9, atol=1e-10)


def spread_over(actors: int, group_size: int, redundancy: int = 1, epoch: int = 5) -> Placement:
    return spread(8, group_size, [ActorSlot(f"expert-{i}", f"n{i}") for i in range(actors)], redundancy, epoch)


@pytest.mark.parametrize(("actors", "group_size", "redundancy"), [(1, 4, 1), (3, 1, 1), (3, 2, 2)])
def test_another_cluster_goes_on(
    model: Model,
    unbroken: tuple[list[float], torch.Tensor],
    tmp_path: Path,
    actors: int,
    group_size: int,
    redundancy: int,
) -> None:
    source, gate, balance = model
    store = CheckpointStore(str(tmp_path))
    with cluster(source, 2, gate=gate, links="socket") as local:
        local.router.begin_run(OPTIMIZER, balance)
        losses = train(local, balance, range(SAVED_AT))
        save_all(local, store)
        train(local, balance, range(SAVED_AT, SAVED_AT + 1))  # lost
    found = store.latest()
    assert found is not None
    with cluster(source, actors, gate=gate, links="socket", group_size=group_size) as local:
        restore_all(local, found, spread_over(actors, group_size, redundancy))
        assert local.router.continue_run(balance).version == SAVED_AT
        same(local, losses + train(local, balance, range(SAVED_AT, 6)), unbroken)


def test_a_running_cluster_goes_back_to_fewer_actors_twice(
    model: Model, unbroken: tuple[list[float], torch.Tensor], tmp_path: Path
) -> None:
    source, gate, balance = model
    store = CheckpointStore(str(tmp_path))
    with cluster(source, 3, gate=gate, links="socket") as local:
        local.router.begin_run(OPTIMIZER, balance)
        losses = train(local, balance, range(SAVED_AT))
        found = save_all(local, store)
        train(local, balance, range(SAVED_AT, 5))
        local.members["expert-2"].kill()
        with pytest.raises(Exception, match="expert-2"):
            train(local, balance, range(5, 6))
        for number in range(2):
            restore_all(local, found, spread_over(2, 2, epoch=5 + number))
        same(local, losses + train(local, balance, range(SAVED_AT, 6)), unbroken)


def arriving(local: LocalCluster) -> None:
    local.arrive(0, "expert-0", "expert-1")


def copied(local: LocalCluster) -> None:
    local.adopt("01", "0", "10", "1")


@pytest.mark.parametrize("change", [arriving, copied])
def test_saved_while_groups_move(
    model: Model, unbroken: tuple[list[float], torch.Tensor], tmp_path: Path, change: Callable[[LocalCluster], None]
) -> None:
    source, gate, balance = model
    store = CheckpointStore(str(tmp_path))
    with cluster(source, 2, gate=gate, links="socket") as local:
        local.router.begin_run(OPTIMIZER, balance)
        losses = train(local, balance, range(2))
        change(local)
        losses += train(local, balance, range(2, SAVED_AT))
        found = save_all(local, store)
        restore_all(local, found, spread_over(2, 2))
        assert not local.hosts[1].holdings.arriving
        same(local, losses + train(local, balance, range(SAVED_AT, 6)), unbroken)


def test_taking_a_snapshot_changes_nothing(model: Model, unbroken: tuple[list[float], torch.Tensor]) -> None:
    source, gate, balance = model
    with cluster(source, 2, gate=gate) as local:
        local.router.begin_run(OPTIMIZER, balance)
        losses = []
        for step in range(6):
            local.router.take_snapshot()
            losses += train(local, balance, range(step, step + 1))
        same(local, losses, unbroken)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(path=str(save("deepseek_v3", tmp_path_factory.mktemp("model") / "m")))


def test_before_the_first_step(source: ModelSource, tmp_path: Path) -> None:
    with cluster(source, 2) as local:
        found = save_all(local, CheckpointStore(str(tmp_path)))
        before = local.router.serving.logits(IDS)
        local.router.begin_run(OptimizerSettings())
        train(local, BalanceSettings(), range(2))
        restore_all(local, found, spread_over(2, 2))
        assert torch.equal(local.router.serving.logits(IDS), before)
        assert local.router.version == 0


def test_a_snapshot_of_another_version_is_not_written(source: ModelSource, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    with cluster(source, 2) as local:
        local.router.begin_run(OptimizerSettings())
        local.router.take_snapshot()
        draft = store.begin(1)
        with pytest.raises(CheckpointError, match="expert-0 has no snapshot of version 1, but version 0"):
            write_experts(draft, "expert-0", local.hosts[0].saving.snapshot)
        with pytest.raises(CheckpointError, match="but none"):
            write_experts(draft, "expert-0", None)


def test_other_gates_are_named_and_nothing_is_half_restored(source: ModelSource, tmp_path: Path) -> None:
    with cluster(source, 2) as local:
        found = save_all(local, CheckpointStore(str(tmp_path)))
    with cluster(source, 2, gate=GateSettings(kind="top_k", noise_std=0.5)) as local:
        placement = spread_over(2, 2)
        for name in placement.actors:
            local.members[name].host.saving.restore(placement.held_by(name), read_experts(found), 1)
        with pytest.raises(CheckpointError, match="routing"):
            local.router.restore(local.roster(placement), read_router(found), 1)


def test_until_it_is_placed_a_restored_host_refuses_work(source: ModelSource, tmp_path: Path) -> None:
    with cluster(source, 2) as local:
        found = save_all(local, CheckpointStore(str(tmp_path)))
        local.hosts[0].saving.restore((0,), read_experts(found), 1)
        with pytest.raises((StepAborted, InvalidInput), match="epoch"):
            local.router.serving.logits(IDS)
