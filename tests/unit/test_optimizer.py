"""The update of one expert group: its numbers are torch's, and what sparse updates leave out is what they say."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from actors.errors import InvalidInput
from actors.moe import experts, missed, optimizer
from actors.moe.delay import compensate_
from actors.moe.muon import muon_, orthogonal
from actors.moe.optimizer import GroupOptimizer, step_together
from actors.optim import OptimizerSettings, adamw

E = 4
SHAPES = {"down_proj": (E, 8, 6), "gate_up_proj": (E, 12, 8), "gate_up_proj_bias": (E, 12)}
TOUCHED = [[0, 1, 2, 3], [1], [], [0, 3], [2], [1], [], [0, 1, 2, 3]]
"""Experts with a gradient, by step."""


class Group:
    """One layer, with gradients from a seed."""

    def __init__(self, settings: OptimizerSettings, dtype: torch.dtype = torch.float64, *, is_own: bool = True) -> None:
        draw = torch.Generator().manual_seed(0)
        self.weights = {n: nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for n, s in SHAPES.items()}
        self.optimizer = GroupOptimizer(settings, [self.weights], self._new_moments, lambda: is_own)

    def _new_moments(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.weights[name].data), torch.zeros_like(self.weights[name].data)

    def gradients(self, step: int, touched: list[int]) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(step + 1)
        rows = torch.zeros(E)
        rows[touched] = 1e-2
        return {
            n: torch.randn(w.shape, generator=draw).to(w.dtype) * rows.view(-1, *[1] * (w.ndim - 1)).to(w.dtype)
            for n, w in self.weights.items()
        }

    def train(self, plan: list[list[int]] = TOUCHED, scale: float = 0.5) -> None:
        for step, touched in enumerate(plan):
            self.optimizer.step(0, self.gradients(step, touched), 1e-2 / (step + 1), scale)

    def state(self) -> list[Tensor]:
        self.optimizer.catch_up(0)
        moments = [m for name in self.weights for m in self.optimizer.moments(0, name) or ()]
        return [*(w.detach() for w in self.weights.values()), *moments]


def assert_equal(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    ours, settings = Group(OptimizerSettings(), dtype), OptimizerSettings()
    theirs = Group(settings, dtype)
    reference = adamw(theirs.weights.items(), settings)
    ours.train()
    for step, touched in enumerate(TOUCHED):
        for name, gradient in theirs.gradients(step, touched).items():
            theirs.weights[name].grad = gradient * 0.5
        for group in reference.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        reference.step()
    states = [reference.state[w] for w in theirs.weights.values()]
    moments = [state[kind] for state in states for kind in ("exp_avg", "exp_avg_sq")]
    assert_equal(ours.state(), [*(w.detach() for w in theirs.weights.values()), *moments])


@pytest.mark.parametrize("sparse", ["exact", "skip"])
def test_sparse_equals_dense_when_every_expert_has_a_gradient(sparse: str) -> None:
    plan = [[0, 1, 2, 3]] * 6
    dense, ours = Group(OptimizerSettings()), Group(OptimizerSettings(sparse=sparse))
    dense.train(plan)
    ours.train(plan)
    for a, b in zip(ours.state(), dense.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_exact_is_dense_whatever_has_a_gradient() -> None:
    dense, ours = Group(OptimizerSettings()), Group(OptimizerSettings(sparse="exact"))
    dense.train()
    ours.train()
    for a, b in zip(ours.state(), dense.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_exact_puts_steps_off_until_they_are_wanted() -> None:
    ours = Group(OptimizerSettings(sparse="exact"))
    ours.train(TOUCHED[:3])
    before = {name: w.detach().clone() for name, w in ours.weights.items()}
    assert not ours.optimizer.step(0, ours.gradients(3, []), 1e-2, 1.0), "nothing was written"
    assert ours.optimizer.updates(0) == 4
    ours.optimizer.catch_up(0, [2])
    assert ours.optimizer.is_behind(0)
    assert not ours.optimizer.is_behind(0, [2])
    for name, w in ours.weights.items():
        assert [torch.equal(w[e], before[name][e]) for e in range(E)] == [True, True, False, True]


def test_when_steps_are_made_changes_no_bit() -> None:
    """Copies of a group read and compute at other times."""
    late, eager = (Group(OptimizerSettings(sparse="exact"), is_own=False) for _ in range(2))
    late.train()
    for step, touched in enumerate(TOUCHED):
        eager.optimizer.step(0, eager.gradients(step, touched), 1e-2 / (step + 1), 0.5)
        eager.optimizer.catch_up(0, [step % E])
    assert_equal(late.state(), eager.state())


@pytest.mark.parametrize("is_own", [True, False])
def test_steps_put_off_are_bounded_and_their_pieces_are_right(monkeypatch: pytest.MonkeyPatch, is_own: bool) -> None:
    monkeypatch.setattr(optimizer, "MAX_BEHIND", 3)
    monkeypatch.setattr(missed, "PIECE", 20)
    plan = [[0, 1], *[[0]] * 8]
    dense, ours = Group(OptimizerSettings()), Group(OptimizerSettings(sparse="exact"), is_own=is_own)
    for group in (dense, ours):
        group.train(plan)
    for a, b in zip(ours.state(), dense.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("experts", ["adamw", "muon"])
def test_skip_leaves_experts_without_a_gradient_alone(experts: str) -> None:
    ours = Group(OptimizerSettings(sparse="skip", experts=experts))
    ours.train(TOUCHED[:1])
    before = [t.clone() for t in ours.state()]
    assert ours.optimizer.step(0, ours.gradients(1, [1]), 1e-2, 1.0)
    assert not ours.optimizer.step(0, ours.gradients(2, []), 1e-2, 1.0)
    after = ours.state()
    weights = len(SHAPES)
    assert [torch.equal(after[0][e], before[0][e]) for e in range(E)] == [True, False, True, True]
    for a, b in zip(after[weights:], before[weights:], strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])
    assert ours.optimizer.updates(0) == 3


def test_candidates_only_save_looking() -> None:
    looked, told = Group(OptimizerSettings(sparse="skip")), Group(OptimizerSettings(sparse="skip"))
    looked.train()
    for step, touched in enumerate(TOUCHED):
        candidates = {*touched, 2}
        told.optimizer.step(0, told.gradients(step, touched), 1e-2 / (step + 1), 0.5, candidates=candidates)
    assert_equal(looked.state(), told.state())


def test_an_expert_whose_bias_alone_has_a_gradient_is_stepped() -> None:
    ours = Group(OptimizerSettings(sparse="skip"))
    gradients = {name: torch.zeros_like(w.data) for name, w in ours.weights.items()}
    gradients["gate_up_proj_bias"][2, 5] = float("nan")
    before = ours.weights["gate_up_proj_bias"].detach().clone()
    assert ours.optimizer.step(0, gradients, 1e-2, 1.0)
    assert torch.equal(ours.weights["gate_up_proj_bias"][[0, 1, 3]], before[[0, 1, 3]])
    assert ours.weights["gate_up_proj_bias"][2, 5].isnan()


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (7, 7)])
def test_muon_is_torchs_for_each_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, *shape)
    theirs = [nn.Parameter(w.clone()) for w in weight]
    reference = torch.optim.Muon(
        theirs, lr=1e-2, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    average = torch.zeros_like(weight)
    for _ in range(5):
        gradient = torch.randn(3, *shape)
        muon_(weight, gradient, average, lr=1e-2, momentum=0.95, weight_decay=0.1)
        for parameter, g in zip(theirs, gradient, strict=True):
            parameter.grad = g
        reference.step()
    averages = torch.stack([reference.state[p]["momentum_buffer"] for p in theirs])
    torch.testing.assert_close(average, averages)
    # Products in bfloat16 round differently in batches: 2^-8 of a step of 5e-3 to 6e-3, five times.
    torch.testing.assert_close(weight, torch.stack([p.detach() for p in theirs]), rtol=0, atol=5e-4)


def test_directions_are_nearly_orthogonal_and_nothing_stays_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 40) * torch.tensor([1e-4, 1e3]).view(2, 1, 1)
    values = torch.linalg.svdvals(orthogonal(x).float())
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert not orthogonal(torch.zeros(1, 4, 4)).any()


def test_under_muon_biases_are_adamws_and_the_second_moment_takes_no_memory() -> None:
    mixed, plain = Group(OptimizerSettings(experts="muon")), Group(OptimizerSettings())
    for group in (mixed, plain):
        group.train()
    name = "gate_up_proj_bias"
    assert torch.equal(mixed.weights[name], plain.weights[name])
    assert not torch.equal(mixed.weights["down_proj"], plain.weights["down_proj"])
    matrices = sum(mixed.weights[n].nbytes for n in ("down_proj", "gate_up_proj"))
    assert plain.optimizer.num_bytes() - mixed.optimizer.num_bytes() == matrices


@pytest.mark.parametrize(
    "settings",
    [{}, {"sparse": "exact"}, {"sparse": "skip"}, {"experts": "muon"}, {"experts": "muon", "sparse": "skip"}],
)
def test_a_state_that_is_taken_elsewhere_goes_on_the_same(settings: Mapping[str, str]) -> None:
    unbroken, first, second = (Group(OptimizerSettings(**settings)) for _ in range(3))  # type: ignore[arg-type]
    unbroken.train()
    first.train(TOUCHED[:4])
    weights, moments = first.state()[:3], first.state()[3:]
    for (_, parameter), weight in zip(second.weights.items(), weights, strict=True):
        parameter.data.copy_(weight)
    pairs = {name: [m.clone() for m in moments[2 * i : 2 * i + 2]] for i, name in enumerate(second.weights)}
    second.optimizer.set(0, pairs, first.optimizer.updates(0))
    for step, touched in list(enumerate(TOUCHED))[4:]:
        second.optimizer.step(0, second.gradients(step, touched), 1e-2 / (step + 1), 0.5)
    if settings.get("sparse") != "exact":
        assert_equal(second.state(), unbroken.state())
    for a, b in zip(second.state(), unbroken.state(), strict=True):  # steps put off were made in two parts
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_muon_does_not_put_steps_off() -> None:
    with pytest.raises(InvalidInput) as caught:
        OptimizerSettings(experts="muon", sparse="exact")
    assert caught.value.field == "optimizer.sparse"


# -- the delay correction ---------------------------------------------------------------------------------------------


def test_the_correction_is_the_papers() -> None:
    gradient, now, then, square = (torch.rand(2, 3, 4, dtype=torch.float64) for _ in range(4))
    mine = gradient.clone()
    compensate_(mine, now, then, strength=2.0, mean_square=square)
    by_hand = gradient + 2.0 * gradient**2 / (square + 1e-14).sqrt() * (now - then)
    torch.testing.assert_close(mine, by_hand, rtol=1e-12, atol=0)
    alone = gradient.clone()
    compensate_(alone, now, then, strength=2.0)
    for e in range(2):
        part = gradient[e] + 2.0 * gradient[e] ** 2 / (gradient[e] ** 2).mean().sqrt() * (now - then)[e]
        torch.testing.assert_close(alone[e], part, rtol=1e-9, atol=0)


@pytest.mark.parametrize("experts", ["adamw", "muon"])
def test_without_delay_there_is_nothing_to_correct(experts: str) -> None:
    plain = Group(OptimizerSettings(experts=experts))
    corrected = Group(OptimizerSettings(experts=experts, delay_correction=1.0))
    plain.train()
    for step, touched in enumerate(TOUCHED):
        same = {name: w.detach().clone() for name, w in corrected.weights.items()}
        corrected.optimizer.step(0, corrected.gradients(step, touched), 1e-2 / (step + 1), 0.5, then=same)
    assert_equal(corrected.state(), plain.state())


def test_the_correction_takes_the_place_of_the_curvature() -> None:
    """Of log-likelihoods: there the mean of squared gradients is the curvature. A gradient of old weights comes nearer
    to that of the weights of now."""
    torch.manual_seed(0)
    x, now, then = torch.randn(20000, 1, dtype=torch.float64), 0.05, 0.0
    # Loss (w - x)^2 / 2 of one sample: its gradient is w - x with mean square 1 and the curvature is 1.
    each = (then - x).view(-1, 1, 1)
    corrected = each.clone()
    compensate_(
        corrected, torch.full_like(each, now), torch.full_like(each, then), strength=1.0, mean_square=torch.ones(1)
    )
    exact = (now - x).mean()
    assert abs(corrected.mean() - exact) < 0.1 * abs(each.mean() - exact)


# -- in pieces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"sparse": "skip"}, {"experts": "muon"}])
@pytest.mark.parametrize("width", [8, 7])
def test_a_step_in_pieces_is_the_same_to_the_bit(
    settings: Mapping[str, str], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 an expert's part fills whole cache lines, of 7 it does not."""
    shapes = {"down_proj": (E, width, 16), "gate_up_proj": (E, 32, width), "gate_up_proj_bias": (E, 32)}
    monkeypatch.setitem(globals(), "SHAPES", shapes)
    monkeypatch.setattr(experts, "PIECE", 300)
    whole, pieces = (Group(OptimizerSettings(**settings), torch.float32) for _ in range(2))  # type: ignore[arg-type]
    between = []
    whole.train()
    for step, touched in enumerate(TOUCHED):
        pieces.optimizer.step(
            0, pieces.gradients(step, touched), 1e-2 / (step + 1), 0.5, between=lambda: between.append(None)
        )
    assert_equal(pieces.state(), whole.state())
    assert len(between) > len(TOUCHED)


def test_what_is_known_of_the_smallest_moment_holds() -> None:
    """Elements with ever fewer gradients: a bound that was wrong would make steps as few that must not be."""
    ours, dense = (Group(OptimizerSettings(sparse=sparse), torch.float32) for sparse in ("exact", "none"))
    plan = [[0, 1, 2, 3], [0], [0], [1], [0], [], [], [2], [0, 1], [], [3], [1], [], [], [0, 1, 2, 3]]
    for step, touched in enumerate(plan):
        for group in (ours, dense):
            gradients = group.gradients(step, touched)
            gradients["down_proj"][:, step % 8] *= 1e-5
            group.optimizer.step(0, gradients, 1e-2, 1.0)
    known = ours.optimizer._layers[0].floors
    assert any(floor > 0 for floors in known.values() for floor, _ in floors)
    for a, b in zip(ours.state(), dense.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for name, floors in ours.optimizer._layers[0].floors.items():
        second = ours.optimizer._layers[0].moments[name][1]
        for e, (floor, updates) in enumerate(floors):
            assert second[e].min() >= floor * (0.95 * (1 - 2e-7)) ** (len(plan) - updates)


@pytest.mark.parametrize("settings", [{"sparse": "exact"}, {"sparse": "skip", "experts": "muon"}, {}])
def test_groups_are_stepped_together_as_each_by_itself(settings: Mapping[str, str]) -> None:
    together, alone = ([Group(OptimizerSettings(**settings)) for _ in range(3)] for _ in range(2))  # type: ignore[arg-type]
    for groups in (together, alone):
        groups[2].optimizer.step(0, groups[2].gradients(7, [0, 1, 2, 3]), 1e-2, 1.0)  # has been at it for longer
    for step, touched in enumerate(TOUCHED):
        shares = [touched, touched[:1], touched[1:]]
        wanted = [(g.optimizer, g.gradients(step, share), None) for g, share in zip(together, shares, strict=True)]
        changed = step_together(wanted, 0, 1e-2, 0.5)
        each = [
            g.optimizer.step(0, g.gradients(step, share), 1e-2, 0.5) for g, share in zip(alone, shares, strict=True)
        ]
        assert changed == each
    for a, b in zip(together, alone, strict=True):
        assert_equal(a.state(), b.state())
