"""Which holder computes which pairs, where experts have several: against the rules in other words, and the optimum."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.errors import StepAborted
from actors.moe.dispatch import AWAY, MIN_PART, HolderTable, Share, plan


@dataclass(frozen=True)
class Layer:
    """One batch's choices and who holds what."""

    held: list[list[int]]
    near: list[bool]
    ids_TK: Tensor
    backlog_A: list[float]
    turn: int

    @property
    def holders(self) -> HolderTable:
        return HolderTable.of(self.held, 1 + max(e for experts in self.held for e in experts), self.near)

    def plan(self) -> list[Share]:
        return plan(self.ids_TK, self.holders, self.backlog_A, self.turn)


@st.composite
def layers(draw: st.DrawFn, max_tokens: int = 200) -> Layer:
    rng = random.Random(draw(st.integers(0, 10**6)))
    num_actors, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    num_tokens, top_k = draw(st.integers(0, max_tokens)), draw(st.integers(1, min(4, num_experts)))
    max_copies = draw(st.integers(1, num_actors))
    held: list[list[int]] = [[] for _ in range(num_actors)]
    for expert in rng.sample(range(num_experts), num_experts):
        for actor in rng.sample(range(num_actors), rng.randint(1, max_copies)):
            held[actor].append(expert)
    weight_E = torch.tensor([1 / (1 + expert) for expert in range(num_experts)])
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    if num_tokens:
        ids_TK = torch.multinomial(weight_E.expand(num_tokens, -1), top_k, generator=generator)
        ids_TK[torch.rand(ids_TK.shape, generator=generator) < draw(st.sampled_from([0, 0.3]))] = -1
    else:
        ids_TK = torch.zeros(0, top_k, dtype=torch.int64)
    return Layer(
        held,
        [rng.random() < 0.5 for _ in range(num_actors)],
        ids_TK,
        draw(st.sampled_from([[0.0] * num_actors, [rng.choice([0, 7.5, 40, 1000]) for _ in range(num_actors)]])),
        draw(st.integers(0, 3)),
    )


def parts_of(shares: Sequence[Share], held: Sequence[Sequence[int]]) -> dict[int, dict[int, list[int]]]:
    """Expert -> actor -> its pairs, read from counts and order."""
    parts: dict[int, dict[int, list[int]]] = {}
    for share in shares:
        assert len(share.counts_E) == len(held[share.actor])
        assert sum(share.counts_E) == len(share.pair_P) == len(share.token_P)
        pairs = iter(share.pair_P.tolist())
        for expert, count in zip(held[share.actor], share.counts_E, strict=True):
            if count:
                parts.setdefault(expert, {})[share.actor] = [next(pairs) for _ in range(count)]
    return parts


def loads(shares: Sequence[Share], num_actors: int) -> list[int]:
    """Pairs of each actor."""
    load_A = [0] * num_actors
    for share in shares:
        load_A[share.actor] += len(share.pair_P)
    return load_A


@settings(deadline=None)
@given(layers())
def test_every_pair_is_computed_once_by_a_holder_in_blocks_of_token_order(layer: Layer) -> None:
    ids_N = layer.ids_TK.reshape(-1).tolist()
    shares = layer.plan()
    assert [s.actor for s in shares] == sorted({s.actor for s in shares})
    for share in shares:
        tokens = [pair // layer.ids_TK.shape[1] for pair in share.pair_P.tolist()]
        assert share.tokens_T[share.token_P.long()].tolist() == tokens
        assert share.tokens_T.tolist() == sorted(set(tokens)), "each token once, and no token more"
    for expert, part_of_actor in parts_of(shares, layer.held).items():
        in_actor_order = [pair for actor in sorted(part_of_actor) for pair in part_of_actor[actor]]
        assert in_actor_order == [pair for pair, e in enumerate(ids_N) if e == expert]
        assert len(part_of_actor) == 1 or min(map(len, part_of_actor.values())) >= MIN_PART
    assert sum(loads(shares, len(layer.held))) == sum(e >= 0 for e in ids_N)


@settings(deadline=None)
@given(layers())
def test_equal_inputs_give_equal_shares(layer: Layer) -> None:
    for a, b in zip(layer.plan(), layer.plan(), strict=True):
        assert (a.actor, a.counts_E) == (b.actor, b.counts_E)
        for x, y in ((a.tokens_T, b.tokens_T), (a.token_P, b.token_P), (a.pair_P, b.pair_P)):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


@settings(deadline=None)
@given(st.integers(1, 300), st.lists(st.integers(0, 200), min_size=1, max_size=5))
def test_one_expert_fills_its_holders_like_water(count: int, backlog_A: list[int]) -> None:
    num_actors = len(backlog_A)
    shares = plan(torch.zeros(count, 1, dtype=torch.int64), HolderTable.of([[0]] * num_actors, 1), backlog_A)
    part_A = loads(shares, num_actors)
    used = [a for a in range(num_actors) if part_A[a]]
    level_A = [backlog + part for backlog, part in zip(backlog_A, part_A, strict=True)]
    assert max(level_A[a] for a in used) - min(level_A[a] for a in used) <= len(used), "equal but for whole pairs"
    for idle in set(range(num_actors)) - set(used):
        level = (count + sum(backlog_A[a] for a in [*used, idle])) / (len(used) + 1)
        assert level - backlog_A[idle] < MIN_PART, "one more would have got too small a part"
        assert backlog_A[idle] >= max(backlog_A[a] for a in used)


def optimum(counts_E: Sequence[int], holders_E: Sequence[set[int]], num_actors: int) -> float:
    """Least possible load of the fullest actor with pairs as fine as water, by the cut: experts that only actors of a
    set hold stay in the set, whichever set it is."""
    sets = [{a for a in range(num_actors) if mask >> a & 1} for mask in range(1, 2**num_actors)]
    return max(sum(n for n, h in zip(counts_E, holders_E, strict=True) if h <= chosen) / len(chosen) for chosen in sets)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(4, 24), st.sampled_from([0.5, 1.0, 1.5]))
def test_two_copies_come_near_the_best_balance_there_is(
    seed: int, num_actors: int, num_experts: int, zipf: float
) -> None:
    rng = random.Random(seed)
    holders_E = [set(rng.sample(range(num_actors), rng.choice([1, 2, 2]))) for _ in range(num_experts)]
    held = [[e for e in range(num_experts) if a in holders_E[e]] for a in range(num_actors)]
    counts_E = [int(1000 / (1 + rank) ** zipf) for rank in range(num_experts)]
    rng.shuffle(counts_E)
    ids_N = torch.tensor([e for e, count in enumerate(counts_E) for _ in range(count)])
    load_A = loads(plan(ids_N[:, None], HolderTable.of(held, num_experts)), num_actors)
    assert max(load_A) <= 1.05 * optimum(counts_E, holders_E, num_actors) + 2 * MIN_PART


def all_on_all(num_actors: int, num_experts: int, near: Sequence[bool] | None = None) -> HolderTable:
    return HolderTable.of([list(range(num_experts))] * num_actors, num_experts, near)


def test_a_small_batch_stays_in_the_routers_node() -> None:
    ids_TK = torch.tensor([[0, 1, 2, 3], [3, 4, 5, 6]])
    assert loads(plan(ids_TK, all_on_all(3, 8, [False, True, False])), 3) == [0, 8, 0]


def test_the_own_node_takes_what_balances_the_single_holders_of_others() -> None:
    """Expert 1 is held far only, expert 0 here and there, as often: here takes all of it, whichever number it has."""
    ids_TK = torch.tensor([[0, 1]] * 200)
    assert loads(plan(ids_TK, HolderTable.of([[0, 1], [0]], 2, [False, True])), 2) == [200, 200]
    assert loads(plan(ids_TK, HolderTable.of([[0], [0, 1]], 2, [True, False])), 2) == [200, 200]


def test_a_far_actor_gets_less_but_does_not_idle() -> None:
    ids_TK = torch.arange(4096).remainder(8)[:, None]
    far, here = loads(plan(ids_TK, all_on_all(2, 8, [False, True])), 2)
    assert here - far == pytest.approx(AWAY * 4096 / 2, abs=MIN_PART)


@pytest.mark.parametrize("backlog", [10_000, math.inf])
@pytest.mark.parametrize("near", [[True, True, True], [True, False, False]])
def test_an_actor_with_a_large_backlog_gets_only_what_nobody_else_holds(backlog: float, near: list[bool]) -> None:
    holders = HolderTable.of([[0, 1, 2], [1, 2], [2, 1]], 3, near)
    shares = plan(torch.tensor([[0, 1, 2]] * 300), holders, [backlog, 0, 0])
    assert parts_of(shares, [[0, 1, 2], [1, 2], [2, 1]])[0].keys() == {0}
    assert loads(shares, 3) == [300, 300, 300]


def test_a_handful_of_pairs_is_not_split() -> None:
    shares = plan(torch.tensor([[0, 1]] * (2 * MIN_PART - 1)), all_on_all(2, 2))
    assert sorted(s.counts_E for s in shares) == [[0, 2 * MIN_PART - 1], [2 * MIN_PART - 1, 0]]
    shares = plan(torch.tensor([[0]] * (2 * MIN_PART)), all_on_all(2, 1))
    assert [s.counts_E for s in shares] == [[MIN_PART], [MIN_PART]]


def test_experts_without_a_choice_come_first_then_the_largest() -> None:
    small = torch.tensor([0] * 10 + [1] * 12)[:, None]
    assert loads(plan(small, HolderTable.of([[0, 1], [1]], 2)), 2) == [10, 12]
    small = torch.tensor([0] * 4 + [1] * 6 + [2] * 10)[:, None]
    assert loads(plan(small, all_on_all(2, 3)), 2) == [10, 10]


def test_of_equals_the_near_one_is_taken() -> None:
    holders = all_on_all(2, 1, [False, True])
    assert [plan(torch.tensor([[0]]), holders, [0, MIN_PART + more])[0].actor for more in (-1, 0, 1)] == [1, 1, 0]


def test_routers_of_different_turns_start_with_different_actors() -> None:
    holders = all_on_all(4, 2, [True, True, False, True])
    first = [plan(torch.tensor([[0]]), holders, turn=turn)[0].actor for turn in range(4)]
    assert first == [0, 1, 3, 3]


def test_without_an_actor_the_other_holders_serve_with_their_slots() -> None:
    holders = HolderTable.of([[0, 1], [3, 1, 0], [2]], 4)
    left = holders.without([0])
    assert (holders.has_copies, left.has_copies) == (True, False)
    assert (left.num_slots, left.missing) == ((2, 3, 1), ())
    shares = plan(torch.tensor([[0, 1], [2, 0]]), left)
    assert [(s.actor, s.counts_E) for s in shares] == [(1, [0, 1, 2]), (2, [1])]
    assert holders.without([0, 1]).missing == (0, 1, 3)
    with pytest.raises(StepAborted, match=r"expert 1$"):
        plan(torch.tensor([[1, 2]]), left.without([1]))


def test_without_keeps_the_copies_that_are_left() -> None:
    holders = all_on_all(3, 2).without({1})
    assert holders.has_copies
    assert loads(plan(torch.tensor([[0, 1]] * 100), holders), 3) == [100, 0, 100]
