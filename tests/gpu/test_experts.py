"""Experts, the dispatch plan and the kernels on a GPU: the numbers of the CPU, without the host waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.moe import fp8, passes
from actors.moe.device import DeviceExperts, experts_on
from actors.moe.device_dispatch import plan_there
from actors.moe.dispatch import HolderTable, plan
from actors.moe.experts import ExpertStack, Work
from actors.optim import OptimizerSettings
from actors.router.router import Router
from actors.trunk.model import ModelSource, skeleton
from tests.families import FAMILIES, save
from tests.local import cluster
from tests.unit.test_device_dispatch import COPIES, choices
from tests.unit.test_dispatch import HELD

pytestmark = pytest.mark.gpu

T, E, TOP_K = 300, 8, 2
CUDA = torch.device("cuda")
LOADS = {
    "even": [75] * E,
    "some idle": [0, 300, 0, 1, 0, 0, 299, 0],
    "all to one": [0, 0, 0, 600, 0, 0, 0, 0],
    "nothing": [0] * E,
}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """By the size of the whole: single elements near zero are sums that cancel."""
    error = (got.cpu().double() - expected.double()).norm()
    assert error <= tolerance * max(1e-9, float(expected.double().norm())), f"off by {error}"


def run(stack: ExpertStack, x_TD: Tensor, work: Work, grad_TD: Tensor) -> list[Tensor]:
    """Twice, so that the second adds to the gradients of the first."""
    found: list[Tensor] = []
    for _ in range(2):
        y_TD, saved = stack(x_TD, work, keep=True)
        assert saved is not None
        grad_x, grad_weight, later = stack.backward(saved, grad_TD)
        if later is not None:
            stack.accumulate(later)
        found = [y_TD, grad_x, grad_weight]
    return found


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_pairs", [128, 1 << 15])
def test_numbers_are_those_of_the_cpu(family: str, load: str, dtype: torch.dtype, max_pairs: int) -> None:
    torch.manual_seed(0)
    layer = skeleton(ModelSource(values={"model_type": family, **FAMILIES[family]}, dtype="float64")).layers[0]
    tensors = {n: (torch.randn(E, *shape) * 0.3).to(dtype) for n, shape in layer.shapes().items()}
    counts = LOADS[load]
    token_P = torch.cat([torch.randperm(T)[:n] if n <= T else torch.randint(0, T, (n,)) for n in counts]).int()
    work = Work(token_P, counts, torch.rand(sum(counts)))
    x_TD, grad_TD = torch.randn(2, T, 32).to(dtype)
    exact = ExpertStack(layer.template, {n: t.double() for n, t in tensors.items()})
    expected = run(exact, x_TD.double(), Work(token_P, counts, work.weight_P.double()), grad_TD.double())
    garbage = torch.full((1 << 24,), float("nan"), device=CUDA)  # what is not written is found
    del garbage
    there = {n: t.to(CUDA) for n, t in tensors.items()}
    stack = experts_on(CUDA, layer.template, there, num_layers=1, max_pairs=max_pairs)
    assert isinstance(stack, DeviceExperts)
    got = run(stack, x_TD.to(CUDA), work.to(CUDA), grad_TD.to(CUDA))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(got, expected, strict=True):
        near(mine, theirs, tolerance)
    for name in stack.names:
        near(stack.gradient(name), exact.gradient(name), tolerance)


@pytest.mark.parametrize("load", ["even", "some idle", "all to one"])
def test_the_host_never_waits(load: str) -> None:
    layer = skeleton(ModelSource(values={"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]})).layers[0]
    tensors = {n: torch.randn(E, *s, device=CUDA, dtype=torch.bfloat16) for n, s in layer.shapes().items()}
    stack = DeviceExperts(layer.template, tensors)
    counts = LOADS[load]
    x_TD, grad_TD = torch.randn(2, T, 32, device=CUDA, dtype=torch.bfloat16)
    token_P = torch.randint(0, T, (sum(counts),), device=CUDA, dtype=torch.int32)
    weight_P = torch.rand(sum(counts), device=CUDA)
    run(stack, x_TD, Work(token_P, counts, weight_P).to(CUDA), grad_TD)  # compiles the kernels
    work = Work(token_P, counts, weight_P).to(CUDA)
    with no_waiting():
        run(stack, x_TD, work, grad_TD)


def test_equal_inputs_give_equal_bits() -> None:
    x_TD = torch.randn(64, 256, device=CUDA, dtype=torch.bfloat16)
    token_P = torch.randint(0, 64, (4096,), device=CUDA)
    rows, weight = x_TD.index_select(0, token_P), torch.rand(4096, device=CUDA)
    sums = []
    for _ in range(5):
        into = torch.zeros_like(x_TD)
        passes.add_sums(into, rows, token_P, passes.order_by_token(token_P), weight)
        sums.append(into)
    assert all(torch.equal(sums[0], other) for other in sums)


@pytest.mark.parametrize("width", [130, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_the_plain_passes(width: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pairs, tokens = 333, 50
    x_TD, token_P = torch.randn(tokens, width).to(dtype), torch.randint(0, tokens, (pairs,), dtype=torch.int32)
    weight_P, pre_PH = torch.rand(pairs).to(weight_dtype), torch.randn(pairs, 2 * width).to(dtype)
    grad_PI = torch.randn(pairs, width).to(dtype)
    assert passes.kernels_for(x_TD.to(CUDA)) is not None, "Triton is there"
    rows = passes.gather_rows(x_TD.to(CUDA), token_P.to(CUDA))
    assert torch.equal(rows.cpu(), x_TD.index_select(0, token_P))
    low = torch.bfloat16 in (dtype, weight_dtype)
    tolerance = 1e-2 if low else 1e-5
    by_token = passes.order_by_token(token_P.to(CUDA))
    into = torch.ones(tokens, width, dtype=dtype, device=CUDA)
    passes.add_sums(into, rows, token_P.to(CUDA), by_token, weight_P.to(CUDA))
    expected = torch.ones(tokens, width, dtype=torch.float64)
    expected.index_add_(0, token_P, rows.cpu().double() * weight_P.double().unsqueeze(1))
    near(into, expected, tolerance)
    near(passes.gated(pre_PH.to(CUDA), weight_P.to(CUDA)), passes.gated(pre_PH.double(), weight_P.double()), tolerance)
    place, exact = pre_PH.to(CUDA), pre_PH.double()
    grad_weight = passes.gated_backward_(place, grad_PI.to(CUDA), weight_P.to(CUDA))
    near(grad_weight, passes.gated_backward_(exact, grad_PI.double(), weight_P.double()), tolerance)
    near(place, exact, tolerance)
    index = torch.randperm(tokens)[: tokens // 2].sort().values
    added, plain = x_TD.to(CUDA), x_TD.double()
    passes.add_at(added, index.to(CUDA), rows[: tokens // 2])
    near(added, plain.index_add_(0, index, rows[: tokens // 2].cpu().double()), tolerance)


def test_no_index_leads_out_of_the_tokens() -> None:
    x_TD = torch.ones(4, 32, device=CUDA)
    rows = passes.gather_rows(x_TD, torch.tensor([-7, 3, 4, 1 << 20], dtype=torch.int32, device=CUDA))
    assert rows.sum(1).tolist() == [0, 32, 0, 0]


@pytest.mark.parametrize("width", [130, 7168])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_packed_as_on_the_cpu(width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(65, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[3], rows[4, 5], rows[5, 6] = 0, float("nan"), float("inf")
    got, scales = fp8.pack(rows.to(CUDA))
    expected, expected_scales = fp8.pack(rows)
    sane = torch.tensor([row not in (4, 5) for row in range(65)])
    torch.testing.assert_close(scales.cpu()[sane], expected_scales[sane])
    differs = (got.cpu().float() != expected.float())[sane]
    assert float(differs.float().mean()) < 1e-3, "a quotient may fall on the other side of a rounding"
    back = fp8.unpack(got, scales, dtype)
    assert not back[4].isfinite().all()
    assert not back[5].isfinite().all()
    near(back[sane.to(CUDA)], fp8.unpack(expected, expected_scales, torch.float64)[sane], 1e-2)


@pytest.mark.parametrize("held", [*HELD.values(), *COPIES.values()], ids=[*HELD, *COPIES])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (5, 2), (2000, 4)])
def test_shares_are_those_of_the_host(held: list[list[int]], num_tokens: int, top_k: int) -> None:
    holders = HolderTable.of(held, 8)
    ids_TK = choices(num_tokens, top_k, unused=0.2)
    backlog_A = [10.0 * actor for actor in range(len(held))]
    there = ids_TK.to(CUDA)
    plan_there(there, holders, backlog_A)  # brings the tables there
    with no_waiting():
        got, is_sound = plan_there(there, holders, backlog_A, sound=torch.ones((), dtype=torch.bool, device=CUDA))
    assert is_sound
    expected = plan(ids_TK, holders, backlog_A)
    assert [(s.actor, s.counts_E) for s in got] == [(s.actor, s.counts_E) for s in expected]
    for mine, theirs in zip(got, expected, strict=True):
        for name in ("tokens_T", "token_P", "pair_P"):
            assert getattr(mine, name).device.type == "cuda"
            assert torch.equal(getattr(mine, name).cpu(), getattr(theirs, name)), name


BATCH = [torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(m)) for m in range(2)]


def steps(router: Router) -> list[float]:
    router.begin_run(OptimizerSettings())
    return [router.train_step(BATCH, lr=1e-3, clip_norm=1.0).loss for _ in range(6)]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_steps_in_bfloat16_are_near_those_of_the_cpu(tmp_path: Path, family: str) -> None:
    source = ModelSource(path=str(save(family, tmp_path / "m", torch.bfloat16)), dtype="bfloat16")
    found = []
    for device in ("cuda", "cpu"):
        with cluster(source, 2, device=device) as local:
            found.append(steps(local.router))
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=0)
