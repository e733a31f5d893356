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

    A step may be given up: `compress` changes nothing before `keep`, and `drop` or compressing again makes it undone.
    The same gradients after the same kept steps give the same bytes. The memory is as large as the gradients, twice
    while a step is neither kept nor dropped. P: gradients.
    """

    def __init__(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], settings: CompressionSettings) -> None:
        """`InvalidInput` for a dtype that cannot be compressed, and for settings that cannot be used."""
        settings.check()
        self._shapes, self._dtypes = list(shapes), list(dtypes)
        self._codecs: list[Codec] = [codec_for(*of, settings) for of in zip(shapes, dtypes, strict=True)]
        self._memory = [Memory()] * len(self._codecs)
        self._next: dict[int, Memory] = {}

    @property
    def sizes_P(self) -> list[int]:
        """Bytes of each, whatever its values."""
        return [codec.num_bytes for codec in self._codecs]

    def compress(self, number: int, gradient: Tensor | None) -> Tensor:
        """-> uint8 [size]. None goes as zeros, and what is remembered of it stays."""
        codec, shape, dtype = self._codecs[number], self._shapes[number], self._dtypes[number]
        if gradient is None:
            self._next.pop(number, None)
            return codec.encode(torch.zeros(shape, dtype=wide(dtype)), None)[0]
        if tuple(gradient.shape) != shape or gradient.dtype != dtype:
            found = (tuple(gradient.shape), gradient.dtype)
            raise InvalidInput(f"need {shape} of {dtype}", field=f"gradients[{number}]", value=found)
        memory = self._memory[number]
        x = gradient.to(wide(dtype))
        if memory.error is not None:
            x = x + memory.error
        raw, warm = codec.encode(x, memory.warm)
        self._next[number] = Memory(x - codec.decode(raw), warm)
        return raw

    def decompress(self, number: int, raw: Tensor) -> Tensor:
        """What the bytes of gradient `number` stand for. Of any sender: nothing is remembered of it."""
        codec = self._codecs[number]
        if raw.dtype != torch.uint8 or tuple(raw.shape) != (codec.num_bytes,):
            found = (tuple(raw.shape), raw.dtype)
            raise InvalidInput(f"need [{codec.num_bytes}] of uint8", field=f"gradients[{number}]", value=found)
        return codec.decode(raw)

    def keep(self) -> None:
        """What was compressed last counts."""
        for number, memory in self._next.items():
            self._memory[number] = memory
        self._next = {}

    def drop(self) -> None:
        """It does not."""
        self._next = {}

    def num_bytes(self) -> int:
        """Of what is remembered."""
        kept = [*self._memory, *self._next.values()]
        return sum(t.nbytes for memory in kept for t in (memory.error, memory.warm) if t is not None)

    def forget(self) -> None:
        """As new."""
        self._memory, self._next = [Memory()] * len(self._codecs), {}
