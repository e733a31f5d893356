"""A prompt's way through the model, a chunk at a time: between two chunks the streams that decode get their turn.

What a chunk's keys and values are does not depend on those behind it, so that the logits after the last chunk are those
of the whole prompt. All chunks see one version: the prompt holds updates off from its first chunk to its last (see
`actors.router.versions`). Chunks begin at multiples of their length, whatever else runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from actors.errors import PeerLost, StepAborted
from actors.moe.gating import GatePast
from actors.router.served import Served

logger = logging.getLogger(__name__)

MAX_BEGUN = 2
"""How often a prompt is begun at most, where an actor is lost in a way that only its end tells."""


def can_be_chunked(model: PreTrainedModel) -> bool:
    """Whether all that its layers keep of earlier tokens is keys and values."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


@dataclass(frozen=True)
class Wish:
    """Of whoever waits for a prompt."""

    deadline: float = float("inf")
    """A `time.monotonic` value."""
    is_wanted: Callable[[], bool] = lambda: True

    def check(self) -> None:
        """TimeoutError, or `StepAborted` for a session that has ended."""
        if not self.is_wanted():
            raise StepAborted("the session has ended")
        if time.monotonic() >= self.deadline:
            raise TimeoutError("the prompt was not computed before the deadline")


@dataclass(frozen=True)
class Computed:
    """A prompt's end, or that of several equally long ones."""

    logits_BV: Tensor
    """After the last token."""
    cache: Cache
    pasts: Sequence[GatePast] | None
    version: int
    """The least of the experts over all chunks."""


@dataclass
class PromptRun:
    """B prompts of S tokens. `advance` until `computed` is there; then, or after an error, `close`."""

    served: Served
    prompts_BS: Sequence[Sequence[int]]
    chunk: int
    """Tokens of each prompt that are computed at a time; 0: all."""
    last_only: dict[str, Any] = field(default_factory=dict)
    """Arguments by which the model computes logits of the last token alone."""
    computed: Computed | None = None

    def __post_init__(self) -> None:
        self._length = len(self.prompts_BS[0])
        self._chunk = self.chunk or self._length
        self._num_begun = 0
        self._begin()
        self._hold = self.served.hold() if self._length > self._chunk else None

    def _begin(self) -> None:
        self._num_begun += 1
        self._done = 0
        self._cache: Cache | None = None
        self._pasts = self.served.new_pasts()
        self._versions: list[int] = []

    @property
    def is_awaited(self) -> bool:
        """Whether an update waits for the rest of it."""
        return self._hold is not None and self._hold.is_awaited

    def advance(self) -> None:
        """Another chunk. An error is final."""
        try:
            self._advance()
        except PeerLost as error:  # when the chunk was through, and what was kept of it counts nothing
            if self._num_begun == MAX_BEGUN:
                raise
            logger.info("a prompt begins anew: %s", error)
            self._begin()

    def _advance(self) -> None:
        end = min(self._done + self._chunk, self._length)
        ids_BS = torch.tensor([prompt[self._done : end] for prompt in self.prompts_BS])
        with self.served.guard(ids_BS.shape[1], self._pasts) as used_version, torch.no_grad():
            model = self.served.model()
            ids_BS = ids_BS.to(model.get_input_embeddings().weight.device)
            out = model(input_ids=ids_BS, past_key_values=self._cache, use_cache=True, **self.last_only)
            self._versions.append(used_version())
        self._cache, self._done = out.past_key_values, end
        if end == self._length:
            self.computed = Computed(out.logits[:, -1], out.past_key_values, self._pasts, min(self._versions))

    def close(self) -> None:
        """Updates go on. More than once does nothing more."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.end()


def compute(run: PromptRun, wish: Wish) -> Computed:
    """All of it, with a turn for others after every chunk as the guard gives it. Raises as `Wish.check` before each."""
    with closing(run):
        while run.computed is None:
            wish.check()
            run.advance()
        return run.computed
