"""The trunk's gradients in messages between routers, compressed.

To the leader every replica sends its own; the leader adds them to its gradients, compresses the sum, and takes what its
bytes stand for like everybody else (DoubleSqueeze, Tang et al. 2019, 1905.05957), so that all make one update bit for
bit. Each sender remembers what its bytes have left out, and only a committed step changes that: an attempt that is
given up leaves no trace. The memory is the sender's alone. Who joins, and all after a return to a checkpoint, new
weights or a growth, begin without; what a router that leaves or dies had not sent yet is lost; who is promoted puts
what it still had into the sums that it sends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from actors.compress.codecs import Shape, codec_for
from actors.compress.compressor import Compressor
from actors.compress.settings import CompressionSettings
from actors.errors import InvalidInput, StepAborted
from actors.router.pieces import PIECE_BYTES, GradientPieces

Slab = tuple[int, int, int]
"""Number of a parameter, and from which to which of its rows; of a vector, elements."""


class CompressedPieces(GradientPieces):
    """N: bytes of a piece. A parameter whose bytes do not fit a piece is cut by rows before it is compressed. The
    parameters of a piece would fill one uncompressed too, so that as many can be sent before backward ends.

    `InvalidInput` for a parameter whose dtype cannot be compressed.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], settings: CompressionSettings, max_bytes: int = PIECE_BYTES
    ) -> None:
        super().__init__(parameters, max_bytes)
        settings.check()
        self._slabs = [slab for number in range(len(parameters)) for slab in self._cut_parameter(number, settings)]
        dtypes = [self._parameters[number].dtype for number, _, _ in self._slabs]
        shapes = [self._shape(slab) for slab in self._slabs]
        self._compressor = Compressor(shapes, dtypes, settings)
        plain = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        self._slabs_of = _packed(plain, max_bytes)
        self._bytes: dict[int, Tensor] = {}
        """Of pieces that were packed."""

    def __len__(self) -> int:
        return len(self._slabs_of)

    @property
    def num_bytes(self) -> int:
        return sum(self._compressor.sizes_P)

    def parameters_of(self, piece: int) -> set[int]:
        return {self._slabs[number][0] for number in self._slabs_of[piece]}

    def pack(self, piece: int) -> Tensor:
        numbers = self._slabs_of[piece]
        raws = [self._compressor.compress(number, self._rows(self._slabs[number])) for number in numbers]
        self._bytes[piece] = torch.cat([raw.to("cpu") for raw in raws])
        return self._bytes[piece]

    def squeeze(self) -> None:
        for piece in range(len(self)):
            self.write(piece, self.pack(piece))

    def keep(self) -> None:
        self._compressor.keep()
        self._bytes = {}

    def drop(self) -> None:
        self._compressor.drop()
        self._bytes = {}

    def forget(self) -> None:
        self._compressor.forget()
        self._bytes = {}

    def read(self, piece: int) -> Tensor:
        if piece not in self._bytes:
            raise StepAborted("gradients are asked for that have not been computed")
        return self._bytes[piece]

    def add(self, piece: int, flat_N: Tensor) -> None:
        for slab, value in self._values(piece, flat_N):
            if (rows := self._rows(slab)) is not None:
                rows.add_(value.to(rows.device))

    def write(self, piece: int, flat_N: Tensor) -> None:
        for slab, value in self._values(piece, flat_N):
            if (rows := self._rows(slab)) is not None:
                rows.copy_(value)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _cut_parameter(self, number: int, settings: CompressionSettings) -> list[Slab]:
        parameter = self._parameters[number]
        if not parameter.numel():
            return []
        length = parameter.shape[0] if parameter.ndim else 1
        height = length
        while height > 1:
            shape = self._shape((number, 0, height))
            if codec_for(shape, parameter.dtype, settings).num_bytes <= self._max_bytes:
                break
            height = -(-height // 2)
        return [(number, start, min(length, start + height)) for start in range(0, length, height)]

    def _shape(self, slab: Slab) -> Shape:
        number, start, stop = slab
        parameter = self._parameters[number]
        if parameter.ndim < 2:
            return (stop - start,)
        return (stop - start, parameter.numel() // parameter.shape[0])

    def _rows(self, slab: Slab) -> Tensor | None:
        """Of the gradient; None where there is none."""
        number, start, stop = slab
        parameter = self._parameters[number]
        if parameter.grad is None:
            return None
        if not parameter.grad.is_contiguous():
            parameter.grad = parameter.grad.contiguous()
        rows = parameter.grad.view(-1 if parameter.ndim < 2 else parameter.shape[0], *self._shape(slab)[1:])
        return rows[start:stop]

    def _values(self, piece: int, flat_N: Tensor) -> list[tuple[Slab, Tensor]]:
        numbers = self._slabs_of[piece]
        sizes = [self._compressor.sizes_P[number] for number in numbers]
        if flat_N.dtype != torch.uint8 or tuple(flat_N.shape) != (sum(sizes),):
            found = (tuple(flat_N.shape), flat_N.dtype)
            raise InvalidInput(f"need [{sum(sizes)}] of uint8", field=f"gradients[{piece}]", value=found)
        raws = flat_N.split(sizes)
        return [(self._slabs[n], self._compressor.decompress(n, raw)) for n, raw in zip(numbers, raws, strict=True)]


def _packed(sizes_P: Sequence[int], max_bytes: int) -> list[list[int]]:
    """Numbers of what goes together, in order; one that is larger goes alone."""
    pieces: list[list[int]] = [[]]
    room = max_bytes
    for number, size in enumerate(sizes_P):
        if pieces[-1] and size > room:
            pieces.append([])
            room = max_bytes
        pieces[-1].append(number)
        room -= size
    return pieces


def pieces_of(
    parameters: Sequence[nn.Parameter], settings: CompressionSettings, max_bytes: int = PIECE_BYTES
) -> GradientPieces:
    settings.check()
    if settings.method == "none":
        return GradientPieces(parameters, max_bytes)
    return CompressedPieces(parameters, settings, max_bytes)
