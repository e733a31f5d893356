"""One actor's share of one token, as in a decode step, over its link and as a Ray actor call of the same tensors.

`small_message` goes to the expert host and back; `one_token_layer` is computed by the experts there as well.
`payload_4mb` needs no cluster: see `cluster.bench.payload`.
`fp8_rows`: `cluster.bench.fp8`. With two GPUs, a layer's tokens from one to the other: `cluster.bench.gpu_pair`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from actors.transport.message import Message
from actors.trunk.model import skeleton
from cluster.bench.fp8 import fp8_row
from cluster.bench.gpu_pair import gpu_pair_rows
from cluster.bench.live import link_to
from cluster.bench.payload import payload_rows
from cluster.bench.result import Report, interleaved, time_row
from cluster.config import ClusterConfig
from cluster.fabric.launch import launched
from cluster.fabric.source import model_source

CALLS_A_ROUND = 20
TIMEOUT_S = 10.0


def bench_dispatch(config: ClusterConfig, *, rounds: int) -> Report:
    with launched(config) as running:
        contact, ray_call = running.ask_expert(0)
        model = skeleton(model_source(config))
        width, top_k = int(model.config.get_text_config().hidden_size), model.top_k
        pairs = max(1, top_k // config.experts.actors)
        link = link_to(contact, running, config, TIMEOUT_S)
        num_experts = len(link.call(Message("status"), TIMEOUT_S).fields["experts"])
        question = _question(num_experts, width, pairs, model.dtype)

        def over_link(question: Message) -> Message:
            return link.call(question, TIMEOUT_S)

        rows = []
        for case, op in (("small_message", "echo"), ("one_token_layer", "forward")):
            question = replace(question, op=op)
            seconds = interleaved({"link": _calls(over_link, question), "ray": _calls(ray_call, question)}, rounds, 3)
            each = {name: [s / CALLS_A_ROUND for s in values] for name, values in seconds.items()}
            rows.append(time_row(case, "ms", 1e3, each["link"], "Ray actor call", each["ray"]))
        link.close()
        rows += gpu_pair_rows(rounds, ray_call)
    return Report("dispatch", [*rows, fp8_row(), *payload_rows(rounds)])


def _calls(ask: Callable[[Message], Message], question: Message) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS_A_ROUND):
            ask(question)

    return run


def _question(num_experts: int, width: int, pairs: int, dtype: torch.dtype) -> Message:
    counts_E = [1] * pairs + [0] * (num_experts - pairs)
    tensors = (torch.randn(1, width, dtype=dtype), torch.zeros(pairs, dtype=torch.int32), torch.ones(pairs) / pairs)
    return Message("forward", {"layer": 0, "counts_E": counts_E}, tensors)
