"""Expert updates beside forwards: nothing is older than the bound, nothing is lost, and with updates held back to
exactly the bound the numbers are those of a delayed reference written down by hand."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.errors import InvalidInput, LinkError, StepAborted
from actors.expert.updates import Brake
from actors.losses import token_losses
from actors.moe.cache import CacheSettings
from actors.optim import OptimizerSettings, adamw, scale_gradients, set_lr, square_sum
from actors.reference import Reference
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.transport.message import Message
from actors.trunk.model import ModelSource
from actors.values import Placement, VersionChoice
from tests.families import save
from tests.local import LocalCluster, cluster
from tests.routers import PIECE_BYTES, Routers

BATCHES = [
    [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(6)
]
LR, CLIP = 1e-2, 1.0
IDS = BATCHES[0][0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


def start(local: LocalCluster, staleness: int, *, hold: int = 0) -> None:
    for host in local.hosts:
        host.updates.brake = Brake(hold=hold)
    local.router.begin_run(OptimizerSettings(staleness=staleness))


def step(local: LocalCluster, number: int) -> float:
    return local.router.train_step(BATCHES[number], lr=LR, clip_norm=CLIP).loss


def drain(local: LocalCluster) -> None:
    local.router.status()  # waits for the commit
    for host in local.hosts:
        host.updates.drain()


def weights_of(local: LocalCluster) -> list[Tensor]:
    """Weights and moments of all groups, by group and layer."""
    found: list[Tensor] = []
    for group in range(local.placement.num_groups):
        holdings = local.members[local.placement.owner(group)].host.holdings
        for layer in range(len(holdings.stacks)):
            tensors, updates = holdings.read(group, layer)
            found += [*tensors, torch.tensor(updates)]
    return found


def delayed(directory: str, staleness: int, steps: int) -> list[float]:
    """Losses of one process in which step t is computed on experts of version max(0, t - 1 - staleness)."""
    reference = Reference(directory, dtype="float64")
    model = reference.model
    optimizer = adamw(model.named_parameters(), OptimizerSettings())
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    versions = [[p.detach().clone() for p in experts]]
    losses = []
    for t in range(1, steps + 1):
        for parameter, old in zip(experts, versions[max(0, t - 1 - staleness)], strict=True):
            parameter.data = old.clone()
        num_tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in BATCHES[t - 1])
        total = 0.0
        for ids_BS in BATCHES[t - 1]:
            loss = token_losses(model(input_ids=ids_BS, use_cache=False).logits, ids_BS) / num_tokens
            loss.backward()
            total += loss.item()
        norm = math.sqrt(square_sum(model.parameters()))
        scale_gradients(model.parameters(), min(1.0, CLIP / (norm + 1e-6)))
        for parameter, newest in zip(experts, versions[-1], strict=True):
            parameter.data = newest.clone()
        set_lr(optimizer, LR)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        versions.append([p.detach().clone() for p in experts])
        losses.append(total)
    return losses


@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_losses_are_those_of_a_delayed_reference(source: ModelSource, staleness: int) -> None:
    with cluster(source, 2) as local:
        start(local, staleness, hold=staleness)
        reports = [local.router.train_step(batch, lr=LR, clip_norm=CLIP) for batch in BATCHES]
    losses = [report.loss for report in reports]
    torch.testing.assert_close(losses, delayed(str(source.path), staleness, len(BATCHES)), rtol=1e-9, atol=0)
    assert [report.staleness_max for report in reports] == [min(staleness, t) for t in range(len(BATCHES))]
    assert [report.staleness_mean for report in reports] == [min(staleness, t) for t in range(len(BATCHES))]
    assert not any(report.merged_updates for report in reports)


@pytest.mark.parametrize("links", ["local", "socket"])
@pytest.mark.parametrize("redundancy", [1, 2])
def test_the_bound_is_never_broken(source: ModelSource, links: str, redundancy: int) -> None:
    """One actor is slow at its updates; every answer to a forward tells the version that was used."""
    staleness, lags = 2, []

    def wrap(actor: int, link: Link) -> Link:
        wait = link.wait

        def watched(question_id: int, timeout_s: float) -> Message:
            answer = wait(question_id, timeout_s)
            if "used" in answer.fields and "pairs" in answer.fields:
                lags.append((actor, answer.fields["version"] - answer.fields["used"]))  # type: ignore[operator]
            return answer

        link.wait = watched  # type: ignore[method-assign]
        return link

    with cluster(source, 2, links=links, redundancy=redundancy, wrap=wrap) as local:
        start(local, staleness)
        local.hosts[1].updates.brake = Brake(sleep_s=0.1)
        reports = [local.router.train_step(batch, lr=LR, clip_norm=CLIP) for batch in BATCHES]
        drain(local)
        assert [host.status()["used"] for host in local.hosts] == [len(BATCHES)] * 2
        num_merged = sum(host.updates.num_merged for host in local.hosts)
    assert all(0 <= lag <= staleness for _, lag in lags)
    assert max(lag for actor, lag in lags if actor == 1) >= 1, "the slow actor must have been behind"
    assert max(report.staleness_max for report in reports) == max(lag for _, lag in lags)
    assert redundancy == 1 or num_merged == 0, "copies make every update by itself"


@pytest.mark.parametrize("delay_correction", [0.0, 1.0])
def test_copies_stay_equal_bit_for_bit(source: ModelSource, delay_correction: float) -> None:
    """Though one of them is behind, and computes with older weights."""
    with cluster(source, 2, redundancy=2) as local:
        local.router.begin_run(OptimizerSettings(staleness=4, delay_correction=delay_correction))
        local.hosts[1].updates.brake = Brake(sleep_s=0.05)
        for number in range(len(BATCHES)):
            step(local, number)
        drain(local)
        first, second = (host.holdings for host in local.hosts)
        for group in range(local.placement.num_groups):
            for layer in range(len(first.stacks)):
                (mine, count), (theirs, other) = first.read(group, layer), second.read(group, layer)
                assert count == other == len(BATCHES)
                assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_others_are_answered_while_a_forward_waits(source: ModelSource) -> None:
    """An update that is held back lets the step wait; another router's question and serving go on at that host."""
    with cluster(source, 2, links="socket") as local:
        start(local, 1)
        local.hosts[1].updates.brake = Brake(hold=2)
        step(local, 0)
        step(local, 1)
        losses: list[float] = []
        third = threading.Thread(target=lambda: losses.append(step(local, 2)))
        third.start()
        try:
            _until(lambda: bool(local.members["expert-1"].servers[0]._kept), "the forward must wait")
            other = local.members["expert-1"].open()
            answer = other.call(Message("echo", {}, (torch.ones(1),)), 5.0)
            assert answer.fields["version"] == 2
            other.close()
            _, used = local.router.serving.score([1, 2, 3], VersionChoice(max_behind=2))
            assert used == 0, "it tells the least version of the experts that it used"
            assert not losses
        finally:
            local.hosts[1].updates.brake = Brake()
            third.join(20.0)
        assert len(losses) == 1


def _until(condition: Callable[[], bool], what: str) -> None:
    ticks = threading.Event()
    for _ in range(2000):
        if condition():
            return
        ticks.wait(0.005)
    raise AssertionError(what)


def test_who_reads_or_moves_groups_gets_every_update(source: ModelSource, tmp_path: Path) -> None:
    def behind(local: LocalCluster) -> list[int]:
        return [host.updates.max_lag for host in local.hosts]

    with cluster(source, 2) as local, cluster(source, 2) as prompt:
        for each, hold in ((local, 2), (prompt, 0)):
            start(each, 2, hold=hold)
        for number in range(2):
            step(local, number)
        assert behind(local) == [2, 2]
        local.router.take_snapshot()
        assert behind(local) == [0, 0]
        assert all(host.saving.snapshot is not None and host.saving.snapshot.updates == 2 for host in local.hosts)
        step(local, 2)
        assert behind(local) == [1, 1]
        local.router.export(tmp_path / "exported")
        assert behind(local) == [0, 0]
        exported = Reference(str(tmp_path / "exported"), dtype="float64")
        torch.testing.assert_close(local.router.serving.logits(IDS), exported.logits(IDS), rtol=1e-9, atol=1e-12)
        step(local, 3)
        taken = weights_of(local)  # without the update that is pending
        local.adopt("1", "0", "1", "0")
        assert behind(local) == [0, 0]
        assert _counts(local) == dict.fromkeys(range(4), 4)
        assert not all(torch.equal(a, b) for a, b in zip(taken, weights_of(local), strict=True))
        step(local, 4)
        assert local.router.begin_run(OptimizerSettings()).version == 5
        assert behind(local) == [0, 0]


def test_a_group_that_arrives_while_updates_are_pending_equals_its_owners(source: ModelSource) -> None:
    """It follows its owner's updates, whatever the actor that it comes to has still to make, and is a copy then."""
    with cluster(source, 2) as local:
        start(local, 2, hold=2)
        step(local, 0)
        step(local, 1)
        owner = local.placement.owner(0)
        (other,) = set(local.members) - {owner}
        local.arrive(0, owner, other)
        step(local, 2)
        step(local, 3)
        holders = ((owner, other), *local.placement.holders[1:])
        local.placement = Placement(local.placement.epoch + 1, holders, local.placement.group_size)
        local.router.placing.adopt(local.roster(local.placement))  # not with a second arrival, as `local.adopt` would
        step(local, 4)
        drain(local)
        mine, theirs = (local.members[name].host.holdings for name in (owner, other))
        for layer in range(len(mine.stacks)):
            (tensors, count), (copies, other_count) = mine.read(0, layer), theirs.read(0, layer)
            assert count == other_count == 5
            assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def _counts(local: LocalCluster) -> dict[int, int]:
    hosts = {group: local.members[local.placement.owner(group)].host for group in range(local.placement.num_groups)}
    return {group: host.holdings.read(group, 0)[1] for group, host in hosts.items()}


def run_held(
    local: LocalCluster, staleness: int, drained_before: Sequence[int] = (), between: Callable[[int], object] = int
) -> tuple[list[float], list[Tensor]]:
    start(local, staleness, hold=staleness)
    losses = []
    for number in range(len(BATCHES)):
        if number in drained_before:
            drain(local)
        between(number)
        losses.append(step(local, number))
    alive = [member for member in local.members.values() if not member.dead]
    local.router.status()
    for member in alive:
        member.host.updates.drain()
    return losses, weights_of(local)


def test_the_death_of_an_actor_with_copies_loses_no_update(source: ModelSource) -> None:
    """It dies with updates pending; who takes over has made them all, and goes on with the same numbers."""
    with cluster(source, 2, redundancy=2) as undisturbed:
        expected = run_held(undisturbed, 2, drained_before=[4])
    with cluster(source, 2, redundancy=2, heals=True) as local:

        def kill(number: int) -> None:
            if number == 4:
                assert local.members["expert-1"].host.updates.max_lag >= 2
                local.members["expert-1"].kill()

        losses, weights = run_held(local, 2, between=kill)
    torch.testing.assert_close(losses, expected[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(weights, expected[1], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("op", ["forward", "backward", "prepare", "commit"])
def test_a_step_that_runs_again_has_the_same_numbers(source: ModelSource, op: str) -> None:
    """An aborted attempt leaves what is committed and pending alone."""
    with cluster(source, 2) as undisturbed:
        expected = run_held(undisturbed, 2)
    scripted: list[FaultyLink] = []

    def wrap(actor: int, link: Link) -> Link:
        if actor == 1 and not scripted:
            scripted.append(FaultyLink(link, [Fault(op, 4, "drop_answer")]))  # type: ignore[arg-type]
            return scripted[0]
        return link

    with cluster(source, 2, links="socket", wrap=wrap) as local:
        losses, weights = run_held(local, 2)
        assert len(scripted[0].struck) == 1
    torch.testing.assert_close(losses, expected[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(weights, expected[1], rtol=1e-8, atol=1e-12)


def test_a_long_run_under_deaths_keeps_the_bound_and_loses_no_update(source: ModelSource) -> None:
    """Three actors with copies, one slow; a death every few steps, and who is missing comes back."""
    staleness, steps = 4, 16
    with cluster(source, 3, redundancy=2, heals=True) as local:
        local.router.begin_run(OptimizerSettings(staleness=staleness))
        reports = []
        for number in range(steps):
            if number in (5, 10):
                victim = local.placement.actors[0]
                local.members[victim].kill()
            slowest = next(member for member in reversed(local.members.values()) if not member.dead)
            slowest.host.updates.brake = Brake(sleep_s=0.03)
            reports.append(local.router.train_step(BATCHES[number % len(BATCHES)], lr=LR, clip_norm=CLIP))
            if number == 5:
                _give_copies_back(local)
        local.router.status()  # waits for the commit
        for member in local.members.values():
            if not member.dead:
                member.host.updates.drain()
        assert [report.step for report in reports] == list(range(1, steps + 1))
        assert sum(report.retries for report in reports) == 2
        assert 1 <= max(report.staleness_max for report in reports) <= staleness
        assert _counts(local) == dict.fromkeys(range(4), steps), "no update of any group is lost"


def _give_copies_back(local: LocalCluster) -> None:
    """Every group on two of those that live."""
    living = [name for name, member in local.members.items() if not member.dead]
    held = [[*names, *(n for n in living if n not in names)][:2] for names in local.placement.holders]
    local.adopt(*("".join(name.removeprefix("expert-") for name in names) for names in held))


def test_all_routers_of_a_step_keep_the_bound(source: ModelSource) -> None:
    """Each sends its own forwards; what the step tells is of all of them."""
    losses = []
    for num_routers in (1, 2):
        with cluster(source, 2, piece_bytes=PIECE_BYTES) as local, closing(Routers(local)) as group:
            for _ in range(num_routers - 1):
                group.add()
            start(local, 2, hold=2)
            reports = [local.router.train_step(batch, lr=LR, clip_norm=CLIP) for batch in BATCHES]
            assert [report.staleness_max for report in reports] == [0, 1, 2, 2, 2, 2]
            assert [report.staleness_mean for report in reports] == [0, 1, 2, 2, 2, 2]
            group.agree()
            losses.append([report.loss for report in reports])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)


def test_a_forward_that_waits_too_long_ends_with_an_error(source: ModelSource) -> None:
    with cluster(source, 2, links="socket", max_step_retries=0) as local:
        start(local, 1)
        local.hosts[0].updates.brake = Brake(hold=5)
        step(local, 0)
        step(local, 1)
        links = local.router.state.training.links
        patient_s, links.timeout_s = links.timeout_s, 0.5  # for what is to fail alone
        with pytest.raises((LinkError, StepAborted)):
            step(local, 2)
        links.timeout_s = patient_s
        local.hosts[0].updates.brake = Brake()
        assert math.isfinite(step(local, 2)), "and the next attempt goes on"


def test_an_update_that_fails_is_told(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no memory left")

    with cluster(source, 2, max_step_retries=0) as local:
        start(local, 1)
        monkeypatch.setattr(local.hosts[0].holdings, "updated", fail)
        step(local, 0)
        with pytest.raises(StepAborted, match="an update of expert-0 failed with RuntimeError: no memory left"):
            local.router.take_snapshot()
        with pytest.raises(StepAborted, match="no memory left"):
            step(local, 1)


@pytest.mark.parametrize("staleness", [-1, 65, 1.5, True])
def test_bounds_that_no_job_can_have(source: ModelSource, staleness: int) -> None:
    with cluster(source, 2) as local:
        with pytest.raises(InvalidInput, match=r"optimizer\.staleness"):
            local.router.begin_run(OptimizerSettings(staleness=staleness))
        assert local.hosts[0].holdings.settings == OptimizerSettings()


def test_an_expert_cache_refuses_it(source: ModelSource) -> None:
    refusal = pytest.raises(InvalidInput, match=r"optimizer\.staleness: .*expert_cache_size is set")
    with cluster(source, 2, cache=CacheSettings(1)) as local, refusal:
        local.router.begin_run(OptimizerSettings(staleness=1))
