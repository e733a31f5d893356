"""The plan as it is made where the choices are on a GPU, here on a CPU: the shares of the plan on the host."""

from __future__ import annotations

import pytest
import torch

from actors.errors import StepAborted
from actors.moe.balance import expert_load
from actors.moe.device_dispatch import load_of, plan_there, to_host
from actors.moe.dispatch import HolderTable, plan
from tests.unit.test_dispatch import HELD

COPIES = {
    "all everywhere": [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]],
    "some twice": [[0, 1, 2, 3], [3, 4, 5], [5, 6, 7, 0]],
    "one without any": [[0, 1, 2, 3, 4], [], [4, 5, 6, 7]],
}


def choices(num_tokens: int, top_k: int, unused: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens * 10 + top_k)
    popular = torch.linspace(1, 4, 8)  # some experts get many more pairs than others
    ids_TK = torch.multinomial(popular.expand(max(1, num_tokens), 8), top_k, generator=generator)[:num_tokens]
    return ids_TK.masked_fill(torch.rand(ids_TK.shape, generator=generator) < unused, -1)


@pytest.mark.parametrize("held", [*HELD.values(), *COPIES.values()], ids=[*HELD, *COPIES])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (5, 2), (400, 4), (0, 2)])
@pytest.mark.parametrize("unused", [0.0, 0.4, 1.0])
def test_shares_are_those_of_the_host(held: list[list[int]], num_tokens: int, top_k: int, unused: float) -> None:
    holders = HolderTable.of(held, 8, near=[actor != 1 for actor in range(len(held))])
    ids_TK = choices(num_tokens, top_k, unused)
    backlog_A = [10.0 * actor for actor in range(len(held))]
    for turn in (0, 1):
        expected = plan(ids_TK, holders, backlog_A, turn)
        got, is_sound = plan_there(ids_TK, holders, backlog_A, turn)
        assert is_sound
        assert [(s.actor, s.counts_E) for s in got] == [(s.actor, s.counts_E) for s in expected]
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine.tokens_T, theirs.tokens_T)
            assert torch.equal(mine.token_P, theirs.token_P)
            assert mine.token_P.dtype == theirs.token_P.dtype
            assert torch.equal(mine.pair_P, theirs.pair_P)
        assert torch.equal(load_of(got, holders), expert_load(ids_TK, 8))


def test_what_is_brought_along_is_told() -> None:
    holders = HolderTable.of(HELD["two"], 8)
    for sound in (True, False):
        assert plan_there(choices(5, 2), holders, sound=torch.tensor(sound))[1] is sound
        assert plan_there(choices(0, 2), holders, sound=torch.tensor(sound))[1] is sound


def test_a_needed_expert_that_nobody_holds_aborts() -> None:
    holders = HolderTable.of([[0, 1], [3]], 5)
    with pytest.raises(StepAborted, match=r"expert .*2, .*4$"):
        plan_there(torch.tensor([[0, 4], [2, 1], [2, -1]]), holders)
    shares, _ = plan_there(torch.tensor([[3, 0], [1, -1]]), holders)
    assert [share.counts_E for share in shares] == [[1, 1], [1]]


def test_numbers_come_to_the_host() -> None:
    assert to_host(torch.tensor([3, 0, 5])) == [3, 0, 5]
