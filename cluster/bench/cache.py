"""`serve_*`, `train_*`: an expert host whose device has room for a share of its groups, against one with all there.

Both get the same messages, in this process. Experts are chosen by a Zipf law, in each layer with other experts first:
`serve` is a few tokens at a time through all layers, as streams decode; `train` is steps with backward and update.
Behind a CPU are files (in a temporary directory if none is configured; its page cache holds them as long as there is
memory); behind a GPU is host memory, or files where a directory is configured.

    T tokens   E experts   K choices of a token
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.expert.host import ExpertHost
from actors.moe.cache import CacheSettings
from actors.optim import OptimizerSettings
from actors.transport.message import Message, raise_if_error
from actors.trunk.model import DTYPES, ModelSource
from cluster.bench.result import Report, Row, interleaved, rate_row
from cluster.bench.zipf import Floats, zipf_share
from cluster.config import ClusterConfig

SHARES = (0.25, 0.5, 0.75, 1.0)
NUM_GROUPS, GROUP_SIZE, TOP_K, NUM_LAYERS = 16, 2, 2, 4
EXPONENT = 1.0


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    width: int
    """Of an expert, inside."""
    dtype: str
    serve_tokens: int
    serve_passes: int
    """A round."""
    train_tokens: int
    train_steps: int


SHAPES = {
    "cpu": Shape(256, 256, "float32", 8, 20, 512, 2),
    "cuda": Shape(2048, 1024, "bfloat16", 8, 20, 4096, 2),
}


def bench_cache(config: ClusterConfig, *, rounds: int) -> Report:
    device = config.experts.device
    shape = SHAPES[device]
    torch.set_num_threads(config.experts.threads)
    with tempfile.TemporaryDirectory() as directory:
        files = config.experts.cache_dir or (directory if device == "cpu" else "")
        with _hosts(shape, device, files) as hosts:
            rows = [*_timed("serve", hosts, shape, rounds), *_timed("train", hosts, shape, rounds)]
    return Report("cache", rows)


@dataclass(frozen=True)
class Choices:
    """Of one layer: P = T * K pairs, sorted by expert."""

    token_P: Tensor
    counts_E: list[int]


@contextmanager
def _hosts(shape: Shape, device: str, files: str) -> Iterator[dict[str, ExpertHost]]:
    """One that holds all on the device, and one for each share."""
    source = ModelSource(values=_model(shape), dtype=shape.dtype)
    caches = {"all": None, **{f"{s:.0%}": CacheSettings(round(s * NUM_GROUPS), files) for s in SHARES}}
    groups = range(NUM_GROUPS)
    hosts = {n: ExpertHost(n, source, groups, group_size=GROUP_SIZE, device=device, cache=c) for n, c in caches.items()}
    try:
        yield hosts
    finally:
        for host in hosts.values():
            host.close()


def _model(shape: Shape) -> dict[str, Any]:
    """The smallest trunk around the experts."""
    return {
        "model_type": "mixtral",
        "vocab_size": 260,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.width,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_local_experts": NUM_GROUPS * GROUP_SIZE,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 64,
    }


def _timed(what: str, hosts: dict[str, ExpertHost], shape: Shape, rounds: int) -> Iterator[Row]:
    work = _Work(shape, what == "train")
    runs = {name: _Run(host, work) for name, host in hosts.items()}
    seconds = interleaved({**runs}, rounds)
    whole_mb = hosts["all"].holdings.num_bytes() / 1e6
    for share in SHARES:
        name = f"{share:.0%}"
        case, counters = f"{what}_{name}", runs[name].counters()
        yield rate_row(case, "tokens/s", work.tokens_a_round, seconds[name], "all on the device", seconds["all"])
        hits = counters["hits"] / (counters["hits"] + counters["misses"])
        yield Row(f"{case}_hits", 100 * hits, "%", "share of the groups", 100 * share, hits / share, rounds)
        device_mb = counters["device_bytes"] / 1e6
        yield Row(f"{case}_memory", device_mb, "MB", "all on the device", whole_mb, whole_mb / device_mb, rounds)


def zipf_choices(random: np.random.Generator, share_E: Floats, num_tokens: int) -> Choices:
    """TOP_K different experts of each token, drawn by their shares: the largest of log(share) + Gumbel noise."""
    noise_TE = random.gumbel(size=(num_tokens, len(share_E)))
    ids_N = np.argsort(np.log(share_E) + noise_TE, axis=1)[:, -TOP_K:].reshape(-1)
    token_P = torch.from_numpy(np.argsort(ids_N, kind="stable") // TOP_K).to(torch.int32)
    return Choices(token_P, np.bincount(ids_N, minlength=len(share_E)).tolist())


class _Work:
    """What every host is asked, round by round: always the same tokens, other choices in every pass."""

    def __init__(self, shape: Shape, training: bool) -> None:
        self.training = training
        self.num_tokens = shape.train_tokens if training else shape.serve_tokens
        self._passes = shape.train_steps if training else shape.serve_passes
        self.tokens_a_round = self.num_tokens * self._passes
        self._random = np.random.default_rng(0)
        share_E = zipf_share(NUM_GROUPS * GROUP_SIZE, EXPONENT)
        self._shares = [self._random.permutation(share_E) for _ in range(NUM_LAYERS)]
        self._rounds: list[list[list[Choices]]] = []
        size = self.num_tokens, shape.hidden_size
        self.x_TD = torch.from_numpy(self._random.standard_normal(size, dtype=np.float32)).to(DTYPES[shape.dtype])
        self.weight_P = torch.full((self.num_tokens * TOP_K,), 1 / TOP_K)

    def passes(self, number: int) -> list[list[Choices]]:
        """Of a round: choices of each pass, by layer."""
        while len(self._rounds) <= number:
            self._rounds.append(
                [
                    [zipf_choices(self._random, share_E, self.num_tokens) for share_E in self._shares]
                    for _ in range(self._passes)
                ]
            )
        return self._rounds[number]


class _Run:
    """One host at this work, a round a call."""

    def __init__(self, host: ExpertHost, work: _Work) -> None:
        self._host, self._work = host, work
        self._round = 0
        self._before = dict(host.status()["cache"])
        if work.training:
            self._ask("begin_run", {"optimizer": OptimizerSettings().to_dict()})
        work.passes(0)

    def __call__(self) -> None:
        one = self._step if self._work.training else self._serve
        for choices in self._work.passes(self._round):
            one(choices)
        self._round += 1

    def counters(self) -> dict[str, Any]:
        """Since this run began."""
        now = self._host.status()["cache"]
        return {**{name: now[name] - self._before[name] for name in now}, "device_bytes": now["device_bytes"]}

    def _serve(self, choices: Sequence[Choices]) -> None:
        for layer, chosen in enumerate(choices):
            self._forward({"layer": layer}, chosen)

    def _step(self, choices: Sequence[Choices]) -> None:
        step = {"step": self._host.version + 1, "attempt": 0}
        parts = [{**step, "microbatch": 0, "keep": True, "layer": layer} for layer in range(NUM_LAYERS)]
        answers = [self._forward(part, chosen) for part, chosen in zip(parts, choices, strict=True)]
        for part, grad_TD in reversed(list(zip(parts, answers, strict=True))):
            self._ask("backward", part, grad_TD)
            while self._host.idle():  # as its server does between two messages
                pass
        self._ask("prepare", step)
        self._ask("commit", {**step, "lr": 1e-4, "scale": 1.0})

    def _forward(self, fields: dict[str, Any], chosen: Choices) -> Tensor:
        question = {**fields, "counts_E": chosen.counts_E}
        (y_TD,) = self._ask("forward", question, self._work.x_TD, chosen.token_P, self._work.weight_P)
        return y_TD.cpu()  # as a link takes it: what a GPU was asked is done then

    def _ask(self, op: str, fields: dict[str, Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        return raise_if_error(self._host.handle("bench", Message(op, fields, tensors)), self._host.name).tensors
