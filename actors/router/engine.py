"""Decoding: the sessions that stream tokens from a trunk, in turns or together."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from actors.errors import InvalidInput
from actors.router.batch import Batch, DecodeLoop, Forward, Stream, plain_forward
from actors.router.prompt import PromptRun, Wish, compute
from actors.router.sampling import choose, generator_at
from actors.router.served import Served
from actors.router.slots import Layout, Slots, layout_of
from actors.values import Sampling, TokenEvent

logger = logging.getLogger(__name__)

LINGER_S, LINGER_ON_GPU_S = 1.0, 60.0
"""How long the memory of a batch without streams is kept: on a GPU with what was captured."""


class DecodeEngine:
    """At most `max_sessions` streams decode; more wait. A stream's tokens do not depend on the other streams: with a
    `batch` of 1, where they decode in turns, to the last bit; where up to `batch` of them share each forward, but for
    how its products round.

    `model`: any view of the model's family.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_sessions: int,
        max_positions: int,
        end_ids: Sequence[int],
        batch: int = 1,
        new_forward: Callable[[Served], Forward] = lambda served: plain_forward,
        prompt_chunk: int = 0,
    ) -> None:
        """`new_forward`: for every batch, how its steps are computed. `prompt_chunk`: tokens of a prompt that are
        computed at a time; 0: all."""
        self._slots = threading.BoundedSemaphore(max_sessions)
        self._waiting_since: dict[int, float] = {}
        self._max_positions = max_positions
        self._end_ids = frozenset(end_ids)
        has_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if has_keep else {}
        self._batch, self._new_forward = min(batch, max_sessions), new_forward
        self._prompt_chunk = prompt_chunk
        self._layout: Layout | None = layout_of(model) if self._batch > 1 else None
        if self._batch > 1 and self._layout is None:
            logger.info("streams of %s decode in turns: its layers keep no plain keys", type(model).__name__)
        on_gpu = model.get_input_embeddings().weight.device.type == "cuda"
        self._loop = DecodeLoop(self._new_batch, linger_s=LINGER_ON_GPU_S if on_gpu else LINGER_S)

    def stream(
        self,
        served: Served,
        prompt: Sequence[int],
        sampling: Sampling,
        timeout_s: float,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Iterator[TokenEvent]:
        """Tokens as they come. Closing the iterator ends the session and frees its cache. `timeout_s`, `is_wanted`: see
        `Serving.generate`."""
        wish = Wish(time.monotonic() + timeout_s, is_wanted)
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
            if self._layout is None:
                yield from self._decode(served, prompt, sampling, budget, wish)
            else:
                yield from self._loop.run(Stream(served, list(prompt), sampling, budget, self._end_ids, wish))
        finally:
            self._slots.release()

    def queue(self) -> tuple[int, float]:
        """Streams that wait for their turn, and how long the first of them has, in seconds."""
        since = list(self._waiting_since.values())
        return len(since), time.monotonic() - min(since) if since else 0.0

    def stop(self) -> None:
        """Streams that share forwards end with an error, after the forward at hand."""
        self._loop.stop()

    def close(self) -> None:
        """Waits until they have."""
        self._loop.close()

    def _take_turn(self, timeout_s: float) -> bool:
        me = threading.get_ident()
        self._waiting_since[me] = time.monotonic()
        try:
            return self._slots.acquire(timeout=timeout_s)
        finally:
            del self._waiting_since[me]

    def _new_batch(self, served: Served) -> Batch:
        assert self._layout is not None
        device = served.model().get_input_embeddings().weight.device
        slots = Slots(self._layout, device, max_slots=self._batch, max_positions=self._max_positions)
        return Batch(served, slots, self._new_forward(served), self._last_only, self._prompt_chunk)

    def _decode(
        self, served: Served, prompt: Sequence[int], sampling: Sampling, budget: int, wish: Wish
    ) -> Iterator[TokenEvent]:
        """In turns with the other streams, a forward of its own for every token and every chunk of the prompt."""
        device = served.model().get_input_embeddings().weight.device
        begun = compute(PromptRun(served, [prompt], self._prompt_chunk, self._last_only), wish)
        logits_V, cache, pasts, version = begun.logits_BV[0], begun.cache, begun.pasts, begun.version
        for number in range(budget):
            token = choose(logits_V, sampling, generator_at(sampling.seed, len(prompt) + number))
            ended = token in self._end_ids
            reason = "end_of_text" if ended else "length" if number + 1 == budget else ""
            yield TokenEvent(token, version, reason)
            if reason:
                return
            ids = torch.tensor([[token]], device=device)
            with served.guard(1, pasts) as used_version, torch.no_grad():
                out = served.model()(input_ids=ids, past_key_values=cache, use_cache=True, **self._last_only)
                version = used_version()
            logits_V, cache = out.logits[0, -1], out.past_key_values
