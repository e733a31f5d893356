"""Decoding: sampling and the sessions that stream tokens from a trunk, one step of one session at a time."""

from __future__ import annotations

import hashlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.errors import InvalidInput
from actors.moe.gating import GatePast
from actors.values import Sampling, TokenEvent


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id. Ties of the greedy choice go to the lowest id."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probs_V = torch.softmax(logits_V.float().cpu() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        outside_V = sorted_V.cumsum(0) - sorted_V >= sampling.top_p
        probs_V = torch.zeros_like(probs_V).scatter(0, order_V, sorted_V.masked_fill(outside_V, 0.0))
    return int(torch.multinomial(probs_V, 1, generator=generator))


def generator_at(seed: int, position: int) -> torch.Generator:
    """Randomness of the token at this position of prompt and text together, and of nothing before it: a stream that
    goes on elsewhere, from its prompt and its tokens so far, draws the same."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


Guard = Callable[[int, Sequence[GatePast] | None], AbstractContextManager[Callable[[], int]]]
"""Entered for every forward, with its number of tokens and what the gates keep of the session; gives what tells, after
the forward, the version that was computed with."""


@dataclass(frozen=True)
class Served:
    """What forwards of requests run on: the newest version or a pinned one."""

    model: Callable[[], PreTrainedModel]
    """The view, asked for inside `guard`: a growth puts another in its place. Sessions go on then: their caches are
    those of layers that are the same."""
    guard: Guard
    new_pasts: Callable[[], Sequence[GatePast] | None] = lambda: None
    """For one session."""


class DecodeEngine:
    """At most `max_sessions` streams decode in turns; more wait. A stream's tokens do not depend on the other streams.

    `model`: any view of the model's family.
    """

    def __init__(
        self, model: PreTrainedModel, *, max_sessions: int, max_positions: int, end_ids: Sequence[int]
    ) -> None:
        self._slots = threading.BoundedSemaphore(max_sessions)
        self._waiting_since: dict[int, float] = {}
        self._max_positions = max_positions
        self._end_ids = frozenset(end_ids)
        self._keep_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    def stream(
        self, served: Served, prompt: Sequence[int], sampling: Sampling, timeout_s: float
    ) -> Iterator[TokenEvent]:
        """Tokens as they come. Closing the iterator ends the session and frees its cache."""
        budget = min(sampling.max_tokens, self._max_positions - len(prompt))
        if budget < 1:
            raise InvalidInput(
                f"{len(prompt)} tokens leave no room in {self._max_positions} positions",
                field="prompt",
                remedy=f"send at most {self._max_positions - 1} tokens",
            )
        if not self._take_turn(timeout_s):
            raise TimeoutError("no decode slot became free before the deadline")
        try:
            yield from self._decode(served, prompt, sampling, budget)
        finally:
            self._slots.release()

    def queue(self) -> tuple[int, float]:
        """Streams that wait for their turn, and how long the first of them has, in seconds."""
        since = list(self._waiting_since.values())
        return len(since), time.monotonic() - min(since) if since else 0.0

    def _take_turn(self, timeout_s: float) -> bool:
        me = threading.get_ident()
        self._waiting_since[me] = time.monotonic()
        try:
            return self._slots.acquire(timeout=timeout_s)
        finally:
            del self._waiting_since[me]

    def _decode(self, served: Served, prompt: Sequence[int], sampling: Sampling, budget: int) -> Iterator[TokenEvent]:
        device = served.model().get_input_embeddings().weight.device
        tokens, cache, pasts = list(prompt), None, served.new_pasts()
        for number in range(budget):
            ids = torch.tensor([tokens], device=device)
            extra = {"logits_to_keep": 1} if self._keep_last else {}
            with served.guard(len(tokens), pasts) as used_version, torch.no_grad():
                out = served.model()(input_ids=ids, past_key_values=cache, use_cache=True, **extra)
                version = used_version()
            cache = out.past_key_values
            token = choose(out.logits[0, -1], sampling, generator_at(sampling.seed, len(prompt) + number))
            ended = token in self._end_ids
            reason = "end_of_text" if ended else "length" if number + 1 == budget else ""
            yield TokenEvent(token, version, reason)
            if ended:
                return
            tokens = [token]
