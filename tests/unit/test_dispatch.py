"""The dispatch plan against a brute-force reading of the choices, where every expert has one holder."""

from __future__ import annotations

import pytest
import torch

from actors.errors import StepAborted
from actors.moe.dispatch import HolderTable, plan

HELD = {
    "one actor": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "two": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "uneven and out of order": [[5, 1], [7, 0, 2], [3, 4, 6]],
    "one without any": [[0, 1, 2, 3], [], [4, 5, 6, 7]],
    "one expert each": [[e] for e in range(8)],
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (5, 2), (40, 4), (0, 2)])
def test_every_pair_goes_to_its_holder_once(held: str, num_tokens: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens * 10 + top_k)
    ids_TK = torch.stack(
        [torch.randperm(8, generator=generator)[:top_k] for _ in range(num_tokens)] or [torch.zeros(top_k)]
    )
    ids_TK = ids_TK[:num_tokens].long()
    shares = plan(ids_TK, HolderTable.of(HELD[held], 8))
    seen: list[tuple[int, int]] = []
    for share in shares:
        experts = [HELD[held][share.actor][slot] for slot, n in enumerate(share.counts_E) for _ in range(n)]
        tokens = share.tokens_T[share.token_P.long()].tolist()
        for pair, expert, token in zip(share.pair_P.tolist(), experts, tokens, strict=True):
            assert (pair // top_k, int(ids_TK.reshape(-1)[pair])) == (token, expert)
            seen.append((token, expert))
        needed = {t for t in range(num_tokens) if any(e in HELD[held][share.actor] for e in ids_TK[t].tolist())}
        assert share.tokens_T.tolist() == sorted(needed), "each token once, and no token more"
    assert sorted(seen) == sorted((t, int(e)) for t in range(num_tokens) for e in ids_TK[t])


def test_actors_without_a_pair_are_left_out() -> None:
    shares = plan(torch.tensor([[0, 1], [1, 2]]), HolderTable.of(HELD["two"], 8))
    assert [share.actor for share in shares] == [0]


def test_unused_places_are_in_no_share() -> None:
    (share,) = plan(torch.tensor([[-1, 5], [-1, -1], [6, -1]]), HolderTable.of(HELD["two"], 8))
    assert (share.tokens_T.tolist(), share.pair_P.tolist(), share.counts_E) == ([0, 2], [1, 4], [0, 1, 1, 0])


@pytest.mark.parametrize("held", [[[0, 1], [3]], [[0, 1], [3, 1]], [[], []]], ids=["alone", "copies", "nobody"])
def test_a_needed_expert_that_nobody_holds_aborts_by_name(held: list[list[int]]) -> None:
    holders = HolderTable.of(held, 5)
    assert {2, 4} <= set(holders.missing)
    with pytest.raises(StepAborted, match=r"expert .*2, .*4$"):
        plan(torch.tensor([[0, 4], [2, 1], [2, -1]]), holders)


def test_a_missing_expert_that_nobody_needs_is_no_matter() -> None:
    holders = HolderTable.of([[0, 1], [3]], 5)
    assert [s.counts_E for s in plan(torch.tensor([[3, 0], [1, -1]]), holders)] == [[1, 1], [1]]


def test_an_actor_that_holds_an_expert_twice_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="actor 1"):
        HolderTable.of([[0, 1], [1, 1]], 2)
