"""Gradients of copies that travel compressed: one update bit for bit, whoever dies, moves, joins, or tries again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from actors.compress.settings import CompressionSettings
from actors.errors import NonFinite
from actors.expert.squeezing import Squeezer
from actors.moe.cache import CacheSettings
from actors.optim import OptimizerSettings
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.trunk.model import ModelSource
from actors.values import Growth, StepReport
from tests.contract.test_copies import IDS, _Deadly, copies_agree
from tests.families import save
from tests.local import LocalCluster, cluster

BATCHES = [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(t)) for t in range(4)]
METHODS = [
    CompressionSettings("powersgd", rank=2, copies=True),
    CompressionSettings("powersgd", rank=1, quantised=True, copies=True),
    CompressionSettings("topk", share=0.05, copies=True),
    CompressionSettings("int8", copies=True),
    CompressionSettings("fp8", copies=True),
]
INT8 = METHODS[3]
OPTIMIZER = OptimizerSettings(eps=1e-4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(path=str(save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float32)))


def step(local: LocalCluster, number: int) -> StepReport:
    report = local.router.train_step([BATCHES[number]], lr=1e-2, clip_norm=1.0)
    if not local.router.learner.settings.staleness:
        copies_agree(local)
    return report


def run(
    local: LocalCluster,
    settings: CompressionSettings = INT8,
    between: Mapping[int, Callable[[], object]] | None = None,
    optimizer: OptimizerSettings = OPTIMIZER,
) -> list[StepReport]:
    local.router.begin_run(optimizer, compression=settings)
    reports = []
    for number in range(len(BATCHES)):
        if between and number in between:
            between[number]()
        reports.append(step(local, number))
    return reports


def squeezer(local: LocalCluster, name: str) -> Squeezer:
    found = local.members[name].host.state.copies._squeezer
    assert found is not None
    return found


def groups_remembered(local: LocalCluster, name: str) -> set[int]:
    return {group for group, _ in squeezer(local, name)._compressors}


def told_of(reports: list[StepReport]) -> list[tuple[float, float]]:
    return [(report.loss, report.grad_norm) for report in reports]


@pytest.mark.parametrize("settings", METHODS)
def test_copies_are_equal_and_far_fewer_bytes_travel(source: ModelSource, settings: CompressionSettings) -> None:
    sent = {}
    for each in (CompressionSettings(), settings):
        with cluster(source, 3, redundancy=2) as local:
            reports = run(local, each)
            links = [link for member in local.members.values() for link in member.host.exchange._links.values()]
            sent[each] = sum(link.traffic.bytes_sent for link in links)
            if each == settings:
                assert all(local.members[name].host.status()["memory_bytes"] for name in local.members)
                assert squeezer(local, "expert-0").num_bytes() > 0
            else:
                expected = reports
    assert reports[0].loss == pytest.approx(expected[0].loss, rel=1e-6)
    assert reports[-1].loss == pytest.approx(expected[-1].loss, rel=0.05)
    assert told_of(reports) != told_of(expected)
    assert sent[CompressionSettings()] > 2.5 * sent[settings]


def test_without_the_wish_nothing_is_compressed(source: ModelSource) -> None:
    with cluster(source, 3, redundancy=2) as plain, cluster(source, 3, redundancy=2) as local:
        reports = run(local, replace(INT8, copies=False))
        assert told_of(reports) == told_of(run(plain, CompressionSettings()))
        assert all(member.host.state.copies._squeezer is None for member in local.members.values())


@pytest.mark.parametrize("op", ["prepare", "reduce", "commit"])
@pytest.mark.parametrize("settings", [METHODS[1]])
def test_an_attempt_that_fails_leaves_no_trace(source: ModelSource, settings: CompressionSettings, op: str) -> None:
    """Sums were on their way by then, and every sender had new errors."""

    scripted: list[Link] = []

    def wrap(actor: int, link: Link) -> Link:
        if actor == 0 and not scripted:
            scripted.append(FaultyLink(link, [Fault(op, 2, "close")]))
            return scripted[0]
        return link

    with cluster(source, 3, redundancy=2) as undisturbed, cluster(source, 3, redundancy=2, wrap=wrap) as disturbed:
        expected, reports = run(undisturbed, settings), run(disturbed, settings)
        assert sum(report.retries for report in reports) == 1
        assert told_of(reports) == told_of(expected)
        assert torch.equal(disturbed.router.serving.logits(IDS), undisturbed.router.serving.logits(IDS))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("when", ["prepare", "reduce", "commit"])
def test_the_copies_of_the_dead_go_on_with_what_they_had_not_sent(source: ModelSource, victim: int, when: str) -> None:
    victims: list[Callable[[], None]] = []

    def wrap(actor: int, link: Link) -> Link:
        return _Deadly(link, when, victims) if actor == victim else link

    with cluster(source, 3, links="socket", redundancy=2, heals=True, wrap=wrap) as local:
        victims.append(local.members[f"expert-{victim}"].kill)
        reports = run(local)
        assert local.members[f"expert-{victim}"].dead
        assert all(report.loss < 10 for report in reports)
        alone = {g for g, held in enumerate(local.placement.holders) if len(held) == 1}
        assert alone
        for name in local.placement.actors:
            assert not groups_remembered(local, name) & alone, "nobody is sent what was left out"


def test_groups_move_and_copies_come_own_and_go(source: ModelSource) -> None:
    with cluster(source, 2, links="socket") as local:
        local.add()
        placements = {1: ("01", "01", "12", "2"), 2: ("10", "0", "12", "2"), 3: ("1", "0", "21", "2")}
        run(local, between={t: lambda held=held: local.adopt(*held) for t, held in placements.items()})  # type: ignore[misc]
        assert groups_remembered(local, "expert-0") == set()
        assert groups_remembered(local, "expert-1") == {2}
        local.adopt("1", "0", "2", "2")
        local.adopt("1", "0", "21", "2")
        assert groups_remembered(local, "expert-1") == set(), "what it has is not of this copy"
        step(local, 0)


def test_who_becomes_the_owner_keeps_what_it_had_not_sent(source: ModelSource) -> None:
    with cluster(source, 2, redundancy=2) as local:
        run(local)
        before = {n: {k: list(c._memory) for k, c in squeezer(local, n)._compressors.items()} for n in local.members}
        assert any(m.error is not None and m.error.any() for of in before.values() for c in of.values() for m in c)
        local.adopt("10", "10", "01", "01")
        for name, of in before.items():
            for key, memory in of.items():
                now = squeezer(local, name)._compressors[key]._memory
                assert all(a is b for a, b in zip(memory, now, strict=True))
        step(local, 0)


def test_a_model_grows_under_it(source: ModelSource) -> None:
    with cluster(source, 2, redundancy=2) as local:
        run(local, between={2: lambda: local.grow(Growth(16))})
        assert groups_remembered(local, "expert-0") == set(range(8))


@pytest.mark.parametrize(
    "optimizer",
    [
        replace(OPTIMIZER, staleness=2),
        replace(OPTIMIZER, staleness=2, sparse="skip"),
        replace(OPTIMIZER, sparse="exact"),
        replace(OPTIMIZER, experts="muon", staleness=1),
    ],
)
def test_beside_forwards_and_sparse(source: ModelSource, optimizer: OptimizerSettings) -> None:
    with cluster(source, 3, redundancy=2) as local:
        for report in run(local, METHODS[0], optimizer=optimizer):
            assert report.staleness_max <= optimizer.staleness
        local.router.status()  # waits for the commit
        for host in local.hosts:
            host.updates.drain()
        copies_agree(local)
        assert local.router.serving.logits(IDS).isfinite().all()


def test_behind_an_expert_cache(source: ModelSource) -> None:
    found = []
    for cache in (None, CacheSettings(2)):
        with cluster(source, 2, redundancy=2, cache=cache) as local:
            found.append(told_of(run(local)))
    assert found[0] == found[1], "bit for bit, on a CPU"


def test_sparse_updates_are_those_of_a_dense_run(source: ModelSource) -> None:
    """What is left out of an expert must not make it move in a step in which no token came to it."""
    found = []
    for sparse in ("none", "exact"):
        with cluster(source, 2, redundancy=2) as local:
            found.append(told_of(run(local, optimizer=replace(OPTIMIZER, sparse=sparse))))  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


def test_what_is_not_finite_leaves_no_trace(source: ModelSource) -> None:
    with cluster(source, 2, redundancy=2) as undisturbed, cluster(source, 2, redundancy=2) as local:
        for each in (undisturbed, local):
            each.router.begin_run(OPTIMIZER, compression=INT8)
            step(each, 0)
        stack = local.hosts[1].holdings.stacks[0]
        accumulate: Any = stack.accumulate

        def spoilt(part: Any) -> None:
            accumulate(part)
            local.hosts[1].holdings.gradients(local.hosts[1].groups[0], 0)[0].fill_(float("nan"))

        stack.accumulate = spoilt  # type: ignore[method-assign]
        with pytest.raises(NonFinite, match="gradient norm is nan"):
            local.router.train_step([BATCHES[1]], lr=1e-2, clip_norm=1.0)
        del stack.accumulate  # type: ignore[method-assign]
        assert told_of([step(local, 1)]) == told_of([step(undisturbed, 1)])


def test_another_job_and_other_weights_begin_without(source: ModelSource) -> None:
    with cluster(source, 2, redundancy=2) as local, cluster(source, 2, redundancy=2) as fresh:
        run(local)
        local.router.replace_weights(str(source.path))
        assert groups_remembered(local, "expert-0") == set()
        assert told_of(run(local)) == told_of(run(fresh))
        run(local, CompressionSettings())
        assert local.hosts[0].state.copies._squeezer is None
        assert local.hosts[0].state.copies.num_bytes() == 0
