"""What a `cuda_ipc` carrier tells of its memory, with memory of the host in the GPU's place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.errors import ProtocolError
from actors.transport.message import Message, decode, encode
from actors.transport.payload import cuda_ipc
from actors.transport.payload.contract import PayloadSettings
from actors.transport.payload.cuda_ipc import FIRST_REGION_BYTES, CudaIpcCarrier
from actors.transport.payload.cuda_memory import HANDLE_BYTES

FIRST = FIRST_REGION_BYTES


class HostMemory:
    """By handle, which whoever has it can open."""

    all: dict[bytes, Tensor] = {}  # noqa: RUF012 - emptied by the fixture

    def __init__(self, bytes_N: Tensor, handle: bytes) -> None:
        self.bytes_N, self._handle = bytes_N, handle

    @classmethod
    def allocate(cls, size_bytes: int, device: object) -> HostMemory:
        handle = (len(cls.all) + 1).to_bytes(HANDLE_BYTES)
        cls.all[handle] = torch.zeros(size_bytes, dtype=torch.uint8)
        return cls(cls.all[handle], handle)

    @classmethod
    def opened(cls, handle: bytes, size_bytes: int, device: object) -> HostMemory:
        if len(handle) != HANDLE_BYTES or handle not in cls.all:
            raise RuntimeError("not a handle")
        return cls(cls.all[handle][:size_bytes], handle)

    def handle(self) -> bytes:
        return self._handle

    def close(self) -> None:
        self.bytes_N = torch.empty(0, dtype=torch.uint8)


class AtOnce:
    """A stream, and an event, that are always through."""

    def synchronize(self) -> None: ...

    def record(self, stream: object) -> None: ...

    def query(self) -> bool:
        return True


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[CudaIpcCarrier, CudaIpcCarrier]]:
    monkeypatch.setattr(HostMemory, "all", {})
    monkeypatch.setattr(cuda_ipc, "GpuMemory", HostMemory)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: AtOnce())
    monkeypatch.setattr(torch.cuda, "Event", AtOnce)
    settings = PayloadSettings("cuda_ipc", "cuda:0", gpu_region_bytes=4 * FIRST)
    here, there = CudaIpcCarrier(settings, "there"), CudaIpcCarrier(settings, "here")
    for carrier in (here, there):
        monkeypatch.setattr(carrier, "_device", torch.device("cpu"))
    here.meet(there.offer(), ())
    there.meet(here.offer(), ())
    yield here, there
    here.close()
    there.close()


def passed(here: CudaIpcCarrier, there: CudaIpcCarrier, *tensors: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """What comes of them, and how many frames it took beside the header."""
    frames = encode(Message("echo", {}, tensors, 1), here)
    message = decode([bytes(frame) for frame in frames], peer="here", max_bytes=1 << 30, carrier=there)
    return message.tensors, len(frames) - 1


def numbers(num_bytes: int) -> Tensor:
    return torch.arange(num_bytes, dtype=torch.int64).to(torch.uint8)


def test_memory_grows_with_what_is_to_go_and_is_used_again(ends: tuple[CudaIpcCarrier, CudaIpcCarrier]) -> None:
    here, there = ends
    for size in (7, FIRST, 2 * FIRST, 7, 2 * FIRST, FIRST, FIRST // 2):
        tensor = numbers(size)
        (got,), num_frames = passed(here, there, tensor)
        assert torch.equal(got, tensor)
        assert num_frames == 0
        passed(there, here)  # tells what was read
    assert sum(map(len, HostMemory.all.values())) == FIRST + 3 * FIRST


def test_several_in_one_message_may_lie_in_memory_that_is_shown_with_it(
    ends: tuple[CudaIpcCarrier, CudaIpcCarrier],
) -> None:
    here, there = ends
    tensors = (numbers(FIRST), numbers(FIRST // 2), numbers(FIRST // 2 - 512), torch.arange(5.0))
    got, num_frames = passed(here, there, *tensors)
    assert num_frames == 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, tensors, strict=True))


def test_what_does_not_fit_crosses_the_socket(ends: tuple[CudaIpcCarrier, CudaIpcCarrier]) -> None:
    here, there = ends
    tensors = tuple(numbers(FIRST) for _ in range(5))
    got, num_frames = passed(here, there, *tensors)
    assert num_frames == 1
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, tensors, strict=True))


def test_a_gpu_without_room_is_not_asked_again(
    ends: tuple[CudaIpcCarrier, CudaIpcCarrier], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = ends
    asked: list[int] = []

    def full(size_bytes: int, device: object) -> HostMemory:
        asked.append(size_bytes)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(HostMemory, "allocate", full)
    for _ in range(2):
        assert passed(here, there, numbers(FIRST), numbers(FIRST))[1] == 1
        passed(there, here)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "place",
    [
        (16, 0),
        (16, 0, 3),
        (16, 0, -1),
        (16, FIRST, 0),
        (17, 0, 1, FIRST),
        (17, 0, 1, FIRST, *[7] * 8),
        (17, 0, 1, FIRST, *[-7] * 8),
        (16 + 99, 0, 99, FIRST, *[0] * 7, 1),
    ],
)
def test_places_that_cannot_be_are_refused(ends: tuple[CudaIpcCarrier, CudaIpcCarrier], place: Any) -> None:
    with pytest.raises(ProtocolError, match="here"):
        ends[1].take(torch.uint8, (256,), place)
