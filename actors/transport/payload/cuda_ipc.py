"""`cuda_ipc`: two processes on one GPU. Each writes into a buffer of its own there, which the other maps; what arrives
is copied out at once, GPU to GPU, so that a buffer is full only for as long as copies take.

Nobody waits on the host: copies in are made on a stream of their own, behind what computes the tensor, an event that
both processes know orders them before the copies out, and a place is told back when the copy out of it is done.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from actors.errors import ProtocolError
from actors.transport.payload.contract import MAX_TOLD, Carrier, PayloadSettings, Place, span
from actors.transport.payload.cuda_memory import GpuMemory
from actors.transport.payload.slots import Slots

logger = logging.getLogger(__name__)


class CudaIpcCarrier(Carrier):
    kind = "cuda_ipc"

    def __init__(self, settings: PayloadSettings, peer: str) -> None:
        """RuntimeError where the GPU has no room."""
        device = torch.device(settings.device)
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._peer, self._from_bytes = peer, settings.carry_from_bytes
        self._slots = Slots(settings.gpu_region_bytes)
        self._ours = GpuMemory.allocate(settings.gpu_region_bytes, self._device)
        self._theirs: GpuMemory | None = None
        self._reading: deque[tuple[int, Any]] = deque()
        """Tickets of copies out, each with the event that ends it."""
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream()
            self._written = torch.cuda.Event(interprocess=True)
            self._written.record(self._stream)

    def offer(self) -> Mapping[str, Any]:
        return {
            "memory": self._ours.handle(),
            "num_bytes": self._slots.size_bytes,
            "written": bytes(self._written.ipc_handle()),
        }

    def meet(self, offer: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        self._theirs_written = torch.cuda.Event.from_ipc_handle(self._device, offer["written"])
        self._theirs = GpuMemory.opened(offer["memory"], int(offer["num_bytes"]), self._device)

    def put(self, tensor: Tensor) -> Place | None:
        num_bytes = tensor.numel() * tensor.element_size()
        if tensor.device != self._device or num_bytes < self._from_bytes:
            return None
        if (slot := self._slots.take(num_bytes)) is None:
            return None
        ticket, start = slot
        tensor = tensor.detach()
        room = self._ours.bytes_N[start : start + num_bytes].view(tensor.dtype).view(tensor.shape)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            room.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return ticket, start

    def ship(self) -> None:
        self._written.record(self._stream)

    def withdraw(self, places: Sequence[Place]) -> None:
        self.hear([place[0] for place in places])

    def take(self, dtype: torch.dtype, shape: Sequence[int], place: Sequence[int]) -> Tensor:
        if self._theirs is None:
            raise ProtocolError(f"a tensor at {place!r}, where nothing can be", peer=self._peer)
        bytes_N = self._theirs.bytes_N
        ticket, part = span(dtype, shape, place, len(bytes_N), self._peer)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._theirs_written)
        taken = bytes_N[part].view(dtype).view(shape).clone()
        read = torch.cuda.Event()
        read.record(stream)
        self._reading.append((ticket, read))
        return taken

    def told(self) -> list[int]:
        done: list[int] = []
        while self._reading and len(done) < MAX_TOLD and self._reading[0][1].query():
            done.append(self._reading.popleft()[0])
        return done

    def hear(self, tickets: Sequence[int]) -> None:
        self._slots.free(tickets)

    def close(self) -> None:
        """Waits for the copies that are under way, which depend on nobody but this GPU."""
        with suppress(RuntimeError):  # of a GPU that has failed, which says so elsewhere
            self._stream.synchronize()
            while self._reading:
                self._reading.popleft()[1].synchronize()
        for memory in (self._theirs, self._ours):
            try:
                if memory is not None:
                    memory.close()
            except RuntimeError:
                logger.warning("memory of the link with %s was not given back", self._peer, exc_info=True)
