"""`ffn_*`: training one feed-forward expert behind a link (forward, backward, AdamW), against the same in one process.

With an interpreter that has hivemind, its expert server is timed too, on its own `ffn` block of as many weights.
With a GPU, `kernel_*` of `cluster.bench.kernels` come before these.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.errors import InvalidInput
from actors.optim import OptimizerSettings, adamw
from actors.transport.contract import Pending
from actors.transport.message import Message
from actors.transport.socket import SocketLink
from cluster.bench.kernels import kernel_rows
from cluster.bench.live import link_to
from cluster.bench.result import Report, Row, interleaved, rate_row
from cluster.config import ClusterConfig, ModelConfig
from cluster.fabric.launch import launched

logger = logging.getLogger(__name__)

SHAPES = ((1024, 2048), (256, 1024))
"""(hidden size, tokens a batch)"""
STEPS_A_ROUND = {1024: 1, 256: 10}
TIMEOUT_S = 60.0
HIVEMIND_TIMEOUT_S = 300.0


def intermediate_size(hidden_size: int) -> int:
    """Width of a gated expert (three matrices) with about the weights of a plain 4x feed-forward block (two)."""
    return hidden_size * 8 // 3 // 16 * 16


def bench_experts(config: ClusterConfig, *, rounds: int, hivemind: str | None = None) -> Report:
    if not (rows := kernel_rows(rounds)):
        logger.warning("no CUDA device: kernel_even and kernel_zipf are left out")
    for hidden_size, num_tokens in SHAPES:
        rows.append(_bench_shape(config, hidden_size, num_tokens, rounds))
        if hivemind is not None:
            rows.append(_hivemind_row(hivemind, rows[-1], hidden_size, num_tokens, rounds))
    return Report("experts", rows)


def _bench_shape(config: ClusterConfig, hidden_size: int, num_tokens: int, rounds: int) -> Row:
    threads = os.cpu_count() or 1
    config = replace(
        config,
        model=_one_expert(hidden_size),
        experts=replace(config.experts, actors=1, group_size=1, threads=threads),
        ray=replace(config.ray, nodes=1),
    )
    with launched(config) as running:
        contact, _ = running.ask_expert(0)
        link = link_to(contact, running, config, TIMEOUT_S)
        steps = STEPS_A_ROUND[hidden_size]
        candidates = {
            "ours": _behind_link(link, hidden_size, num_tokens, steps),
            "raw": _raw(hidden_size, num_tokens, steps),
        }
        seconds = interleaved(candidates, rounds)
        link.close()
    case = f"ffn_{hidden_size}x{num_tokens}"
    return rate_row(case, "tokens/s", num_tokens * steps, seconds["ours"], "raw, one process", seconds["raw"])


def _one_expert(hidden_size: int) -> ModelConfig:
    """The smallest trunk around one expert of the wanted size."""
    return ModelConfig(
        values={
            "model_type": "mixtral",
            "vocab_size": 260,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size(hidden_size),
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "max_position_embeddings": 64,
        },
        tokenizer="bytes",
    )


def _behind_link(link: SocketLink, hidden_size: int, num_tokens: int, steps: int) -> Callable[[], None]:
    x_TD, grad_TD = torch.randn(2, num_tokens, hidden_size)
    token_P, weight_P = torch.arange(num_tokens, dtype=torch.int32), torch.ones(num_tokens)
    link.call(Message("begin_run", {"optimizer": OptimizerSettings().to_dict()}), TIMEOUT_S)
    done = 0
    commit: Pending | None = None

    def run() -> None:
        """As a router does it: nobody waits for the commit, the next step's messages queue behind it."""
        nonlocal done, commit
        for _ in range(steps):
            done += 1
            step = {"step": done, "attempt": 0}
            part = {**step, "layer": 0, "microbatch": 0, "keep": True}
            link.call(Message("forward", {**part, "counts_E": [num_tokens]}, (x_TD, token_P, weight_P)), TIMEOUT_S)
            backward = link.start(Message("backward", part, (grad_TD,)))
            prepare = link.start(Message("prepare", step))
            backward.result(TIMEOUT_S)
            prepare.result(TIMEOUT_S)
            if commit is not None:
                commit.result(TIMEOUT_S)
            commit = link.start(Message("commit", {**step, "lr": 1e-4, "scale": 1.0}))

    return run


class _FeedForward(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        width = intermediate_size(hidden_size)
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TD).chunk(2, dim=-1)
        result: Tensor = self.down(F.silu(gate) * up)
        return result


def _raw(hidden_size: int, num_tokens: int, steps: int) -> Callable[[], None]:
    torch.set_num_threads(os.cpu_count() or 1)
    module = _FeedForward(hidden_size)
    optimizer = adamw(module.named_parameters(), OptimizerSettings(lr=1e-4))
    x_TD, grad_TD = torch.randn(2, num_tokens, hidden_size)

    def run() -> None:
        for _ in range(steps):
            x_in = x_TD.detach().requires_grad_()
            module(x_in).backward(grad_TD)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def _hivemind_row(python: str, ours: Row, hidden_size: int, num_tokens: int, rounds: int) -> Row:
    """Its rate and its own raw rate come from that interpreter, timed alternately in one process."""
    script = Path(__file__).with_name("hivemind_peer.py")
    command = [python, str(script), str(hidden_size), str(num_tokens), str(rounds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=HIVEMIND_TIMEOUT_S, check=True)
        rates = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise InvalidInput(
            f"hivemind could not be timed: {str(detail).strip().splitlines()[-1:]}",
            field="--hivemind",
            value=python,
            remedy="give an interpreter with hivemind 1.1.12 and uvloop below 0.22",
        ) from None
    share_of_raw = rates["hivemind"] / rates["raw"]
    return Row(
        f"ffn_{hidden_size}x{num_tokens}_hivemind",
        ours.value,
        "tokens/s",
        "hivemind, scaled to the same raw rate",
        share_of_raw * ours.peer_value,
        ours.ratio / share_of_raw,
        rounds,
    )
