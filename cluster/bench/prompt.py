"""What a stream that decodes notices of a long prompt that comes in: `prompt_gap`, the longest time between two of its
tokens meanwhile, with the prompt in chunks against the whole prompt at once. `prompt_first_token`: what that costs the
prompt. The experts are in two other processes behind socket links; streams decode in turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

from actors.errors import MoeClusterError
from actors.router.router import Router
from actors.trunk.model import ModelSource
from actors.values import Sampling
from cluster.bench.hosts import TIMEOUT_S, beside_hosts
from cluster.bench.result import Row, time_row
from cluster.config import ClusterConfig

PROMPT_TOKENS = 2000
POSITIONS = 4096
"""Of the model, at least."""
TOKENS_BEFORE = 4


@dataclass(frozen=True)
class Seen:
    gap_s: float
    first_token_s: float


def bench_prompt(config: ClusterConfig, rounds: int, num_tokens: int = PROMPT_TOKENS) -> list[Row]:
    source = _source(config)
    with beside_hosts(source) as roster, ExitStack() as stack:
        routers = {}
        for name, chunk in (("chunks", config.router.prompt_chunk), ("whole", 0)):
            routers[name] = Router(source, roster, decode_batch=1, prompt_chunk=chunk, timeout_s=TIMEOUT_S)
            stack.callback(routers[name].close)
        vocab_size = routers["whole"].serving.vocab_size
        prompt = torch.randint(3, vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        seen: dict[str, list[Seen]] = {name: [] for name in routers}
        for number in range(rounds + 1):
            for name, router in routers.items():
                found = beside_a_stream(router, prompt)
                if number:  # the first round warms up
                    seen[name].append(found)
    return [
        _row("prompt_gap", [s.gap_s for s in seen["chunks"]], [s.gap_s for s in seen["whole"]]),
        _row("prompt_first_token", [s.first_token_s for s in seen["chunks"]], [s.first_token_s for s in seen["whole"]]),
    ]


def beside_a_stream(router: Router, prompt: Sequence[int]) -> Seen:
    """One prompt and its first token, while another stream decodes."""
    with _decoding(router, prompt[:8]) as times:
        begun = time.perf_counter()
        next(router.serving.generate(prompt, Sampling(max_tokens=1), timeout_s=TIMEOUT_S))
        ended = time.perf_counter()
        _until(lambda: times[-1] > ended)
    meanwhile = [b - a for a, b in pairwise(times) if b > begun and a < ended]
    return Seen(max(meanwhile), ended - begun)


@contextmanager
def _decoding(router: Router, prompt: Sequence[int]) -> Iterator[list[float]]:
    """-> when the tokens of a stream came, a list that grows."""
    times: list[float] = []
    over = threading.Event()

    def read() -> None:
        budget = router.serving.max_positions - len(prompt)
        for _ in router.serving.generate(prompt, Sampling(max_tokens=budget), timeout_s=TIMEOUT_S):
            times.append(time.perf_counter())
            if over.is_set():
                return

    thread = threading.Thread(target=read, name="decoding-stream", daemon=True)
    thread.start()
    try:
        _until(lambda: len(times) > TOKENS_BEFORE)
        yield times
    finally:
        over.set()
        thread.join(TIMEOUT_S)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() >= deadline:
            raise MoeClusterError("a stream did not go on beside the prompt")
        time.sleep(0.001)


def _source(config: ClusterConfig) -> ModelSource:
    """The config's model, with room for the prompt where it is one from scratch."""
    if config.model.path:
        return ModelSource(config.model.path)
    values = dict(config.model.values or {})
    positions = max(POSITIONS, int(values.get("max_position_embeddings", 0)))
    return ModelSource(values={**values, "eos_token_id": None, "max_position_embeddings": positions})


def _row(case: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    return time_row(case, "ms", 1e3, ours, "the whole prompt at once", theirs)
