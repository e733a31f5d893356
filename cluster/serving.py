"""From tokens to the text that a client sees: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from actors.values import TokenEvent
from cluster.backend import GenerateChunk
from cluster.jobs.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """One stream: `push` every token, send every chunk; a chunk with a finish reason is the last."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, num_prompt_tokens: int) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        """Text that may turn out to be the beginning of a stop text."""
        self._num_prompt_tokens = num_prompt_tokens

    def push(self, event: TokenEvent) -> GenerateChunk:
        reason = event.finish_reason
        # The end token itself is no text.
        text = self._held + ("" if reason == "end_of_text" else self._decoder.push([event.token]))
        if reason:
            text += self._decoder.finish()
        found = min((at for s in self._stop if (at := text.find(s)) >= 0), default=-1)
        if found >= 0:
            text, reason = text[:found], "stop"
        keep = 0 if reason else self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return GenerateChunk(text[: len(text) - keep], (event.token,), event.version, reason, self._num_prompt_tokens)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop text begins with."""
        longest = max((len(s) for s in self._stop), default=0) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(s.startswith(text[-n:]) for s in self._stop)), 0)
