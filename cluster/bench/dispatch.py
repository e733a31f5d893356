"""`small_message`: a few tokens to an expert actor and back, over its link and as a Ray call of the same question."""

from __future__ import annotations

import torch

from actors.transport.message import Message
from actors.transport.socket import SocketLink
from actors.trunk.model import skeleton
from cluster.bench.result import Report, interleaved, time_row
from cluster.config import ClusterConfig
from cluster.fabric.launch import launched
from cluster.fabric.workers import model_source

TOKENS = 4
CALLS_A_ROUND = 20
TIMEOUT_S = 10.0


def bench_dispatch(config: ClusterConfig, *, rounds: int) -> Report:
    """The question is a real forward of a few tokens: the time holds the experts' computation as well."""
    with launched(config) as running:
        contact, ray_call = running.ask_expert(0)
        model = skeleton(model_source(config))
        width, top_k = int(model.config.get_text_config().hidden_size), model.top_k
        question = _question(len(contact.experts), width, top_k, model.dtype)
        link = SocketLink(
            contact.name, contact.address, name="bench", max_bytes=config.links.max_message_bytes, timeout_s=TIMEOUT_S
        )

        def over_link() -> None:
            for _ in range(CALLS_A_ROUND):
                link.call(question, TIMEOUT_S)

        def over_ray() -> None:
            for _ in range(CALLS_A_ROUND):
                ray_call(question)

        seconds = interleaved({"link": over_link, "ray": over_ray}, rounds, warmups=3)
        link.close()
    each = {name: [s / CALLS_A_ROUND for s in values] for name, values in seconds.items()}
    return Report("dispatch", [time_row("small_message", "ms", 1e3, each["link"], "Ray actor call", each["ray"])])


def _question(num_experts: int, width: int, top_k: int, dtype: torch.dtype) -> Message:
    counts_E = [0] * num_experts
    counts_E[:top_k] = [TOKENS] * top_k
    token_P = torch.arange(TOKENS, dtype=torch.int32).repeat(top_k)
    tensors = (torch.randn(TOKENS, width, dtype=dtype), token_P, torch.full((TOKENS * top_k,), 1 / top_k))
    return Message("forward", {"layer": 0, "counts_E": counts_E}, tensors)
