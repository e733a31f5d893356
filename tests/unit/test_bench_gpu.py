"""What the GPU cases of the benchmarks measure, on a small model here: the two sides do the same work."""

from __future__ import annotations

import pytest
import torch

from cluster.bench.kernels import NUM_EXPERTS, NUM_ROWS, kernel_rows, zipf_counts
from cluster.bench.one_gpu import MODEL, Extent, one_gpu_rows, train_both

TINY = {
    **MODEL,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("in_flight", [1, 2])
def test_both_sides_train_the_same_model(in_flight: int) -> None:
    row = train_both("one_gpu_3b", Extent(TINY, 4, 2, 16, "cpu", "cpu", "float32", in_flight), rounds=2)
    assert row.case == "one_gpu_3b"
    assert row.rounds == 2
    assert row.loss_difference < 1e-4
    assert row.num_parameters > 0


def test_the_model_has_3_billion_parameters() -> None:
    expert = 3 * int(str(MODEL["hidden_size"])) * int(str(MODEL["moe_intermediate_size"]))
    layers = int(str(MODEL["num_hidden_layers"])) - int(str(MODEL["first_k_dense_replace"]))
    assert 2.7e9 < layers * (64 + 2) * expert < 3.1e9


def test_a_zipf_load_has_all_rows() -> None:
    counts_E = zipf_counts()
    assert len(counts_E) == NUM_EXPERTS
    assert sum(counts_E) == NUM_ROWS
    assert counts_E == sorted(counts_E, reverse=True)
    assert counts_E[0] > 7 * counts_E[7] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are measured")
def test_without_a_gpu_they_are_left_out() -> None:
    assert not kernel_rows(5)
    assert not one_gpu_rows(5)
