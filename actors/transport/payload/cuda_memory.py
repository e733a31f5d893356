"""GPU memory that another process of this host can map, also where it does not see this GPU among its own devices:
allocated by the driver itself, beside torch's allocator.

torch can share its own tensors, but then it keeps a count of the readers in /dev/shm and frees nothing of a reader that
was killed. Here a handle is 64 bytes, and memory goes when its owner gives it back.
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

HANDLE_BYTES = 64
_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * HANDLE_BYTES),)


class GpuMemory:
    """`bytes_N`, uint8 [N], on a device. It ends with `close`, whoever still has the tensor."""

    def __init__(self, pointer: int, size_bytes: int, device: torch.device, *, is_own: bool) -> None:
        self._pointer, self._device, self._is_own = pointer, device, is_own
        self.bytes_N = _tensor_at(pointer, size_bytes, device)

    @classmethod
    def allocate(cls, size_bytes: int, device: torch.device) -> GpuMemory:
        """RuntimeError where there is no room."""
        pointer = ctypes.c_uint64()
        with _current(device) as cuda:
            _check(cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size_bytes)), "allocate memory")
        return cls(pointer.value, size_bytes, device, is_own=True)

    @classmethod
    def opened(cls, handle: bytes, size_bytes: int, device: torch.device) -> GpuMemory:
        """What another process has allocated. RuntimeError if it is not there, ValueError if this is no handle."""
        if len(handle) != HANDLE_BYTES:
            raise ValueError(f"a handle has {HANDLE_BYTES} bytes, got {len(handle)}")
        pointer = ctypes.c_uint64()
        with _current(device) as cuda:
            shown = _Handle.from_buffer_copy(handle)
            _check(cuda.cuIpcOpenMemHandle_v2(ctypes.byref(pointer), shown, _ENABLE_PEER_ACCESS), "map memory")
        return cls(pointer.value, size_bytes, device, is_own=False)

    def handle(self) -> bytes:
        """For another process of this host, whose GPU is this one or reaches it."""
        shown = _Handle()
        with _current(self._device) as cuda:
            _check(cuda.cuIpcGetMemHandle(ctypes.byref(shown), ctypes.c_uint64(self._pointer)), "share memory")
        return bytes(shown)

    def close(self) -> None:
        """More than once does nothing more."""
        pointer, self._pointer = ctypes.c_uint64(self._pointer), 0
        if pointer.value:
            self.bytes_N = torch.empty(0, dtype=torch.uint8)
            with _current(self._device) as cuda:
                free = cuda.cuMemFree_v2 if self._is_own else cuda.cuIpcCloseMemHandle
                _check(free(pointer), "give memory back")


class _Shown:
    def __init__(self, pointer: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


def _tensor_at(pointer: int, size_bytes: int, device: torch.device) -> Tensor:
    return torch.as_tensor(_Shown(pointer, size_bytes), device=device)


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@contextmanager
def _current(device: torch.device) -> Iterator[Any]:
    """The driver, with torch's context of the device as this thread's."""
    cuda = _driver()
    _check(cuda.cuCtxPushCurrent_v2(_context(device.index)), "take the device's context")
    try:
        yield cuda
    finally:
        cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


@functools.cache
def _context(index: int) -> ctypes.c_void_p:
    """Held until this process ends: torch may not have it yet, and with its last user all its memory would go."""
    torch.cuda.init()
    cuda, number, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    _check(cuda.cuDeviceGet(ctypes.byref(number), index), "find the device")
    _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), number), "take the device's context")
    return context


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA could not {what}: {(text.value or b'error %d' % code).decode()}")
