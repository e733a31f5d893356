"""The row of `bench decode` on a GPU, as far as a CPU can show it."""

from __future__ import annotations

from cluster.bench.decode import Extent, bench_generate
from tests.families import FAMILIES


def test_streams_are_held_against_generate() -> None:
    special = {f"{name}_token_id": None for name in ("bos", "eos", "pad")}
    values = {"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"], **special}
    row = bench_generate(Extent(num_streams=3, prompt_length=4, num_tokens=3), 1, values, device="cpu")
    assert (row.case, row.peer, row.unit, row.rounds) == ("generate_b3", "generate", "tokens/s", 1)
    assert min(row.value, row.peer_value, row.ratio) > 0
