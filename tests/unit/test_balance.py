"""Balance losses against plain loops and finite differences; the bias, and what is measured of a load."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from actors.moe.balance import (
    BalanceSettings,
    balance_loss,
    bias_update,
    entropy_loss,
    expert_load,
    frequency_loss,
    sequence_loss,
)
from actors.moe.gating import GateContext, GateOutput
from actors.moe.measures import max_vio, sparse_layers, utilisation_std

E, K, B, S = 6, 2, 3, 4


def make(unused: bool = False) -> tuple[Tensor, Tensor]:
    """-> scores_TE in float64, their K best ids_TK, some of them unused."""
    torch.manual_seed(1)
    scores_TE = torch.randn(B * S, E, dtype=torch.float64).mul(2).softmax(dim=1)
    ids_TK = scores_TE.topk(K).indices
    if unused:
        ids_TK[::3, 1] = -1
    return scores_TE, ids_TK


def columns(scores: list[list[float]]) -> list[float]:
    return [sum(row[e] for row in scores) / len(scores) for e in range(E)]


def shares(ids: list[list[int]]) -> list[float]:
    used = [e for row in ids for e in row if e >= 0]
    return [used.count(e) / len(used) for e in range(E)]


def plain_entropy(scores: list[list[float]], ids: list[list[int]]) -> float:
    return sum(p * math.log(p) for p in columns(scores)) + math.log(E)


def plain_frequency(scores: list[list[float]], ids: list[list[int]]) -> float:
    return sum((f * E - 1) * (p * E - 1) for f, p in zip(shares(ids), columns(scores), strict=True))


def plain_sequence(scores: list[list[float]], ids: list[list[int]]) -> float:
    total = 0.0
    for start in range(0, B * S, S):
        rows, chosen = scores[start : start + S], ids[start : start + S]
        total += sum(E * f * p for f, p in zip(shares(chosen), columns(rows), strict=True))
    return total / B


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Loss, Callable[[list[list[float]], list[list[int]]], float], float]] = {
    "entropy": (lambda s, i: entropy_loss(s), plain_entropy, 0.0),
    "frequency": (lambda s, i: frequency_loss(s, i, E), plain_frequency, 0.0),
    "sequence": (lambda s, i: sequence_loss(s, i, S), plain_sequence, 1.0),
}


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients(name: str, unused: bool) -> None:
    loss, plain, even = LOSSES[name]
    scores_TE, ids_TK = make(unused)
    assert loss(scores_TE, ids_TK).item() == pytest.approx(plain(scores_TE.tolist(), ids_TK.tolist()))
    assert torch.autograd.gradcheck(lambda s: loss(s, ids_TK), scores_TE.requires_grad_())
    uniform_TE = torch.full((B * S, E), 1 / E, dtype=torch.float64)
    round_robin_TK = torch.arange(B * S * K).remainder(E).view(-1, K)
    assert loss(uniform_TE, round_robin_TK).item() == pytest.approx(even, abs=1e-12)
    one_TE = torch.eye(E, dtype=torch.float64)[torch.zeros(B * S, dtype=torch.int64)]
    collapsed = loss(one_TE.requires_grad_(), torch.tensor([[0, -1]] * B * S))
    assert collapsed.item() > loss(scores_TE, ids_TK).item()
    collapsed.backward()
    assert one_TE.grad is not None
    assert torch.isfinite(one_TE.grad).all(), "probabilities of 0 have a gradient"


def test_the_printed_frequency_loss_is_met_where_probabilities_are_choices() -> None:
    ids_TK = torch.tensor([[0], [0], [1], [2]])
    chosen_TE = torch.eye(E, dtype=torch.float64)[ids_TK.squeeze(1)]
    printed = sum((f * E - 1) ** 2 for f in shares(ids_TK.tolist()))
    assert frequency_loss(chosen_TE, ids_TK, E).item() == pytest.approx(printed)


@pytest.mark.parametrize("name", LOSSES)
def test_descending_a_loss_evens_the_load(name: str) -> None:
    torch.manual_seed(0)
    x_TD = torch.randn(B * S * 8, 5) + 1
    weight_ED = torch.randn(E, 5, requires_grad=True)
    seen = []
    for _ in range(40):
        scores_TE = (x_TD @ weight_ED.t()).softmax(dim=1)
        ids_TK = scores_TE.topk(K).indices
        seen.append(max_vio(expert_load(ids_TK, E)).item())
        (grad,) = torch.autograd.grad(LOSSES[name][0](scores_TE, ids_TK), weight_ED)
        weight_ED.data -= 0.5 * grad / grad.norm()
    assert min(seen[-5:]) < 0.6 * seen[0]


def test_coefficients_combine() -> None:
    scores_TE, ids_TK = make()
    output, context = GateOutput(ids_TK, scores_TE.gather(1, ids_TK), scores_TE), GateContext(S)
    parts = {"entropy": 0.01, "frequency": 0.02, "sequence": 0.0001}
    expected = sum(c * LOSSES[name][0](scores_TE, ids_TK).item() for name, c in parts.items())
    assert balance_loss(BalanceSettings(**parts), output, context).item() == pytest.approx(expected)
    for name, c in parts.items():
        alone = balance_loss(BalanceSettings(**{name: c}), output, context).item()
        assert alone == pytest.approx(c * LOSSES[name][0](scores_TE, ids_TK).item())
    assert balance_loss(BalanceSettings(), output, context).item() == 0
    nothing = GateOutput(ids_TK[:0], scores_TE[:0, :K], scores_TE[:0])
    assert balance_loss(BalanceSettings(**parts), nothing, context).item() == 0


def test_the_bias_moves_against_the_load() -> None:
    bias_E = torch.tensor([0.5, 0.0, -0.5], requires_grad=True)
    updated = bias_update(bias_E, torch.tensor([7, 4, 1]), 0.001)
    torch.testing.assert_close(updated, torch.tensor([0.499, 0.0, -0.499]))
    assert not updated.requires_grad
    assert bias_E.tolist() == [0.5, 0.0, -0.5], "a new tensor"


def test_the_bias_evens_a_skewed_load() -> None:
    torch.manual_seed(0)
    scores_TE = (torch.rand(600, E) + torch.linspace(0, 1, E)).sigmoid()
    bias_E = torch.zeros(E)
    before = max_vio(expert_load(scores_TE.topk(K).indices, E)).item()
    for _ in range(300):
        load_E = expert_load((scores_TE + bias_E).topk(K).indices, E)
        bias_E = bias_update(bias_E, load_E, 0.001)
    assert before > 1
    assert max_vio(load_E).item() < 0.1


def test_the_bias_rests_at_the_end() -> None:
    settings = BalanceSettings(bias_speed=0.001, bias_share=0.9)
    assert [settings.bias_speed_at(step, 100) for step in (1, 90, 91, 100)] == [0.001, 0.001, 0.0, 0.0]
    assert BalanceSettings().bias_speed_at(1, 100) == 0
    assert BalanceSettings(bias_speed=0.001, bias_share=1.0).bias_speed_at(100, 100) == 0.001


def test_load_counts_what_is_used() -> None:
    assert expert_load(torch.tensor([[0, 2], [2, -1], [5, 0]]), E).tolist() == [2, 0, 2, 0, 0, 1]


@pytest.mark.parametrize(
    ("load", "vio", "std"),
    [
        ([4, 4, 4, 4], 0.0, 0.0),
        ([16, 0, 0, 0], 3.0, math.sqrt(3)),
        ([1, 2, 3, 2], 0.5, math.sqrt(1 / 8)),
        ([0, 0, 0, 0], 0.0, 0.0),
    ],
)
def test_measures(load: list[int], vio: float, std: float) -> None:
    load_LE = torch.tensor([load, [1, 1, 1, 1]])
    assert max_vio(load_LE).tolist() == pytest.approx([vio, 0.0])
    assert utilisation_std(load_LE).tolist() == pytest.approx([std, 0.0])
    assert max_vio(torch.tensor(load)).item() == pytest.approx(vio)
    assert utilisation_std(torch.tensor(load, dtype=torch.float32)).item() == pytest.approx(std)


@pytest.mark.parametrize(
    ("load", "tokens", "expected"),
    [
        ([64, 64, 64, 64], 128, None),
        ([0, 0, 0, 0], 0, None),
        ([32, 32, 32, 32], 64, (4, 32, 128, 128)),
        ([100, 50, 25, 81], 128, (2, 25, 128, 328)),
        ([200, 56, 0, 0], 128, (3, 0, 128, None)),
    ],
)
def test_too_few_tokens_an_expert(load: list[int], tokens: int, expected: tuple[int, ...] | None) -> None:
    found = sparse_layers([load], tokens)
    if expected is None:
        assert found == []
        return
    (warning,) = found
    assert (warning.num_sparse, warning.smallest_load, warning.tokens_if_even, warning.tokens_as_routed) == expected
    assert f"{expected[2]} tokens" in str(warning)
    grown = [math.ceil(n * warning.tokens_if_even / tokens) for n in [sum(load) / len(load)] * len(load)]
    assert sparse_layers([grown], warning.tokens_if_even) == []
