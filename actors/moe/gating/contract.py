"""What every gate takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class GatePast:
    """Keys and values of the earlier tokens of one layer's gate, for its attention while decoding.

    A forward extends it in place; `crop` takes tokens back before a repeated forward. Memory doubles when it is full,
    so that a token costs no copy of the whole past.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys_BASH: Tensor | None = None
        self._values_BASH: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """bool [B, 1, 1, S]: what the one new token of each sequence looks at, where they differ in length."""
        return None

    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far, of which there are some."""
        assert self._keys_BASH is not None
        assert self._values_BASH is not None
        return self._keys_BASH[:, :, : self.length], self._values_BASH[:, :, : self.length]

    def extend(self, keys_BASH: Tensor, values_BASH: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, S, width of a head]; returns keys and values of all tokens so far, the new ones last."""
        end = self.length + keys_BASH.shape[2]
        self._keys_BASH = self._write(self._keys_BASH, keys_BASH)
        self._values_BASH = self._write(self._values_BASH, values_BASH)
        self.length = end
        return self._keys_BASH[:, :, :end], self._values_BASH[:, :, :end]

    def crop(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        assert 0 <= length <= self.length
        self.length = length

    def _write(self, buffer_BASH: Tensor | None, new_BASH: Tensor) -> Tensor:
        batch, heads, added, width = new_BASH.shape
        end = self.length + added
        if buffer_BASH is None or buffer_BASH.shape[2] < end:
            grown_BASH = new_BASH.new_empty(batch, heads, max(2 * end, 64), width)
            if buffer_BASH is not None:
                grown_BASH[:, :, : self.length] = buffer_BASH[:, :, : self.length]
            buffer_BASH = grown_BASH
        buffer_BASH[:, :, self.length : end] = new_BASH.detach()
        return buffer_BASH


@dataclass(frozen=True)
class GateContext:
    """Where and when a forward happens. Equal contexts and inputs give equal choices."""

    sequence_length: int
    """S; the T = B * S tokens come sequence by sequence."""
    training: bool = False
    step: int = 0
    """Committed training steps: for schedules."""
    seed: int = 0
    """Of this very forward: a repeated one (retry, activation checkpointing) draws the same numbers."""
    past: GatePast | None = None
    """While decoding, of this layer; the tokens given continue its sequences."""
    layer: int = 0
    """For errors, and so that layers with the same seed draw different numbers."""

    def generator(self, stream: int, device: torch.device) -> torch.Generator:
        """For the random numbers of one part (`stream`) of this forward. Equal on devices of the same type."""
        mixed = 0
        for part in (self.seed, self.layer, stream):
            mixed = (mixed * 1_000_003 + part + 1) % (1 << 62)
        return torch.Generator(device).manual_seed(mixed)


@dataclass(frozen=True)
class GateOutput:
    """A gate's decision for T tokens."""

    ids_TK: Tensor
    """int64, best choice first, -1 in a place that is not used."""
    weights_TK: Tensor
    """Differentiable; 0 in a place that is not used. float32, or float64 for a float64 input."""
    scores_TE: Tensor
    """Differentiable gate probabilities: rows sum to 1, without the balance bias. The balance losses need them."""


class Gate(nn.Module):
    """The projection is handed in: it stays the model's own parameter under the model's own name."""

    def forward(
        self, x_TD: Tensor, context: GateContext, weight_ED: Tensor, bias_E: Tensor | None = None
    ) -> GateOutput:
        """`bias_E` is added to the scores for the choice only (S13). Raises `NonFinite` for scores that are not."""
        raise NotImplementedError
