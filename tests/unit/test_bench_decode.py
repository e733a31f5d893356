"""Rows of `bench decode`: that of a GPU as far as a CPU can show it, and those of a prompt beside a stream."""

from __future__ import annotations

from actors.trunk.model import ModelSource
from cluster.bench.decode import Extent, bench_generate
from cluster.bench.hosts import in_process
from cluster.bench.prompt import beside_a_stream
from tests.families import FAMILIES


def test_streams_are_held_against_generate() -> None:
    special = {f"{name}_token_id": None for name in ("bos", "eos", "pad")}
    values = {"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"], **special}
    row = bench_generate(Extent(num_streams=3, prompt_length=4, num_tokens=3), 1, values, device="cpu")
    assert (row.case, row.peer, row.unit, row.rounds) == ("generate_b3", "generate", "tokens/s", 1)
    assert min(row.value, row.peer_value, row.ratio) > 0


def test_a_prompt_beside_a_stream() -> None:
    values = {
        "model_type": "deepseek_v3",
        **FAMILIES["deepseek_v3"],
        "eos_token_id": None,
        "max_position_embeddings": 4096,
    }
    with in_process(ModelSource(values=values), 2, "cpu", prompt_chunk=16) as router:
        seen = beside_a_stream(router, list(range(3, 60)))
    assert seen.gap_s > 0
    assert seen.first_token_s > 0
