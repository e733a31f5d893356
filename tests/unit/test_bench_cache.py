"""`bench cache` at a tiny size: its choices, and that every host is asked the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.bench import cache
from cluster.bench.cache import SHARES, TOP_K, Shape, bench_cache, zipf_choices
from cluster.bench.zipf import zipf_share
from cluster.config import ClusterConfig, ModelConfig

TINY = Shape(32, 16, "float32", 4, 2, 16, 1)


def test_choices_are_different_experts_by_their_shares() -> None:
    share_E = zipf_share(8)
    chosen = zipf_choices(np.random.default_rng(1), share_E, 4000)
    assert sum(chosen.counts_E) == len(chosen.token_P) == 4000 * TOP_K
    assert chosen.counts_E == sorted(chosen.counts_E, reverse=True)
    assert torch.equal(chosen.token_P.bincount(), torch.full((4000,), TOP_K))
    for of_expert in chosen.token_P.split(chosen.counts_E):
        assert len(of_expert.unique()) == len(of_expert), "a token takes an expert once"


@pytest.mark.parametrize("rounds", [1, 2])
def test_rows_of_a_tiny_run(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cache.SHAPES, "cpu", TINY)
    rows = {row.case: row for row in bench_cache(ClusterConfig(ModelConfig(path="unused")), rounds=rounds).rows}
    for share in SHARES:
        for what in ("serve", "train"):
            case = f"{what}_{share:.0%}"
            assert rows[case].value > 0
            assert rows[case].rounds == rounds
            assert 0 <= rows[f"{case}_hits"].value <= 100
            assert rows[f"{case}_memory"].ratio >= 0.99 / share
    weights_mb = 4 * 32 * 3 * 32 * 16 * 4 / 1e6
    assert rows["serve_25%_memory"].peer_value == pytest.approx(weights_mb)
    assert rows["train_25%_memory"].value == pytest.approx(weights_mb / 4)
    assert rows["train_100%_hits"].value > rows["train_25%_hits"].value
