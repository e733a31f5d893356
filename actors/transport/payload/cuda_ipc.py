"""`cuda_ipc`: two processes on GPUs of one host, the same one or two that reach each other. Each writes into memory of
its own GPU, which the other maps; what arrives is copied out at once, GPU to GPU, so that a place is taken only for as
long as that lasts.

A header follows when all it names is written: a process that dies in the middle of it has promised nothing, and no
device ever waits for another's. Memory is taken in regions, each as large as all before it, as it is needed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.errors import ProtocolError
from actors.transport.payload.contract import MAX_TOLD, Carrier, PayloadSettings, Place, span
from actors.transport.payload.cuda_memory import HANDLE_BYTES, GpuMemory
from actors.transport.payload.slots import Slots

logger = logging.getLogger(__name__)

FIRST_REGION_BYTES = 4 << 20
MAX_REGIONS = 16
"""So that a ticket tells its region."""
SHOWN = 1 + HANDLE_BYTES // 8
"""Integers that show a region: its size and handle."""


@dataclass(frozen=True)
class _Region:
    """Of this end."""

    memory: GpuMemory
    slots: Slots


class CudaIpcCarrier(Carrier):
    """A place is (ticket, start, region), and has the region's size and handle behind these until the peer has it.

    Tensors of any size are carried: the host would have to wait for each before the socket could.
    """

    kind = "cuda_ipc"

    def __init__(self, settings: PayloadSettings, peer: str) -> None:
        """RuntimeError where the GPU has no room."""
        device = torch.device(settings.device)
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._peer, self._max_bytes = peer, settings.gpu_region_bytes
        self._ours: list[_Region] = []
        self._theirs: dict[int, GpuMemory] = {}
        self._num_met = 1
        """Regions of ours that the peer has been shown."""
        self._reading: deque[tuple[int, Any]] = deque()
        """Tickets of copies out, each with the event that ends it."""
        self._grow(min(FIRST_REGION_BYTES, self._max_bytes))

    def offer(self) -> Mapping[str, Any]:
        first = self._ours[0]
        return {"memory": first.memory.handle(), "num_bytes": first.slots.size_bytes}

    def meet(self, offer: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        self._open(0, offer["memory"], int(offer["num_bytes"]))

    def put(self, tensor: Tensor) -> Place | None:
        num_bytes = tensor.numel() * tensor.element_size()
        if tensor.device != self._device or not num_bytes or (found := self._slot(num_bytes)) is None:
            return None
        number, ticket, start = found
        region = self._ours[number]
        room = region.memory.bytes_N[start : start + num_bytes].view(tensor.dtype).view(tensor.shape)
        room.copy_(tensor.detach(), non_blocking=True)
        shown = () if number < self._num_met else (region.slots.size_bytes, *_integers(region.memory.handle()))
        return ticket * MAX_REGIONS + number, start, number, *shown

    def ship(self) -> None:
        self._num_met = len(self._ours)
        torch.cuda.current_stream(self._device).synchronize()

    def take(self, dtype: torch.dtype, shape: Sequence[int], place: Sequence[int]) -> Tensor:
        if len(place) not in (3, 3 + SHOWN):
            raise ProtocolError(f"a tensor at {place!r}, where nothing can be", peer=self._peer)
        ticket, start, number, *shown = place
        if shown:
            self._open(number, _bytes(shown[1:]), shown[0])
        if (theirs := self._theirs.get(number)) is None:
            raise ProtocolError(f"a tensor in memory {number}, which was not shown", peer=self._peer)
        _, part = span(dtype, shape, (ticket, start), len(theirs.bytes_N), self._peer)
        taken = theirs.bytes_N[part].view(dtype).view(shape).clone()
        read = torch.cuda.Event()
        read.record(torch.cuda.current_stream(self._device))
        self._reading.append((ticket, read))
        return taken

    def told(self) -> list[int]:
        done: list[int] = []
        while self._reading and len(done) < MAX_TOLD and self._reading[0][1].query():
            done.append(self._reading.popleft()[0])
        return done

    def hear(self, tickets: Sequence[int]) -> None:
        for number, region in enumerate(self._ours):
            region.slots.free(ticket // MAX_REGIONS for ticket in tickets if ticket % MAX_REGIONS == number)

    def close(self) -> None:
        """Waits for the copies that are under way, which depend on nobody but this GPU."""
        with suppress(RuntimeError):  # of a GPU that has failed, which says so elsewhere
            while self._reading:
                self._reading.popleft()[1].synchronize()
        for memory in [*self._theirs.values(), *(region.memory for region in self._ours)]:
            try:
                memory.close()
            except RuntimeError:
                logger.warning("memory of the link with %s was not given back", self._peer, exc_info=True)
        self._theirs.clear()
        self._ours.clear()

    # -- regions ------------------------------------------------------------------------------------------------------

    def _slot(self, num_bytes: int) -> tuple[int, int, int] | None:
        """-> (region, ticket, start)."""
        for number, region in enumerate(self._ours):
            if (slot := region.slots.take(num_bytes)) is not None:
                return number, *slot
        has = sum(region.slots.size_bytes for region in self._ours)
        size = has
        while size < num_bytes:
            size *= 2
        if not self._ours or has + size > self._max_bytes or len(self._ours) == MAX_REGIONS:
            return None
        try:
            self._grow(size)
        except RuntimeError as error:
            logger.warning("payloads to %s cross the socket: %s", self._peer, error)
            self._max_bytes = has
            return None
        return self._slot(num_bytes)

    def _grow(self, size_bytes: int) -> None:
        self._ours.append(_Region(GpuMemory.allocate(size_bytes, self._device), Slots(size_bytes)))

    def _open(self, number: int, handle: bytes, size_bytes: int) -> None:
        """Of the peer; told once, or again by messages that were on their way together."""
        if number in self._theirs:
            return
        if not 0 <= number < MAX_REGIONS:
            raise ProtocolError(f"shows its memory number {number}", peer=self._peer)
        try:
            self._theirs[number] = GpuMemory.opened(handle, size_bytes, self._device)
        except (RuntimeError, ValueError) as error:
            raise ProtocolError(f"its memory cannot be used: {error}", peer=self._peer) from error


def _integers(handle: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(handle[i : i + 8]) for i in range(0, HANDLE_BYTES, 8))


def _bytes(integers: Sequence[int]) -> bytes:
    """Of no length that a handle has where they are no part of one."""
    return b"".join(integer.to_bytes(8) for integer in integers if 0 <= integer < 1 << 64)
