"""The trunk's gradients in messages between routers: flat pieces that fit a message, cut alike on every router."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from actors.errors import InvalidInput

PIECE_BYTES = 64 << 20
"""Most of a message."""
BUCKET_BYTES, MAX_BUCKETS = 1 << 20, 128
Span = tuple[int, int, int]
"""Number of a parameter, and from where to where of it, flat."""


class GradientPieces:
    """Over the `grad` of these parameters, whose order, shapes and types are the same on every router.

    One dtype a piece; a parameter that is larger than a piece is cut. P: parameters, N: elements of a piece.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], max_bytes: int = PIECE_BYTES) -> None:
        self._parameters = list(parameters)
        self._max_bytes = max_bytes
        self._pieces = _cut(self._parameters, max_bytes)

    def __len__(self) -> int:
        return len(self._pieces)

    def present_P(self) -> Tensor:
        """1 for each parameter that has a gradient, uint8. The optimizer passes over the others."""
        return torch.tensor([p.grad is not None for p in self._parameters], dtype=torch.uint8)

    def make_present(self, present_P: Tensor) -> None:
        """Zeros where there is no gradient here, and one elsewhere."""
        for parameter, is_present in zip(self._parameters, self._checked(present_P), strict=True):
            if is_present and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def make_exactly(self, present_P: Tensor) -> None:
        """Gradients of any value for exactly these parameters, to be written piece by piece."""
        for parameter, is_present in zip(self._parameters, self._checked(present_P), strict=True):
            parameter.grad = torch.empty_like(parameter) if is_present else None

    def parameters_of(self, piece: int) -> set[int]:
        """Numbers of those that it has a part of."""
        return {number for number, _, _ in self._pieces[piece]}

    # -- what is sent may be another form of the gradients, with a memory: see `actors.compress.pieces` ----------------

    def pack(self, piece: int) -> Tensor:
        """As it is sent, once the attempt's gradients of its parameters are complete. [N]"""
        return self.read(piece)

    def squeeze(self) -> None:
        """The leader's gradients become what others will make of the pieces that `read` gives from now on."""

    def keep(self) -> None:
        """What was packed last is committed."""

    def drop(self) -> None:
        """It was given up."""

    def forget(self) -> None:
        """What is sent next does not follow on what was sent before."""

    # -- pieces -------------------------------------------------------------------------------------------------------

    def read(self, piece: int) -> Tensor:
        """[N], on the CPU; memory of its own. Zeros where there is no gradient."""
        return torch.cat([self._span(span).to("cpu") for span in self._pieces[piece]])

    def add(self, piece: int, flat_N: Tensor) -> None:
        """To the gradients that are present here."""
        for span, part in self._parts(piece, flat_N):
            if self._parameters[span[0]].grad is not None:
                self._view(span).add_(part.to(self._parameters[span[0]].device))

    def write(self, piece: int, flat_N: Tensor) -> None:
        for span, part in self._parts(piece, flat_N):
            if self._parameters[span[0]].grad is not None:
                self._view(span).copy_(part)

    def _span(self, span: Span) -> Tensor:
        number, start, stop = span
        parameter = self._parameters[number]
        if parameter.grad is None:
            return torch.zeros(stop - start, dtype=parameter.dtype)
        return self._view(span)

    def _view(self, span: Span) -> Tensor:
        number, start, stop = span
        parameter = self._parameters[number]
        assert parameter.grad is not None
        if not parameter.grad.is_contiguous():
            parameter.grad = parameter.grad.contiguous()
        return parameter.grad.view(-1)[start:stop]

    def _parts(self, piece: int, flat_N: Tensor) -> list[tuple[Span, Tensor]]:
        spans = self._pieces[piece]
        sizes = [stop - start for _, start, stop in spans]
        dtype = self._parameters[spans[0][0]].dtype
        if tuple(flat_N.shape) != (sum(sizes),) or flat_N.dtype != dtype:
            found = (tuple(flat_N.shape), flat_N.dtype)
            raise InvalidInput(f"need [{sum(sizes)}] of {dtype}", field=f"gradients[{piece}]", value=found)
        return list(zip(spans, flat_N.split(sizes), strict=True))

    def _checked(self, present_P: Tensor) -> list[int]:
        if tuple(present_P.shape) != (len(self._parameters),):
            raise InvalidInput(f"need [{len(self._parameters)}]", field="present_P", value=tuple(present_P.shape))
        present: list[int] = present_P.tolist()
        return present


def bucket_bytes(parameters: Sequence[nn.Parameter], most: int = PIECE_BYTES) -> int:
    """Of a piece that is sent as soon as backward is done with it: small enough that most leave early, and not so small
    that there are more than `MAX_BUCKETS` where a message could be larger."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return min(most, max(BUCKET_BYTES, -(-total // MAX_BUCKETS)))


def _cut(parameters: Sequence[nn.Parameter], max_bytes: int) -> list[list[Span]]:
    pieces: list[list[Span]] = []
    room, dtype = 0, None
    for number, parameter in enumerate(parameters):
        start, size = 0, parameter.numel()
        while start < size:
            if parameter.dtype != dtype or room < parameter.element_size():
                pieces.append([])
                room, dtype = max(max_bytes, parameter.element_size()), parameter.dtype
            stop = min(size, start + room // parameter.element_size())
            pieces[-1].append((number, start, stop))
            room -= (stop - start) * parameter.element_size()
            start = stop
    return pieces
