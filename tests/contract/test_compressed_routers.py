"""Two routers whose gradients travel compressed: one update bit for bit, and attempts that fail leave no trace."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from actors.compress.pieces import CompressedPieces
from actors.compress.settings import CompressionSettings
from actors.errors import InvalidInput, NonFinite
from actors.moe.settings import GateSettings
from actors.optim import OptimizerSettings
from actors.router.division import Speeds
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.trunk.model import ModelSource
from actors.values import StepReport
from tests.families import save
from tests.routers import Routers, routers_of

BATCHES = [
    [torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(4)
]
METHODS = [
    CompressionSettings("powersgd", rank=2),
    CompressionSettings("powersgd", rank=1, quantised=True),
    CompressionSettings("topk", share=0.05),
    CompressionSettings("topk", share=0.02, quantised=True),
    CompressionSettings("int8"),
    CompressionSettings("fp8"),
]
INT8 = CompressionSettings("int8")
OPTIMIZER = OptimizerSettings(eps=1e-4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(path=str(save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float32)))


@pytest.fixture(autouse=True)
def _even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are those of each router's part: with speeds that are measured no two runs divide a batch alike."""
    monkeypatch.setattr(Speeds, "note", lambda self, name, num_tokens, seconds: None)


def routers(source: ModelSource, count: int = 2, **changes: Any) -> AbstractContextManager[Routers]:
    return routers_of(source, count, **{"links": "local", "gate": GateSettings(kind="top_k"), **changes})


def step(group: Routers, number: int) -> StepReport:
    report = group.router.train_step(BATCHES[number], lr=1e-2, clip_norm=1.0)
    group.agree()
    return report


def run(group: Routers, settings: CompressionSettings, first: int = 0) -> list[StepReport]:
    group.router.begin_run(OPTIMIZER, compression=settings)
    return [step(group, number) for number in range(first, len(BATCHES))]


def weights(group: Routers) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in group.router.learner.state().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("settings", METHODS)
def test_an_attempt_that_fails_leaves_no_trace(source: ModelSource, settings: CompressionSettings) -> None:
    """Gradients were sent and summed by then, and every sender had new errors."""

    def wrap(actor: int, link: Link) -> Link:
        return FaultyLink(link, [Fault("prepare", 3, "close")]) if actor == 0 else link

    with routers(source) as undisturbed, routers(source, wrap=wrap) as disturbed:
        expected, reports = run(undisturbed, settings), run(disturbed, settings)
        assert sum(r.retries for r in reports) == 1
        assert [r.loss for r in reports] == [r.loss for r in expected]
        assert [r.grad_norm for r in reports] == [r.grad_norm for r in expected]
        assert equal(weights(disturbed), weights(undisturbed))


def test_gradients_that_nearly_are_the_true_ones_make_nearly_the_same_steps(source: ModelSource) -> None:
    with routers(source, 1) as alone, routers(source) as group:
        expected, reports = run(alone, CompressionSettings()), run(group, INT8)
    torch.testing.assert_close([r.loss for r in reports], [r.loss for r in expected], rtol=1e-3, atol=0)
    assert reports[0].loss == pytest.approx(expected[0].loss, rel=1e-6)


def test_fewer_bytes_cross_the_link(source: ModelSource) -> None:
    sent = {}
    for settings in (CompressionSettings(), INT8):
        with routers(source) as group:
            (link,) = group.router.replicas._links.values()
            group.router.begin_run(OPTIMIZER, compression=settings)
            before = link.traffic.bytes_sent, link.traffic.bytes_received
            step(group, 0)
            sent[settings] = link.traffic.bytes_sent - before[0], link.traffic.bytes_received - before[1]
    for plain, compressed in zip(*sent.values(), strict=True):
        assert plain > 3 * compressed


@pytest.mark.parametrize("settings", METHODS)
def test_a_router_joins_and_one_leaves_in_the_middle(source: ModelSource, settings: CompressionSettings) -> None:
    with routers(source) as group:
        group.router.begin_run(OPTIMIZER, compression=settings)
        step(group, 0)
        joined = group.add()
        assert group.seats[joined].router.learner.compression == settings
        step(group, 1)
        group.router.part("router-1")
        group.seats["router-1"].kill()
        step(group, 2)
        assert list(group.living) == ["router-0", "router-2"]
        step(group, 3)


def test_a_promoted_router_goes_on_with_what_it_had_not_sent(source: ModelSource) -> None:
    with routers(source, 3) as group:
        group.router.begin_run(OPTIMIZER, compression=INT8)
        step(group, 0)
        group.seats["router-0"].kill()
        heir = group.seats["router-1"].router.learner.pieces
        assert isinstance(heir, CompressedPieces)
        memory = list(heir._compressor._memory)
        assert any(m.error is not None and m.error.any() for m in memory)
        group.promote("router-1")
        assert all(a is b for a, b in zip(memory, heir._compressor._memory, strict=True))
        for number in range(1, len(BATCHES)):
            step(group, number)
        assert len(group.living) == 2


def test_a_router_that_is_alone_again_begins_anew(source: ModelSource) -> None:
    with routers(source) as group, routers(source, 1) as alone:
        run(group, INT8)
        group.router.part("router-1")
        group.seats["router-1"].kill()
        step(group, 0)
        pieces = group.router.learner.pieces
        assert isinstance(pieces, CompressedPieces)
        assert all(memory.error is None for memory in pieces._compressor._memory)
        run(alone, INT8)
        assert all(r.retries == 0 for r in run(group, INT8))


def test_another_job_has_its_own_method(source: ModelSource) -> None:
    with routers(source) as group, routers(source) as other:
        run(group, INT8)
        group.router.replace_weights(str(source.path))
        second = run(group, CompressionSettings())
        assert all(not isinstance(r.learner.pieces, CompressedPieces) for r in group.living.values())
        assert [r.loss for r in second] == [r.loss for r in run(other, CompressionSettings())]


def test_what_is_not_finite_leaves_no_trace(source: ModelSource) -> None:
    with routers(source) as undisturbed, routers(source) as group:
        for each in (undisturbed, group):
            each.router.begin_run(OPTIMIZER, compression=INT8)
            step(each, 0)
        embedding = group.seats["router-1"].router.learner.trunk.get_input_embeddings()
        handle = embedding.weight.register_hook(lambda grad: grad * float("nan"))
        with pytest.raises(NonFinite, match="gradient norm is nan"):
            group.router.train_step(BATCHES[1], lr=1e-2, clip_norm=1.0)
        handle.remove()
        for each in (undisturbed, group):
            step(each, 1)
        assert equal(weights(group), weights(undisturbed))


def test_settings_that_cannot_be_used_change_nothing(source: ModelSource) -> None:
    with routers(source) as group:
        with pytest.raises(InvalidInput, match=r"compression\.rank: is no rank \(got 0\); use 1 to 256"):
            group.router.begin_run(OPTIMIZER, compression=CompressionSettings("powersgd", rank=0))
        assert group.router.course.run == 0
        run(group, INT8)
