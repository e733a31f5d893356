"""Gradients of one sender, compressed step by step with error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.compress.codecs import Codec, Shape, codec_for, wide
from actors.compress.settings import CompressionSettings
from actors.errors import InvalidInput


@dataclass(frozen=True)
class Memory:
    """What a sender remembers of one gradient."""

    error: Tensor | None = None
    """What the bytes so far have left out, of the gradient's shape, in its wide type."""
    warm: Tensor | None = None
    """Of the codec."""


class Compressor:
    """Error feedback (Karimireddy et al. 2019, 1901.09847): x = gradient + error; the bytes stand for x', and x - x' is
    the next error. So what was sent up to a step sums to the gradients up to it, less the last error.

    A step may be given up: `compress` changes nothing before `keep`, and `drop` or another `compress` makes it undone.
    The same gradients after the same kept steps give the same bytes. The memory is as large as the gradients, twice
    while a step is neither kept nor dropped. P: gradients.
    """

    def __init__(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], settings: CompressionSettings) -> None:
        """`InvalidInput` for a dtype that cannot be compressed, and for settings that cannot be used."""
        settings.check()
        self._shapes, self._dtypes = list(shapes), list(dtypes)
        self._codecs: list[Codec] = [codec_for(*of, settings) for of in zip(shapes, dtypes, strict=True)]
        self._memory = [Memory()] * len(self._codecs)
        self._next: list[Memory] | None = None

    @property
    def sizes_P(self) -> list[int]:
        """Bytes of each, whatever its values."""
        return [codec.num_bytes for codec in self._codecs]

    def compress(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """-> uint8 [size] for each. None goes as zeros, and what is remembered of it stays."""
        self._next = None
        found = [self._compress(number, gradient) for number, gradient in enumerate(gradients)]
        self._next = [memory for _, memory in found]
        return [raw for raw, _ in found]

    def decompress(self, number: int, raw: Tensor) -> Tensor:
        """What the bytes of gradient `number` stand for. Of any sender: nothing is remembered of it."""
        codec = self._codecs[number]
        if raw.dtype != torch.uint8 or tuple(raw.shape) != (codec.num_bytes,):
            found = (tuple(raw.shape), raw.dtype)
            raise InvalidInput(f"need [{codec.num_bytes}] of uint8", field=f"gradients[{number}]", value=found)
        return codec.decode(raw)

    def keep(self) -> None:
        """What `compress` made counts."""
        if self._next is not None:
            self._memory, self._next = self._next, None

    def drop(self) -> None:
        """It does not."""
        self._next = None

    def forget(self) -> None:
        """As new."""
        self._memory, self._next = [Memory()] * len(self._codecs), None

    def _compress(self, number: int, gradient: Tensor | None) -> tuple[Tensor, Memory]:
        codec, memory, shape = self._codecs[number], self._memory[number], self._shapes[number]
        kind = wide(self._dtypes[number])
        if gradient is None:
            return codec.encode(torch.zeros(shape, dtype=kind), None)[0], memory
        if tuple(gradient.shape) != shape or gradient.dtype != self._dtypes[number]:
            raise InvalidInput(
                f"need {shape} of {self._dtypes[number]}",
                field=f"gradients[{number}]",
                value=(tuple(gradient.shape), gradient.dtype),
            )
        x = gradient.to(kind)
        if memory.error is not None:
            x = x + memory.error
        raw, warm = codec.encode(x, memory.warm)
        return raw, Memory(x - codec.decode(raw), warm)
