"""`shm`: both ends on one host. Each writes into a memory file of its own, which the other maps read-only; what arrives
is a view of it, without a copy.

The file is a memfd: it has no name that anybody could open, no room of /dev/shm is taken, and it is gone with the last
process that maps it, however that ends. It is sealed against shrinking, so that no peer can take pages away that are
being read. Its descriptor crosses a unix socket that lies in a directory of this user alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from actors.errors import ProtocolError
from actors.transport.payload.contract import MAX_TOLD, Carrier, PayloadSettings, Place, span
from actors.transport.payload.slots import Slots

LATE_FROM_BYTES = 1 << 20
"""Tensors of the host of so many bytes are copied when their header has gone: the peer wakes up and reads it meanwhile,
which takes as long as copying half a megabyte."""
KEEP_BYTES = 64 << 20
"""Memory beyond this goes back to the system whenever a region is wholly free."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class ShmCarrier(Carrier):
    kind = "shm"

    def __init__(self, settings: PayloadSettings, peer: str) -> None:
        """OSError where the system gives no such memory."""
        self._peer, self._from_bytes = peer, settings.carry_from_bytes
        self._slots, self._leases = Slots(settings.region_bytes), _Leases()
        self._theirs: mmap.mmap | None = None
        self._left: list[tuple[Tensor, int, Tensor]] = []
        """What `finish` is to copy: the region, where in it, and what. Who closes the link meanwhile unmaps nothing."""
        file = os.memfd_create("moe-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(file, settings.region_bytes)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
            self._ours: mmap.mmap | None = mmap.mmap(file, settings.region_bytes)
            self._shown = _read_only(file)
        finally:
            os.close(file)
        self._start: Tensor | None = torch.frombuffer(self._ours, dtype=torch.uint8)

    def offer(self) -> Mapping[str, Any]:
        return {}

    def descriptors(self) -> Sequence[int]:
        return (self._shown,)

    def meet(self, offer: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        try:
            if len(descriptors) != 1 or not _is_sealed(descriptors[0]):
                raise ProtocolError("showed no sealed memory", peer=self._peer)
            self._theirs = mmap.mmap(descriptors[0], os.fstat(descriptors[0]).st_size, prot=mmap.PROT_READ)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def put(self, tensor: Tensor) -> Place | None:
        num_bytes, region = tensor.numel() * tensor.element_size(), self._start
        if region is None or num_bytes < self._from_bytes or (slot := self._slots.take(num_bytes)) is None:
            return None
        ticket, start = slot
        if not (tensor.is_cpu and tensor.is_contiguous()):
            room = region[start : start + num_bytes].view(tensor.dtype).view(tensor.shape)
            room.copy_(tensor.detach())
        elif num_bytes < LATE_FROM_BYTES:
            _copy(region, start, tensor)
        else:
            self._left.append((region, start, tensor))
        return ticket, start

    @property
    def is_late(self) -> bool:
        return bool(self._left)

    def finish(self) -> None:
        left, self._left = self._left, []
        for region, start, tensor in left:
            _copy(region, start, tensor)

    def take(self, dtype: torch.dtype, shape: Sequence[int], place: Sequence[int]) -> Tensor:
        theirs = self._theirs
        ticket, part = span(dtype, shape, place, 0 if theirs is None else len(theirs), self._peer)
        view = memoryview(theirs)[part]  # type: ignore[arg-type]
        self._leases.watch(ticket, view)
        flat = torch.frombuffer(view, dtype=dtype)
        return flat if len(shape) == 1 else flat.view(shape)

    def told(self) -> list[int]:
        return self._leases.ended()

    def hear(self, tickets: Sequence[int]) -> None:
        self._slots.free(tickets)
        ours = self._ours
        if ours is not None and not self._slots and self._slots.high_bytes > KEEP_BYTES:
            with suppress(OSError):  # where the system cannot, it stays
                ours.madvise(mmap.MADV_REMOVE, KEEP_BYTES, len(ours) - KEEP_BYTES)
            self._slots.forget_high()

    def close(self) -> None:
        """The memory is unmapped when the last view of it is gone; ours at once, and its handle with it, whoever keeps
        the link for a while yet."""
        self._theirs = self._ours = self._start = None
        shown, self._shown = self._shown, -1
        if shown >= 0:
            os.close(shown)


class _Leases:
    """Tickets of views that somebody may still read. A view lives as long as any tensor that was made of it."""

    def __init__(self) -> None:
        self._open: dict[int, weakref.ref[memoryview]] = {}
        self._ended: deque[int] = deque()

    def watch(self, ticket: int, view: memoryview) -> None:
        is_open, ended = self._open, self._ended

        def gone(_: object) -> None:
            """In whichever thread drops the last tensor, at any moment: no lock may be taken here."""
            is_open.pop(ticket, None)
            ended.append(ticket)

        is_open[ticket] = weakref.ref(view, gone)

    def ended(self) -> list[int]:
        """Since the last call, at most `MAX_TOLD`."""
        return [self._ended.popleft() for _ in range(min(len(self._ended), MAX_TOLD))]


def _copy(region: Tensor, start: int, tensor: Tensor) -> None:
    """By one thread: torch would divide it among all of its threads, and wait for the last to wake up."""
    ctypes.memmove(region.data_ptr() + start, tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _read_only(file: int) -> int:
    """What the peer gets: nothing that it could write by mistake."""
    try:
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # no /proc here
        return os.dup(file)


def _is_sealed(file: int) -> bool:
    try:
        return bool(fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False
