"""Where an expert group is at home when the device has no room for all: host memory, or files mapped into it.

    weights    layer 0: down_proj, gate_up_proj | layer 1: ...
    training   layer 0: gradient, exp_avg, exp_avg_sq of each | layer 1: ...

A group has a region for its weights and, once it is trained, one for its gradients and moments; in each the tensors lie
one behind the other, raw. A file has no name (it is unlinked while it is made), so nothing of it is left behind however
the process ends, and its room on the disk is reserved before anything is written there.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from actors.errors import CacheFull, InvalidInput

ALIGN_BYTES = 64
"""A cache line, and what vector instructions like."""

Shapes = Sequence[Mapping[str, tuple[int, ...]]]
"""By layer, of each parameter of one group: [group_size, ...]."""


class Store(Protocol):
    """Gives memory for homes."""

    def region(self, size_bytes: int, what: str, copied_for: object | None) -> Tensor:
        """uint8 [size_bytes], zeros; often copied to the device as long as `copied_for` lives. `CacheFull` if there is
        no room."""


class MemoryStore:
    """Host memory; what is often copied to a CUDA device is pinned, so that copies run beside everything else."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def region(self, size_bytes: int, what: str, copied_for: object | None) -> Tensor:
        region = torch.zeros(size_bytes, dtype=torch.uint8)
        if copied_for is not None and size_bytes and self._device.type == "cuda":
            _pin(region, copied_for)
        return region


class FileStore:
    """A file without a name for each region, below `directory`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as error:
            raise InvalidInput(
                f"cannot be made: {error.strerror}",
                field="experts.cache_dir",
                value=directory,
                remedy="name a directory on a local disk that the expert actors may write to",
            ) from None

    def region(self, size_bytes: int, what: str, copied_for: object | None) -> Tensor:
        if not size_bytes:
            return torch.zeros(0, dtype=torch.uint8)
        try:
            with tempfile.TemporaryFile(dir=self._directory) as file:
                # A write through the mapping to a full disk would end the process: the room is taken first.
                os.posix_fallocate(file.fileno(), 0, size_bytes)
                mapped = mmap.mmap(file.fileno(), size_bytes)
        except OSError as error:
            text = "no room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else os.strerror(error.errno or 0)
            raise CacheFull(
                f"{text} for {size_bytes / 1e6:,.1f} MB of {what}; nothing was changed",
                field="experts.cache_dir",
                value=self._directory,
                remedy="make room there, name another directory, or give the actor fewer groups",
            ) from None
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _pin(region: Tensor, owner: object) -> None:
    """While the owner lives. As `pin_memory`, which would round the size up to a power of two."""
    runtime = torch.cuda.cudart()
    address = region.data_ptr()
    code = runtime.cudaHostRegister(address, region.numel(), 0)
    if int(code) != 0:
        raise CacheFull(
            f"{region.numel() / 1e6:,.1f} MB of host memory cannot be pinned: CUDA error {int(code)}",
            field="experts.expert_cache_size",
            remedy="give the actor fewer groups, or set experts.cache_dir",
        )
    weakref.finalize(owner, runtime.cudaHostUnregister, address).atexit = False  # the process gives all back then


@dataclass(frozen=True)
class Training:
    """Of one parameter."""

    gradient: Tensor
    first: Tensor
    second: Tensor


class Home:
    """All tensors of the group in one place, in every layer. `name` is for errors."""

    def __init__(self, store: Store, shapes: Shapes, dtype: torch.dtype, name: str) -> None:
        self._store, self._shapes, self._dtype, self._name = store, shapes, dtype, name
        self.weights: list[dict[str, Tensor]] = [
            {name: parts[0] for name, parts in layer.items()} for layer in self._carved(1)
        ]
        self._training: list[dict[str, Training]] | None = None

    @property
    def is_trained(self) -> bool:
        return self._training is not None

    def train(self) -> None:
        """Makes room for gradients and moments. `CacheFull` if there is none; then nothing has changed."""
        if self._training is None:
            self._training = [{name: Training(*parts) for name, parts in layer.items()} for layer in self._carved(3)]

    def training(self, layer: int) -> dict[str, Training]:
        self.train()
        assert self._training is not None
        return self._training[layer]

    def zero_gradients(self) -> None:
        for layer in self._training or ():
            for part in layer.values():
                part.gradient.zero_()

    def num_bytes(self) -> int:
        """Of weights and gradients."""
        weights = sum(self._size(shape) for layer in self._shapes for shape in layer.values())
        return weights * (2 if self.is_trained else 1)

    def _carved(self, copies: int) -> list[dict[str, list[Tensor]]]:
        """A region with `copies` tensors of the shape of each parameter."""
        spaces = [self._space(shape) for layer in self._shapes for shape in layer.values() for _ in range(copies)]
        what = f"{'the weights' if copies == 1 else 'the gradients and moments'} of {self._name}"
        region = self._store.region(sum(spaces), what, self if copies == 1 else None)
        parts = iter(region.split(spaces))
        return [
            {name: [self._view(next(parts), shape) for _ in range(copies)] for name, shape in layer.items()}
            for layer in self._shapes
        ]

    def _view(self, part: Tensor, shape: tuple[int, ...]) -> Tensor:
        return part[: self._size(shape)].view(self._dtype).view(shape)

    def _size(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self._dtype.itemsize

    def _space(self, shape: tuple[int, ...]) -> int:
        size = self._size(shape)
        return size + -size % ALIGN_BYTES
