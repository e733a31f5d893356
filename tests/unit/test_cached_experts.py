"""Experts behind a cache against the same experts all on the device: the same bits, whatever is where."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.errors import CacheFull, InvalidInput
from actors.expert.homes import FileStore, Home, MemoryStore, Store
from actors.moe.cached import CachedExperts
from actors.moe.experts import ExpertStack, Work
from actors.moe.shelf import Loader
from actors.trunk.model import ExpertLayer, ModelSource, skeleton
from tests.families import FAMILIES

T, E, GROUP = 24, 8, 2
CPU = torch.device("cpu")


@pytest.fixture
def loader() -> Iterator[Loader]:
    loader = Loader(CPU)
    yield loader
    loader.close()


def layer_of(family: str, dtype: str) -> ExpertLayer:
    return skeleton(ModelSource(values={"model_type": family, **FAMILIES[family]}, dtype=dtype)).layers[0]


def pair_of_stacks(
    layer: ExpertLayer, dtype: torch.dtype, capacity: int, loader: Loader, store: Store, max_pairs: int
) -> tuple[ExpertStack, CachedExperts, list[Home]]:
    torch.manual_seed(0)
    tensors = {n: (torch.randn(E, *shape) * 0.3).to(dtype) for n, shape in sorted(layer.shapes().items())}
    shapes = [{n: (GROUP, *shape) for n, shape in layer.shapes().items()}]
    homes = [Home(store, shapes, dtype, f"group {i}") for i in range(E // GROUP)]
    for i, home in enumerate(homes):
        for name, tensor in tensors.items():
            home.weights[0][name].copy_(tensor[i * GROUP : (i + 1) * GROUP])
    cached = CachedExperts(
        layer.template,
        0,
        layer.shapes(),
        homes,
        group_size=GROUP,
        capacity=capacity,
        loader=loader,
        max_pairs=max_pairs,
    )
    return ExpertStack(layer.template, tensors, max_pairs=max_pairs), cached, homes


def results(
    stack: ExpertStack, counts: Sequence[int], dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward, its serving twin, and both gradients; the weights' are accumulated."""
    generator = torch.Generator().manual_seed(seed)
    pairs = sum(counts)
    token_P = torch.randint(0, T, (pairs,), generator=generator)
    work = Work(token_P, counts, torch.rand(pairs, generator=generator).to(dtype))
    x_TD, grad_TD = torch.randn(2, T, 32, generator=generator).to(dtype)
    served, _ = stack(x_TD, work, keep=False)
    y_TD, saved = stack(x_TD, work, keep=True)
    grad_x, grad_weight, part = stack.backward(saved, grad_TD)
    if part is not None:
        stack.accumulate(part)
    return served, y_TD, grad_x, grad_weight


COUNTS = [[3] * E, [0, 9, 0, 0, 4, 1, 0, 7], [0, 0, 40, 0, 0, 0, 0, 0], [0] * E, [5, 1, 7, 3, 0, 0, 11, 1]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("max_pairs", [7, 1000])
@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_the_same_bits(family: str, dtype: str, max_pairs: int, capacity: int, loader: Loader) -> None:
    layer, kind = layer_of(family, dtype), getattr(torch, dtype)
    plain, cached, homes = pair_of_stacks(layer, kind, capacity, loader, MemoryStore(CPU), max_pairs)
    assert (cached.num_experts, cached.width, cached.names) == (plain.num_experts, plain.width, plain.names)
    for seed, counts in enumerate(COUNTS * 2):
        expected, got = results(plain, counts, kind, seed), results(cached, counts, kind, seed)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), counts
        assert cached.num_resident <= 2 * capacity
    for place, home in enumerate(homes):
        for name in plain.names:
            rows = plain.gradient(name)[place * GROUP : (place + 1) * GROUP]
            assert torch.equal(home.training(0)[name].gradient, rows), name
    matrices = sum(home.weights[0][name].nbytes for home in homes[:1] for name in ("gate_up_proj", "down_proj"))
    assert loader.counters.device_bytes <= capacity * matrices


def test_each_matrix_is_loaded_at_most_once_a_pass(loader: Loader) -> None:
    """Also where the cache is smaller than what a pass needs."""
    layer = layer_of("deepseek_v3", "float32")
    _, cached, homes = pair_of_stacks(layer, torch.float32, 1, loader, MemoryStore(CPU), 1000)
    bytes_of_all = sum(tensor.nbytes for home in homes for tensor in home.weights[0].values())
    work = Work(torch.zeros(E, dtype=torch.int64), [1] * E, torch.ones(E))
    for _ in range(3):
        before = loader.counters.loaded_bytes
        cached(torch.ones(T, 32), work, keep=False)
        assert loader.counters.loaded_bytes - before <= bytes_of_all


def test_what_the_gate_always_chooses_is_loaded_ahead(loader: Loader) -> None:
    layer = layer_of("deepseek_v3", "float32")
    _, cached, _ = pair_of_stacks(layer, torch.float32, 1, loader, MemoryStore(CPU), 1000)

    def use(place: int) -> None:
        counts = [int(e // GROUP == place) for e in range(E)]
        cached(torch.ones(T, 32), Work(torch.zeros(GROUP, dtype=torch.int64), counts, torch.ones(GROUP)), keep=False)

    for _ in range(10):
        use(3)
    use(0)
    before = loader.counters.misses
    cached.anticipate()
    use(3)
    assert loader.counters.misses == before


def test_files_have_no_names_and_hold_what_is_written(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "new" / "cache"))
    shapes = [{"a": (2, 3, 5), "b": (2, 7)}, {"a": (2, 4, 5), "b": (2, 1)}]
    home = Home(store, shapes, torch.float64, "group 0")
    home.train()
    parts = [layer[name] for layer in home.weights for name in layer]
    parts += [
        t for i in range(2) for each in home.training(i).values() for t in (each.gradient, each.first, each.second)
    ]
    assert not any(tensor.any() for tensor in parts)
    for number, tensor in enumerate(parts):
        tensor.fill_(number + 1)
    assert all(bool((tensor == number + 1).all()) for number, tensor in enumerate(parts)), "they must not overlap"
    assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in parts)
    assert home.num_bytes() == 2 * sum(t.nbytes for layer in home.weights for t in layer.values())
    assert list((tmp_path / "new" / "cache").iterdir()) == []
    assert any(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())
    del home, parts, tensor
    assert not any(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_full_disk_is_named_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(FileStore(str(tmp_path)), [{"a": (2, 300, 500)}], torch.float32, "group 5")
    home.weights[0]["a"].fill_(7)
    full = itertools.repeat(OSError(errno.ENOSPC, "No space left on device"))

    def fail(*args: object) -> None:
        raise next(full)

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(CacheFull, match=r"no room for 3\.6 MB of the gradients and moments of group 5") as caught:
        home.train()
    assert caught.value.field == "experts.cache_dir"
    assert str(tmp_path) in str(caught.value)
    assert not home.is_trained
    monkeypatch.undo()
    home.train()
    assert bool((home.weights[0]["a"] == 7).all())


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=r"experts\.cache_dir: cannot be made"):
        FileStore(str(tmp_path / "file" / "below"))
