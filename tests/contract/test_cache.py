"""Expert actors whose device has room for some of their groups only: nobody can tell from a single bit."""

from __future__ import annotations

import errno
import gc
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.errors import InvalidInput
from actors.moe.cache import CacheSettings
from actors.optim import OptimizerSettings
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.trunk.model import ModelSource
from actors.values import Growth
from cluster.checkpoint.store import CheckpointStore
from tests.contract.test_copies import BATCHES, IDS, PLACEMENTS, copies_agree, run
from tests.contract.test_snapshots import restore_all, save_all, spread_over
from tests.families import save
from tests.local import LocalCluster, cluster

MODELS = [("deepseek_v3", "float32"), ("gpt_oss", "float64")]
Between = Mapping[int, Callable[[], object]]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    family, dtype = request.param
    directory = save(family, tmp_path_factory.mktemp("model") / "m", getattr(torch, dtype))
    return ModelSource(path=str(directory), dtype=dtype)


@pytest.fixture(params=["memory", "files"])
def behind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "cache") if request.param == "files" else ""


def state(local: LocalCluster) -> dict[tuple[int, int], tuple[Tensor, ...]]:
    """Weights and moments by (group, layer), of every group's owner."""
    local.router.status()  # waits for the commit
    found = {}
    for group, (owner, *_) in enumerate(local.placement.holders):
        holdings = local.members[owner].host.holdings
        for layer in range(len(holdings.stacks)):
            found[group, layer] = holdings.read(group, layer)[0]
    return found


Numbers = tuple[list[float], Tensor, dict[tuple[int, int], tuple[Tensor, ...]]]


def numbers(local: LocalCluster, between: Between | None = None) -> Numbers:
    """Losses of some steps, and logits, weights and moments after them."""
    losses = run(local, between)
    return losses, local.router.serving.logits(IDS), state(local)


def equal(got: Numbers, expected: Numbers) -> None:
    """Bit for bit."""
    assert got[0] == expected[0]
    assert torch.equal(got[1], expected[1])
    assert got[2].keys() == expected[2].keys()
    for key, tensors in expected[2].items():
        assert all(torch.equal(a, b) for a, b in zip(got[2][key], tensors, strict=True)), key


def within_bounds(local: LocalCluster, size: int) -> None:
    """No device has more than it has room for: `size` groups of two matrices, in each layer."""
    for host in local.hosts:
        stacks = host.holdings.stacks
        assert all(stack.num_resident <= 2 * size for stack in stacks)  # type: ignore[attr-defined]
        shapes = [stack.shape(name) for stack in stacks for name in stack.names if "bias" not in name]
        itemsize = host.holdings.read(host.groups[0], 0)[0][0].itemsize
        group_bytes = sum(host.group_size * math.prod(shape) * itemsize for shape in shapes)
        assert 0 < host.status()["cache"]["device_bytes"] <= size * group_bytes


@pytest.mark.parametrize("size", [1, 3])
def test_steps_give_the_same_bits(source: ModelSource, behind: str, size: int) -> None:
    with cluster(source, 2, group_size=1) as plain:
        expected = numbers(plain)
    with cluster(source, 2, group_size=1, cache=CacheSettings(size, behind)) as local:
        equal(numbers(local), expected)
        within_bounds(local, size)
        counters = [host.status()["cache"] for host in local.hosts]
        assert all(c["hits"] and c["misses"] and c["loaded_bytes"] for c in counters)


def test_copies_give_the_same_bits(source: ModelSource, behind: str) -> None:
    with cluster(source, 3, redundancy=2) as plain:
        expected = numbers(plain)
    with cluster(source, 3, links="socket", redundancy=2, cache=CacheSettings(1, behind)) as local:
        equal(numbers(local), expected)
        within_bounds(local, 1)


def test_a_copy_behind_a_cache_equals_one_without(source: ModelSource) -> None:
    with cluster(source, 2) as plain:
        plain.cache = CacheSettings(1)
        plain.add()
        run(plain, {1: lambda: plain.adopt("02", "20", "12", "1")})  # compares the copies after every step
        assert plain.hosts[2].status()["cache"]["misses"]
        assert not plain.hosts[0].status()["cache"]


@pytest.mark.parametrize("name", [n for n in PLACEMENTS if n not in ("an exchange", "another actor joins")])
def test_groups_come_and_go(source: ModelSource, tmp_path: Path, name: str) -> None:
    def moved(local: LocalCluster) -> Numbers:
        for _ in range(2, 1 + max(int(n) for held in PLACEMENTS[name].values() for digits in held for n in digits)):
            local.add()
        return numbers(local, {t: lambda held=held: local.adopt(*held) for t, held in PLACEMENTS[name].items()})  # type: ignore[misc]

    with cluster(source, 2) as plain:
        expected = moved(plain)
    with cluster(source, 2, cache=CacheSettings(1, str(tmp_path))) as local:
        equal(moved(local), expected)


def test_a_group_arrives_while_steps_go_on(source: ModelSource) -> None:
    def joined(local: LocalCluster) -> Numbers:
        name = local.add()
        arrival = threading.Thread(target=local.arrive, args=(0, "expert-0", name))

        def switch() -> None:
            arrival.join(20)
            local.adopt("2", "0", "1", "1")

        return numbers(local, {1: arrival.start, 3: switch})

    with cluster(source, 2) as plain:
        expected = joined(plain)
    with cluster(source, 2, links="socket", cache=CacheSettings(1)) as local:
        equal(joined(local), expected)


def test_attempts_that_fail_leave_nothing(source: ModelSource) -> None:
    scripted: list[FaultyLink] = []

    def wrap(actor: int, link: Link) -> Link:
        if actor == 1 and not scripted:
            faults = [Fault("forward", 3, "close"), Fault("backward", 7, "drop_answer"), Fault("prepare", 4, "close")]
            scripted.append(FaultyLink(link, faults))
            return scripted[0]
        return link

    with cluster(source, 2) as plain:
        expected = numbers(plain)
    with cluster(source, 2, links="socket", wrap=wrap, cache=CacheSettings(1)) as local:
        equal(numbers(local), expected)
        assert scripted[0].struck


def test_saved_restored_and_exported(source: ModelSource, behind: str, tmp_path: Path) -> None:
    """A checkpoint of either kind of actor is loaded by the other, in the middle of a run."""
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    cache = CacheSettings(1, behind)
    with cluster(source, 2) as plain:
        run(plain)
        found = save_all(plain, store)
        expected = steps(plain), plain.router.serving.logits(IDS), state(plain)
        plain.router.export(tmp_path / "plain")
    with cluster(source, 2, cache=cache) as local:
        numbers(local)  # other moments, and a cache full of other weights
        gc.disable()
        restore_all(local, found, spread_over(2, 2))
        assert mapped(behind) == (2 * 4 if behind else 0), "what was there before waits for the garbage collector"
        gc.enable()
        got = steps(local), local.router.serving.logits(IDS), state(local)
        equal(got, expected)
        within_bounds(local, 1)
        local.router.export(tmp_path / "cached")
        found = save_all(local, CheckpointStore(str(tmp_path / "others")))
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "cached" / file.name).read_bytes(), file.name
    with cluster(source, 1) as plain:
        restore_all(plain, found, spread_over(1, 2))
        equal(([], plain.router.serving.logits(IDS), state(plain)), ([], *expected[1:]))


def steps(local: LocalCluster) -> list[float]:
    return [local.router.train_step(batch, lr=1e-2, clip_norm=1.0).loss for batch in BATCHES[:3]]


def test_another_model_takes_the_place_of_what_is_cached(source: ModelSource, behind: str, tmp_path: Path) -> None:
    with cluster(source, 2, cache=CacheSettings(1, behind)) as local:
        before = local.router.serving.logits(IDS)
        local.router.export(tmp_path / "out")
        run(local)
        local.router.replace_weights(str(tmp_path / "out"))
        assert torch.equal(local.router.serving.logits(IDS), before)
        within_bounds(local, 1)


def test_files_are_gone_at_the_end(source: ModelSource, tmp_path: Path) -> None:
    with cluster(source, 2, cache=CacheSettings(1, str(tmp_path / "cache"))) as local:
        run(local)
        assert mapped(str(tmp_path / "cache")) == 2 * 4
        assert list((tmp_path / "cache").iterdir()) == [], "whoever is killed leaves nothing behind"
        assert not local.router.serving.logits(IDS).isnan().any()
    assert mapped(str(tmp_path / "cache")) == 0


def mapped(directory: str) -> int:
    """Files in memory: each group has one for its weights and one for its gradients and moments."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(f"{directory}/" in line for line in lines) if directory else 0


def full_from(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The disk is full when a file is made for the `number`th time from now, and stays so."""
    reserve, calls = os.posix_fallocate, []

    def fallocate(*args: int) -> None:
        calls.append(args)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(*args)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)


def test_a_disk_that_is_full_at_the_start(source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_from(monkeypatch, 2)
    with (
        pytest.raises(InvalidInput, match=r"experts\.cache_dir: no room for .* of the weights of expert group 2 of 2"),
        cluster(source, 2, cache=CacheSettings(1, str(tmp_path))),
    ):
        raise AssertionError("unreachable")


def test_a_disk_that_is_full_when_a_job_begins(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(source, 2) as plain:
        expected = numbers(plain)
    with cluster(source, 2, cache=CacheSettings(1, str(tmp_path))) as local:
        before = local.router.serving.logits(IDS)
        full_from(monkeypatch, 2)
        with pytest.raises(InvalidInput, match=r"experts\.cache_dir: no room for .* gradients and moments"):
            local.router.begin_run(OptimizerSettings())
        assert torch.equal(local.router.serving.logits(IDS), before), "serving goes on"
        monkeypatch.undo()
        equal(numbers(local), expected)


def test_a_disk_that_is_full_when_a_group_arrives(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(local: LocalCluster) -> Numbers:
        def try_in_vain() -> None:
            with monkeypatch.context() as patch:
                full_from(patch, 1)
                with pytest.raises(InvalidInput, match=r"experts\.cache_dir: no room"):
                    local.arrive(0, "expert-0", "expert-1")

        between = {1: try_in_vain, 2: lambda: local.adopt("1", "0", "1", "1")}
        return numbers(local, between if local.cache else {2: between[2]})

    with cluster(source, 2) as plain:
        expected = tried(plain)
    with cluster(source, 2, cache=CacheSettings(1, str(tmp_path))) as local:
        equal(tried(local), expected)
        copies_agree(local)


@pytest.mark.parametrize("mode", ["copy", "fresh"])
def test_a_model_grows_behind_caches(
    source: ModelSource, behind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How well a gate takes new experts is not the matter here; that depends on what it has learned.
    monkeypatch.setattr("actors.moe.growth.MAX_MOVED", 1.0)

    def grown(local: LocalCluster) -> Numbers:
        return numbers(local, {2: lambda: local.grow(Growth(num_experts=16, mode=mode))})  # type: ignore[arg-type]

    with cluster(source, 2) as plain:
        expected = grown(plain)
    with cluster(source, 2, cache=CacheSettings(1, behind)) as local:
        equal(grown(local), expected)
        within_bounds(local, 1)
        assert len(local.placement.holders) == 8
