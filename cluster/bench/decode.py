"""Tokens a second of many streams.

`generate_b32`, on a GPU: 32 streams of a router whose experts are in its own process, against transformers' `generate`
with the same 32 prompts as one batch. `generate_b32_two_gpus`: the same with the experts in a process of their own on a
second GPU. `decode_16_streams`, without one: 16 streams that share forwards against the same
in turns, the experts in two other processes behind socket links. There too what a long prompt costs a stream that
decodes, see `cluster.bench.prompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.errors import MoeClusterError
from actors.router.router import Router
from actors.trunk.config import config_of
from actors.trunk.source import ModelSource
from actors.values import Sampling
from cluster.bench.hosts import TIMEOUT_S, apart, beside_hosts, in_process
from cluster.bench.one_gpu import MODEL as TRAINED
from cluster.bench.prompt import bench_prompt
from cluster.bench.result import Report, Row, interleaved, rate_row
from cluster.config import ClusterConfig

MODEL: dict[str, Any] = {
    **TRAINED,
    "intermediate_size": 8192,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""That of `one_gpu`, but for its first layer, which has experts too: 3.6 B parameters."""
WARMUPS = 4
"""Until every shape of batch that comes by, also those of its beginning, has been captured."""


@dataclass(frozen=True)
class Extent:
    num_streams: int
    prompt_length: int
    num_tokens: int

    def prompts(self, vocab_size: int) -> Tensor:
        """Random ids, one row a stream."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, vocab_size, (self.num_streams, self.prompt_length), generator=generator)


ON_GPU, ON_CPU = Extent(32, 128, 256), Extent(16, 16, 24)


def bench_decode(config: ClusterConfig, *, rounds: int) -> Report:
    if torch.cuda.is_available():
        rows = [bench_generate(ON_GPU, rounds)]
        if torch.cuda.device_count() > 1:
            torch.cuda.empty_cache()
            rows.append(bench_generate(ON_GPU, rounds, expert_device="cuda:1"))
        return Report("decode", rows)
    return Report("decode", [bench_streams(config, ON_CPU, rounds), *bench_prompt(config, rounds)])


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def bench_generate(
    extent: Extent, rounds: int, values: dict[str, Any] = MODEL, device: str = "cuda", expert_device: str = ""
) -> Row:
    """`expert_device`: of a process that has the experts; empty: they are in this one, on `device`."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source = ModelSource(values=values, dtype=str(dtype).removeprefix("torch."))
    prompts_BS = extent.prompts(values["vocab_size"])
    with ExitStack() as stack:
        if expert_device:
            router = stack.enter_context(apart(source, extent.num_streams, expert_device))
        else:
            router = stack.enter_context(in_process(source, extent.num_streams, device))
        candidates: dict[str, Callable[[], None]] = {
            "ours": partial(stream_all, router, prompts_BS, extent.num_tokens),
            "theirs": _plain(source, dtype, prompts_BS, extent.num_tokens, device),
        }
        seconds = interleaved(candidates, rounds, warmups=WARMUPS)
    tokens = extent.num_streams * extent.num_tokens
    case = f"generate_b{extent.num_streams}" + ("_two_gpus" if expert_device else "")
    return rate_row(case, "tokens/s", tokens, seconds["ours"], "generate", seconds["theirs"])


def _plain(
    source: ModelSource, dtype: torch.dtype, prompts_BS: Tensor, num_tokens: int, device: str
) -> Callable[[], None]:
    """transformers on weights that are drawn as ours are, though not the same."""
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config_of(source), dtype=dtype).eval()
    prompts_BS = prompts_BS.to(device)

    def run() -> None:
        out = model.generate(
            prompts_BS,
            attention_mask=torch.ones_like(prompts_BS),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
        )
        _check(out.shape[1] == prompts_BS.shape[1] + num_tokens)

    return run


# -- streams ----------------------------------------------------------------------------------------------------------


def stream_all(router: Router, prompts_BS: Tensor, num_tokens: int) -> None:
    """Every prompt at once, each read by a thread of its own."""

    def one(prompt: Sequence[int]) -> int:
        events = router.serving.generate(prompt, Sampling(max_tokens=num_tokens), timeout_s=TIMEOUT_S)
        return sum(1 for _ in events)

    with ThreadPoolExecutor(len(prompts_BS)) as pool:
        _check(set(pool.map(one, prompts_BS.tolist())) == {num_tokens})


def _check(is_complete: bool) -> None:
    if not is_complete:
        raise MoeClusterError("a stream ended before its last token")


# -- without a GPU ----------------------------------------------------------------------------------------------------


def bench_streams(config: ClusterConfig, extent: Extent, rounds: int) -> Row:
    values = {**dict(config.model.values or {}), "eos_token_id": None}
    source = ModelSource(config.model.path, None if config.model.path else values)
    prompts_BS = extent.prompts(int(config_of(source).get_text_config().vocab_size))
    with beside_hosts(source) as roster, ExitStack() as stack:
        routers = {}
        for batch in (extent.num_streams, 1):
            routers[batch] = Router(
                source,
                roster,
                max_sessions=extent.num_streams,
                decode_batch=batch,
                timeout_s=TIMEOUT_S,
            )
            stack.callback(routers[batch].close)
        candidates: dict[str, Callable[[], None]] = {
            name: partial(stream_all, routers[batch], prompts_BS, extent.num_tokens)
            for name, batch in (("together", extent.num_streams), ("in turns", 1))
        }
        seconds = interleaved(candidates, rounds)
    tokens = extent.num_streams * extent.num_tokens
    case = f"decode_{extent.num_streams}_streams"
    return rate_row(case, "tokens/s", tokens, seconds["together"], "the same in turns", seconds["in turns"])
