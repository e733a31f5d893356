"""What an actor sends of the gradients of groups with copies, compressed, with error feedback.

Who has a copy compresses what it has accumulated for the group's owner; the owner adds that to its own gradients,
compresses the sum, and takes what its bytes stand for like every copy, so that all make one update bit for bit
(DoubleSqueeze, Tang et al. 2019, 1905.05957). What the bytes leave out of an expert's gradient is remembered by their
sender alone, for each expert, and goes with the expert's next gradient, whichever of the two roles the sender has then.

Only a committed step changes what is remembered. It is dropped with another job, other weights or a return to a
checkpoint, none of which it is of, and with a group that leaves this actor or is left without a copy.

    E experts of a group   e those of them with a gradient   N bytes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from actors.compress.codecs import Shape
from actors.compress.compressor import Compressor
from actors.compress.settings import CompressionSettings
from actors.errors import InvalidInput

Packed = tuple[Tensor, Tensor]
"""Which experts of the group [e], and their bytes [N]; of the others every gradient is zero."""
Key = tuple[int, int]
"""(group, layer)"""


class Squeezer:
    """Not thread-safe. Gradients: of one layer of a group, [E, ...] a parameter, always in the same order."""

    def __init__(self, settings: CompressionSettings) -> None:
        """`InvalidInput` for settings that cannot be used."""
        settings.check()
        self.settings = settings
        self._compressors: dict[Key, Compressor] = {}

    def pack(self, key: Key, gradients: Sequence[Tensor]) -> Packed:
        """`InvalidInput` for gradients of a dtype that cannot be compressed. Nothing is remembered before `keep`."""
        compressor = self._compressor(key, gradients)
        experts = _with_a_gradient(gradients)
        raws = [
            compressor.compress(number, gradient[expert]).to("cpu")
            for expert in experts
            for number, gradient in self._numbered(expert, gradients)
        ]
        return torch.tensor(experts, dtype=torch.int64), torch.cat(raws or [torch.empty(0, dtype=torch.uint8)])

    def add(self, key: Key, gradients: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
        """To the gradients, what another actor has packed of the same group and layer."""
        for gradient, value in self._values(key, gradients, packed):
            gradient.add_(value.to(gradient.device))

    def write(self, key: Key, gradients: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
        """In their place."""
        values = self._values(key, gradients, packed)
        for gradient in gradients:
            gradient.zero_()
        for gradient, value in values:
            gradient.copy_(value)

    def keep(self) -> None:
        """What was packed last counts."""
        for compressor in self._compressors.values():
            compressor.keep()

    def drop(self) -> None:
        """It does not."""
        for compressor in self._compressors.values():
            compressor.drop()

    def forget_but(self, is_kept: Callable[[int], bool]) -> None:
        """All that is remembered of other groups."""
        self._compressors = {key: value for key, value in self._compressors.items() if is_kept(key[0])}

    def num_bytes(self) -> int:
        """Of what is remembered."""
        return sum(compressor.num_bytes() for compressor in self._compressors.values())

    # -- inside -------------------------------------------------------------------------------------------------------

    def _compressor(self, key: Key, gradients: Sequence[Tensor]) -> Compressor:
        if key not in self._compressors:
            experts = range(len(gradients[0]))
            shapes = [_shape(gradient) for _ in experts for gradient in gradients]
            dtypes = [gradient.dtype for _ in experts for gradient in gradients]
            self._compressors[key] = Compressor(shapes, dtypes, self.settings)
        return self._compressors[key]

    @staticmethod
    def _numbered(expert: int, gradients: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """The compressor's number of each gradient of an expert."""
        return list(enumerate(gradients, expert * len(gradients)))

    def _values(self, key: Key, gradients: Sequence[Tensor], packed: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """An expert's gradient, as a view, and what the bytes say of it. Everything is checked before the first."""
        compressor = self._compressor(key, gradients)
        if len(packed) != 2:
            raise InvalidInput("need experts and their bytes", field=f"gradients{list(key)}", value=len(packed))
        experts, raw_N = packed
        numbered = [
            (number, gradient[expert])
            for expert in _checked(experts, len(gradients[0]))
            for number, gradient in self._numbered(expert, gradients)
        ]
        sizes = [compressor.sizes_P[number] for number, _ in numbered]
        if raw_N.dtype != torch.uint8 or tuple(raw_N.shape) != (sum(sizes),):
            found = (tuple(raw_N.shape), raw_N.dtype)
            raise InvalidInput(f"need [{sum(sizes)}] of uint8", field=f"gradients{list(key)}", value=found)
        raws = raw_N.split(sizes) if sizes else []
        return [
            (gradient, compressor.decompress(number, raw))
            for (number, gradient), raw in zip(numbered, raws, strict=True)
        ]


def _shape(gradient: Tensor) -> Shape:
    """Of one expert's part."""
    return tuple(gradient.shape[1:]) if gradient.ndim == 3 else (gradient[0].numel(),)


def _with_a_gradient(gradients: Sequence[Tensor]) -> list[int]:
    """Experts whose gradients are not all zero: the others had no token, and no update must make them move."""
    any_E = torch.stack([gradient.flatten(1).any(1) for gradient in gradients]).any(0)
    return [expert for expert, found in enumerate(any_E.tolist()) if found]


def _checked(experts: Tensor, num_experts: int) -> list[int]:
    found: list[int] = experts.tolist() if experts.dtype == torch.int64 and experts.ndim == 1 else [-1]
    if found != sorted(set(found)) or any(not 0 <= expert < num_experts for expert in found):
        raise InvalidInput(f"need rising numbers below {num_experts}", field="experts", value=experts.tolist())
    return found
