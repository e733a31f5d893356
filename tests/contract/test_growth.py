"""Experts are added to a running model: the loss goes on where it was, everybody has grown or nobody, and what comes
out is a model of plain transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import InvalidInput, LinkError
from actors.moe.settings import BalanceSettings, GateSettings
from actors.optim import OptimizerSettings
from actors.reference import Reference
from actors.router import placing
from actors.router.router import Router
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.trunk.model import ModelSource
from actors.values import Growth, Sampling
from cluster.checkpoint.state import read_experts, read_router
from cluster.checkpoint.store import CheckpointStore
from cluster.placement.placement import ActorSlot, spread
from tests.contract.test_copies import copies_agree
from tests.contract.test_snapshots import restore_all, save_all
from tests.families import FAMILIES, plain, save
from tests.local import LocalCluster, cluster

BATCHES = [torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(t)) for t in range(3)]
IDS = BATCHES[0]
JUMP = 0.01
"""Of the loss, at the moment of growth."""
SAME = 1e-6
"""Of losses: DeepSeek-V3 computes its gate in float32, so that another order of sums can be seen from there on."""
OPEN_STEPS = 6
GREW_WITH_A_BIAS = ("deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def directory(family: str) -> Path:
        return root / family if (root / family).exists() else save(family, root / family, torch.float64)

    return directory


@pytest.fixture
def source(directories: Callable[[str], Path]) -> ModelSource:
    return source_of(directories("deepseek_v3"))


def source_of(directory: Path) -> ModelSource:
    return ModelSource(path=str(directory), dtype="float64")


@contextmanager
def trained(source: ModelSource, num_actors: int = 2, **options: Any) -> Iterator[LocalCluster]:
    """A cluster whose gates prefer some experts, as those of a model in training do."""
    with cluster(source, num_actors, **options) as local:
        local.router.begin_run(OptimizerSettings())
        train(local, 6)
        yield local


def train(local: LocalCluster, steps: int, bias_speed: float = 0.0) -> list[float]:
    return [
        local.router.train_step([BATCHES[t % 3]], lr=3e-3, clip_norm=1.0, bias_speed=bias_speed).loss
        for t in range(steps)
    ]


def grow(local: LocalCluster, growth: Growth) -> None:
    """The loss of the same tokens just before and just after."""
    before, _ = local.router.serving.evaluate(BATCHES)
    local.grow(growth)
    after, _ = local.router.serving.evaluate(BATCHES)
    assert after == pytest.approx(before, rel=JUMP)


def used_of_new(local: LocalCluster, num_old: int) -> int:
    """Layers in which a new expert got tokens in a step."""
    report = local.router.train_step([IDS], lr=3e-3, clip_norm=1.0)
    return sum(sum(load_E[num_old:]) > 0 for load_E in report.load_LE)


# --- The loss, and what is given out -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("redundancy", [1, 2])
def test_from_8_to_16_to_32_while_training(
    directories: Callable[[str], Path], tmp_path: Path, family: str, redundancy: int
) -> None:
    with trained(source_of(directories(family)), redundancy + 1, redundancy=redundancy) as local:
        before = train(local, 3)
        for num_experts in (16, 32):
            grow(local, Growth(num_experts, open_steps=OPEN_STEPS))
            copies_agree(local)
            train(local, OPEN_STEPS)
            assert used_of_new(local, num_experts // 2), "no new expert got a token"
            copies_agree(local)
        after = train(local, 3)
        assert sum(after) < 0.97 * sum(before), "training must go on"
        local.router.export(tmp_path / "out")
        exported = plain(tmp_path / "out", torch.float64)
        with torch.no_grad():
            expected = exported(input_ids=IDS).logits
        torch.testing.assert_close(local.router.serving.logits(IDS), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", GREW_WITH_A_BIAS)
def test_fresh_experts_are_let_in_step_by_step(directories: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    with trained(source_of(directories(family)), 3, redundancy=2) as local:
        expected = local.router.serving.logits(IDS)
        local.grow(Growth(12, "fresh", open_steps=OPEN_STEPS))
        torch.testing.assert_close(
            local.router.serving.logits(IDS), expected, rtol=1e-5, atol=1e-7
        )  # gates are in float32
        assert not used_of_new(local, 8), "they are not let in before the first step"
        train(local, OPEN_STEPS)
        assert used_of_new(local, 8)
        copies_agree(local)
        local.router.export(tmp_path / "out")
        with torch.no_grad():
            found = plain(tmp_path / "out", torch.float64)(input_ids=IDS).logits
        torch.testing.assert_close(local.router.serving.logits(IDS), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(GREW_WITH_A_BIAS)))
def test_a_gate_without_a_bias_takes_no_fresh_experts(directories: Callable[[str], Path], family: str) -> None:
    with cluster(source_of(directories(family))) as local:
        expected = local.router.serving.logits(IDS)
        with pytest.raises(InvalidInput, match="no bias that could keep new experts out"):
            local.router.grow(Growth(16, "fresh"))
        torch.testing.assert_close(local.router.serving.logits(IDS), expected, rtol=0, atol=0)


GATES = {
    "top_k": GateSettings(kind="top_k", noise_std=0.5, attention=True, temperature=0.7),
    "deepseek_moe": GateSettings(kind="deepseek_moe"),
    "deepseek": GateSettings(kind="deepseek", num_groups=2),
    "deepseek, softmax": GateSettings(kind="deepseek", score="softmax", num_groups=2),
    "two_level": GateSettings(kind="two_level", num_groups=4, groups_per_token=2),
}


EXACT = GATES["deepseek"]
"""Computes in float64. In float32 sums in another order, as of the copy that happened to have less to do, decide
between an expert and its twin."""


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_gates_of_ours_grow_too(directories: Callable[[str], Path], tmp_path: Path, name: str, family: str) -> None:
    gate = GATES[name]
    with trained(source_of(directories(family)), gate=gate) as local:
        grow(local, Growth(16, open_steps=OPEN_STEPS))
        train(local, OPEN_STEPS)
        assert used_of_new(local, 8)
        local.router.export(tmp_path / "out")
        expected = local.router.serving.logits(IDS)
    grown = replace(gate, num_groups=2 * gate.num_groups if gate.num_groups > 1 else 1)
    with cluster(source_of(tmp_path / "out"), gate=grown) as other:
        torch.testing.assert_close(other.router.serving.logits(IDS), expected, rtol=1e-6, atol=1e-7)


def test_a_gate_that_would_jump_is_refused(directories: Callable[[str], Path]) -> None:
    """Softmax weights that are not renormalised depend on experts that are not chosen."""
    with trained(source_of(directories("qwen3_moe")), gate=GATES["deepseek_moe"]) as local:
        expected = local.router.serving.logits(IDS)
        with pytest.raises(InvalidInput, match="the loss would jump"):
            local.router.grow(Growth(12))
        torch.testing.assert_close(local.router.serving.logits(IDS), expected, rtol=0, atol=0)
        train(local, 1)


@pytest.mark.parametrize(
    ("growth", "text"),
    [
        (Growth(8), "experts are only added"),
        (Growth(13), "a multiple of 2"),
        (Growth(10), "parts of 4 experts"),
        (Growth(16, "double"), "one of copy, fresh"),
        (Growth(16, perturbation=1.0), "below 1"),
        (Growth(16, open_steps=0), "at least 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(source: ModelSource, growth: Growth, text: str) -> None:
    with cluster(source) as local:
        with pytest.raises(InvalidInput, match=text):
            local.router.grow(growth)
        assert local.router.serving.logits(IDS).isfinite().all()


# --- Training goes on as of one process --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_losses_are_those_of_plain_transformers_from_the_grown_model(
    directories: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    with trained(source_of(directories(family)), 3, redundancy=2) as local:
        local.grow(Growth(16, open_steps=1))
        train(local, 1)  # open: what opens further is no part of a model in one process
        local.router.export(tmp_path / "out")
        local.router.begin_run(OptimizerSettings())
        losses = train(local, 3)
    reference = Reference(str(tmp_path / "out"), dtype="float64")
    expected = [reference.train_step([BATCHES[t]], lr=3e-3, clip_norm=1.0)[0] for t in range(3)]
    assert losses == pytest.approx(expected, rel=1e-6)


def test_moments_go_on(source: ModelSource) -> None:
    with trained(source) as local:
        local.router.status()
        host = local.hosts[0]
        old, updates = host.holdings.read(0, 0)
        gate = {n: p for n, p in local.router.learner.trunk.named_parameters() if "mlp.gate.weight" in n}
        moments = {n: local.router.learner.optimizer.state[p]["exp_avg"].clone() for n, p in gate.items()}
        grown = local.grow(Growth(16))
        (copy,) = [g for g in host.groups if g >= 4 and grown.placement.owner(g) == host.name][:1]
        read, counted = host.holdings.read(copy, 0)
        assert counted == updates == 6
        assert read[1].count_nonzero()
        assert read[2].count_nonzero()
        for name, parameter in local.router.learner.trunk.named_parameters():
            if name in moments:
                found = local.router.learner.optimizer.state[parameter]["exp_avg"]
                assert found.shape == (16, 32)
                assert torch.equal(found[:8], moments[name])
                assert all(any(torch.equal(row, old_row) for old_row in moments[name]) for row in found[8:])
        assert torch.equal(host.holdings.read(0, 0)[0][0], old[0]), "old experts stay as they are"


def test_copies_differ_by_the_perturbation_asked_for(source: ModelSource) -> None:
    with trained(source, 1) as local:
        local.grow(Growth(16, perturbation=0.1, seed=3))
        holdings = local.hosts[0].holdings
        weights = torch.cat([holdings.read(group, 0)[0][0] for group in range(8)]).flatten(1)
        for new in weights[8:]:
            distance = ((weights[:8] - new).norm(dim=1) / weights[:8].norm(dim=1)).min()
            assert 0.05 < distance < 0.2


def test_a_stream_goes_on(source: ModelSource) -> None:
    sampling = Sampling(max_tokens=12)
    with trained(source, 3, redundancy=2, links="socket") as local:
        expected = [event.token for event in local.router.serving.generate([3, 4, 5], sampling, timeout_s=30)]
        stream = local.router.serving.generate([3, 4, 5], sampling, timeout_s=30)
        found = [next(stream).token for _ in range(4)]
        local.grow(Growth(16))
        assert found + [event.token for event in stream] == expected


def test_new_groups_move_to_an_actor_that_joins(source: ModelSource) -> None:
    with trained(source, links="socket") as local:
        local.grow(Growth(16, open_steps=OPEN_STEPS))
        train(local, 2)
        expected = local.router.serving.logits(IDS)
        local.add()
        holders = ["2" if group >= 4 else local.placement.owner(group)[-1] for group in range(8)]
        local.adopt(*holders)
        torch.testing.assert_close(local.router.serving.logits(IDS), expected, rtol=1e-5, atol=1e-7)
        assert set(local.hosts[2].groups) == {4, 5, 6, 7}
        train(local, 2)


# --- All or nobody -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["drop_question", "drop_answer", "close"])
def test_a_growth_that_fails_in_the_middle_has_not_been(
    source: ModelSource, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "BIRTH_FACTOR", 1.5)  # the experts of a small model are there at once
    with trained(source, links="socket") as still:
        expected = train(still, 4)
    scripted: list[FaultyLink] = []

    def wrap(actor: int, link: Link) -> Link:
        if actor == 1 and not scripted:
            scripted.append(FaultyLink(link, [Fault("place", 2, kind)]))  # type: ignore[arg-type]
            return scripted[0]
        return link

    with trained(source, links="socket", wrap=wrap) as local:
        losses = train(local, 1)
        with pytest.raises(LinkError):
            local.router.grow(Growth(16))
        assert scripted[0].struck
        losses += [local.router.train_step([BATCHES[1]], lr=3e-3, clip_norm=1.0).loss]
        assert [len(host.groups) for host in local.hosts] == [2, 2]
        losses += [local.router.train_step([BATCHES[t % 3]], lr=3e-3, clip_norm=1.0).loss for t in (2, 3)]
        assert losses == pytest.approx(expected, rel=SAME)
        grow(local, Growth(16))
        assert [len(host.groups) for host in local.hosts] == [4, 4]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_death_in_the_middle_undoes_it_and_the_next_try_grows(source: ModelSource, victim: int) -> None:
    victims: list[Callable[[], None]] = []

    class Deadly(FaultyLink):
        def close(self) -> None:
            if self.struck and victims:
                victims.pop()()
            super().close()

    def wrap(actor: int, link: Link) -> Link:
        return Deadly(link, [Fault("place", 2, "close")]) if actor == victim else link

    with trained(source, 3, links="socket", redundancy=2, heals=True, wrap=wrap, gate=EXACT) as local:
        victims.append(local.members[f"expert-{victim}"].kill)
        before, _ = local.router.serving.evaluate(BATCHES)
        with pytest.raises(LinkError, match=f"expert-{victim}"):
            local.router.grow(Growth(16))
        assert local.members[f"expert-{victim}"].dead
        local.router.placing.adopt(local.without([f"expert-{victim}"]))
        assert all(max(h.groups) < 4 for m in local.members.values() if not m.dead for h in [m.host])
        assert local.router.serving.evaluate(BATCHES)[0] == pytest.approx(before, rel=SAME)
        grow(local, Growth(16, open_steps=OPEN_STEPS))
        copies_agree(local)
        train(local, 2)
        assert f"expert-{victim}" not in local.placement.actors


def test_copies_of_new_groups_take_over(source: ModelSource) -> None:
    with trained(source, 3, links="socket", redundancy=2, gate=EXACT) as still:
        still.grow(Growth(16, open_steps=2))
        expected = train(still, 4)
    with trained(source, 3, links="socket", redundancy=2, heals=True, gate=EXACT) as local:
        local.grow(Growth(16, open_steps=2))
        losses = train(local, 3)
        local.members["expert-1"].kill()
        losses += [local.router.train_step([BATCHES[0]], lr=3e-3, clip_norm=1.0).loss]
        assert losses == pytest.approx(expected, rel=SAME)


def test_a_placement_from_before_a_growth_is_late(source: ModelSource) -> None:
    with trained(source) as local:
        late = replace(local.placement, epoch=9)
        local.grow(Growth(16))
        assert local.router.placing.adopt(local.roster(late)) == 0.0
        assert [len(host.groups) for host in local.hosts] == [4, 4]
        train(local, 1)


# --- Checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "gate"), [("deepseek_v3", "model"), ("qwen3_moe", "two_level"), ("mixtral", "model")]
)
def test_a_grown_model_is_saved_and_brought_back(
    directories: Callable[[str], Path], tmp_path: Path, family: str, gate: str
) -> None:
    """In the middle of the opening, by actors that start from the directory of before."""
    source, settings = source_of(directories(family)), GATES.get(gate, GateSettings())
    with trained(source, gate=settings) as local:
        local.grow(Growth(16, open_steps=4))
        train(local, 2)
        found = save_all(local, CheckpointStore(str(tmp_path)))
        expected = train(local, 3)
        after = local.router.serving.logits(IDS)
    slots = [ActorSlot(f"expert-{i}", f"n{i}") for i in range(3)]
    with cluster(source, 3, gate=settings) as other:
        restore_all(other, found, spread(16, 2, slots, epoch=5))
        other.router.continue_run(BalanceSettings())
        assert train(other, 3) == pytest.approx(expected, rel=SAME)
        torch.testing.assert_close(other.router.serving.logits(IDS), after, rtol=SAME, atol=1e-7)
        grow(other, Growth(32))


def test_a_router_can_start_at_the_grown_size_to_be_restored(source: ModelSource, tmp_path: Path) -> None:
    with trained(source) as local:
        local.grow(Growth(16))
        found = save_all(local, CheckpointStore(str(tmp_path)))
        expected = local.router.serving.logits(IDS)
    with cluster(source) as other:
        slots = [ActorSlot(f"expert-{i}", f"n{i}") for i in range(2)]
        placement = spread(16, 2, slots, epoch=5)
        for name in placement.actors:
            other.members[name].host.saving.restore(placement.held_by(name), read_experts(found), 7)
        router = Router(replace(source, num_experts=16), other.roster(placement))
        router.restore(other.roster(placement), read_router(found), 7)
        torch.testing.assert_close(router.serving.logits(IDS), expected, rtol=1e-5, atol=1e-7)
        assert router.grown_to == 16
        router.close()


def test_back_to_a_checkpoint_from_before_the_growth(source: ModelSource, tmp_path: Path) -> None:
    with trained(source) as local:
        found = save_all(local, CheckpointStore(str(tmp_path)))
        expected = train(local, 2)
        local.grow(Growth(16))
        train(local, 2)
        slots = [ActorSlot(f"expert-{i}", f"n{i}") for i in range(2)]
        restore_all(local, found, spread(8, 2, slots, epoch=9))
        assert train(local, 2) == pytest.approx(expected, rel=SAME)
        grow(local, Growth(16))
