"""A job's choice of updates for its experts: sparse ones, and Muon. Copies, moves, caches, checkpoints go with each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.errors import InvalidInput
from actors.expert.updates import Brake
from actors.moe.cache import CacheSettings
from actors.moe.settings import BalanceSettings
from actors.optim import OptimizerSettings
from actors.trunk.model import ModelSource
from cluster.checkpoint.store import CheckpointStore
from tests.contract.test_copies import PLACEMENTS, copies_agree
from tests.contract.test_snapshots import restore_all, save_all, spread_over
from tests.families import save
from tests.local import LocalCluster, cluster

BATCHES = [[torch.randint(0, 256, (1, 3), generator=torch.Generator().manual_seed(t))] for t in range(8)]
"""So few tokens that every step passes over some experts."""
IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(99))
SETTINGS = {
    "none": OptimizerSettings(),
    "exact": OptimizerSettings(sparse="exact"),
    "skip": OptimizerSettings(sparse="skip"),
    "muon": OptimizerSettings(experts="muon"),
    "muon-skip": OptimizerSettings(experts="muon", sparse="skip"),
}
Numbers = tuple[list[float], torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save("gpt_oss", tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


def steps(local: LocalCluster, first: int, last: int) -> list[float]:
    return [local.router.train_step(batch, lr=1e-2, clip_norm=1.0).loss for batch in BATCHES[first:last]]


def drain(local: LocalCluster) -> None:
    local.router.status()  # waits for the commit
    for host in local.hosts:
        host.updates.drain()


def numbers(
    local: LocalCluster, settings: OptimizerSettings, between: Mapping[int, Callable[[], object]] | None = None
) -> Numbers:
    local.router.begin_run(settings)
    losses = []
    for t in range(len(BATCHES)):
        if between and t in between:
            between[t]()
        losses += steps(local, t, t + 1)
    drain(local)  # of what is held back on purpose
    return losses, local.router.serving.logits(IDS)


@pytest.fixture(scope="module")
def plain(source: ModelSource) -> dict[str, Numbers]:
    found = {}
    for name, settings in SETTINGS.items():
        with cluster(source, 2) as local:
            found[name] = numbers(local, settings)
    return found


def same(got: Numbers, expected: Numbers, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=rtol, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=rtol, atol=1e-10)


def test_exact_is_dense_and_the_others_are_themselves(plain: dict[str, Numbers]) -> None:
    same(plain["exact"], plain["none"])
    for a, b in itertools.combinations(("none", "skip", "muon", "muon-skip"), 2):
        assert plain[a][0][0] == plain[b][0][0]
        assert plain[a][0][-1] != plain[b][0][-1]


def test_when_every_expert_has_tokens_sparse_is_dense(tmp_path: Path) -> None:
    source = ModelSource(path=str(save("mixtral", tmp_path / "m", torch.float64)), dtype="float64")
    found = {}
    batch = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(7))
    for name in ("none", "exact", "skip"):
        with cluster(source, 2) as local:
            local.router.begin_run(SETTINGS[name])
            reports = [local.router.train_step([batch], lr=1e-3, clip_norm=1.0) for _ in range(4)]
            assert all(min(load) > 0 for report in reports for load in report.load_LE)
            found[name] = [report.loss for report in reports], local.router.serving.logits(IDS)
    same(found["exact"], found["none"], 1e-12)
    same(found["skip"], found["none"], 1e-12)


# Muon's products in bfloat16 differ when another number of experts is in a batch, which no placement changes.
@pytest.mark.parametrize("name", ["exact", "skip", "muon", "muon-skip"])
@pytest.mark.parametrize("placements", ["copies come, own, and go", "one joins, one leaves", "all have copies"])
def test_groups_move_and_have_copies(
    source: ModelSource, plain: dict[str, Numbers], name: str, placements: str
) -> None:
    with cluster(source, 2) as local:
        for _ in range(2):
            local.add()
        moves = {t: lambda held=held: local.adopt(*held) for t, held in PLACEMENTS[placements].items()}
        got = numbers(local, SETTINGS[name], moves)  # type: ignore[arg-type]
        copies_agree(local)
    same(got, plain[name])


@pytest.mark.parametrize("name", ["exact", "skip", "muon"])
def test_behind_a_cache_it_is_the_same_bits(source: ModelSource, plain: dict[str, Numbers], name: str) -> None:
    with cluster(source, 2, group_size=1) as whole:
        expected = numbers(whole, SETTINGS[name])
    with cluster(source, 2, group_size=1, cache=CacheSettings(1, "")) as local:
        got = numbers(local, SETTINGS[name])
        copies_agree(local)
    assert got[0] == expected[0]
    assert torch.equal(got[1], expected[1])


def test_groups_without_tokens_are_not_brought_to_the_device_again(source: ModelSource) -> None:
    loaded = {}
    for name in ("none", "skip"):
        with cluster(source, 1, group_size=1, cache=CacheSettings(8, "")) as local:
            numbers(local, SETTINGS[name])
            loaded[name] = local.hosts[0].status()["cache"]["loaded_bytes"]
    assert loaded["skip"] < loaded["none"]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_checkpoint_has_all_of_it(source: ModelSource, plain: dict[str, Numbers], name: str, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    with cluster(source, 2) as local:
        local.router.begin_run(SETTINGS[name])
        losses = steps(local, 0, 5)
        found = save_all(local, store)
        with cluster(source, 3) as other:
            restore_all(other, found, spread_over(3, 2))
            other.router.continue_run(BalanceSettings())
            losses += steps(other, 5, len(BATCHES))
            same((losses, other.router.serving.logits(IDS)), plain[name])


@pytest.mark.parametrize("name", ["skip", "muon", "muon-skip"])
def test_beside_forwards_the_updates_are_the_same(source: ModelSource, name: str) -> None:
    """Held back for exactly one step, on one host and on two with copies."""
    found = []
    for actors, redundancy in ((1, 1), (2, 2)):
        with cluster(source, actors, redundancy=redundancy) as local:
            for host in local.hosts:
                host.updates.brake = Brake(hold=1)
            found.append(numbers(local, replace(SETTINGS[name], staleness=1)))
            copies_agree(local)
    same(found[0], found[1])


def test_the_correction_uses_the_weights_of_the_gradients(source: ModelSource) -> None:
    """The first update is of gradients of now; the second, held back for one step, of gradients of before the first."""
    found: dict[float, list[list[torch.Tensor]]] = {}
    for strength in (0.0, 50.0):
        found[strength] = []
        for count in (1, 2):
            with cluster(source, 1) as local:
                local.hosts[0].updates.brake = Brake(hold=1)
                local.router.begin_run(OptimizerSettings(staleness=1, delay_correction=strength))
                steps(local, 0, count)
                drain(local)
                found[strength].append(list(local.hosts[0].holdings.stacks[0].weights.values()))
    same_after_one, same_after_two = (
        all(torch.equal(a, b) for a, b in zip(plain, corrected, strict=True))
        for plain, corrected in zip(found[0.0], found[50.0], strict=True)
    )
    assert same_after_one
    assert not same_after_two


def test_steps_that_were_put_off_are_not_made_beside_forwards() -> None:
    with pytest.raises(InvalidInput, match="put off"):
        OptimizerSettings(sparse="exact", staleness=1)


def test_a_new_job_finds_experts_up_to_date(source: ModelSource) -> None:
    after = {}
    for name in ("none", "exact"):
        with cluster(source, 2) as local:
            numbers(local, SETTINGS[name])
            local.router.begin_run(OptimizerSettings())
            local.router.status()
            after[name] = [h.holdings.read(g, 0)[0] for h in local.hosts for g in h.groups]
    for mine, theirs in zip(after["exact"], after["none"], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
