"""The dispatch plan against a brute-force reading of the choices."""

from __future__ import annotations

import pytest
import torch

from actors.moe.dispatch import OwnerTable, plan

OWNED = {
    "one actor": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "two": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "uneven and out of order": [[5, 1], [7, 0, 2], [3, 4, 6]],
    "one expert each": [[e] for e in range(8)],
}


@pytest.mark.parametrize("owned", OWNED)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (5, 2), (40, 4), (0, 2)])
def test_every_pair_goes_to_its_owner_once(owned: str, num_tokens: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens * 10 + top_k)
    ids_TK = torch.stack(
        [torch.randperm(8, generator=generator)[:top_k] for _ in range(num_tokens)] or [torch.zeros(top_k)]
    )
    ids_TK = ids_TK[:num_tokens].long()
    shares = plan(ids_TK, OwnerTable.of(OWNED[owned]))
    seen: list[tuple[int, int]] = []
    for share in shares:
        experts = [OWNED[owned][share.actor][slot] for slot, n in enumerate(share.counts_E) for _ in range(n)]
        tokens = share.tokens_T[share.token_P.long()].tolist()
        for pair, expert, token in zip(share.pair_P.tolist(), experts, tokens, strict=True):
            assert (pair // top_k, ids_TK.reshape(-1)[pair]) == (token, expert)
            seen.append((token, expert))
        needed = {t for t in range(num_tokens) if any(e in OWNED[owned][share.actor] for e in ids_TK[t].tolist())}
        assert share.tokens_T.tolist() == sorted(needed), "each token once, and no token more"
    assert sorted(seen) == sorted((t, int(e)) for t in range(num_tokens) for e in ids_TK[t])


def test_actors_without_a_pair_are_left_out() -> None:
    shares = plan(torch.tensor([[0, 1], [1, 2]]), OwnerTable.of(OWNED["two"]))
    assert [share.actor for share in shares] == [0]


def test_a_placement_with_a_gap_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        OwnerTable.of([[0, 1], [1]])
