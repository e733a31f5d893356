"""Where the payloads of a link go, and how the memory that they go through is divided."""

from __future__ import annotations

import random

import pytest

from actors.errors import InvalidInput, ProtocolError
from actors.transport.payload.choice import End, choose, new_carrier
from actors.transport.payload.contract import AUTO
from actors.transport.payload.slots import ALIGN_BYTES, Slots

CPU, OTHER_CPU = End("auto", 1), End("auto", 2)
GPU, SAME_GPU, OTHER_GPU = End("auto", 1, "gpu-0"), End("auto", 2, "gpu-0"), End("auto", 2, "gpu-1")


def of(end: End, wish: str) -> End:
    return End(wish, end.pid, end.gpu)


@pytest.mark.parametrize(
    ("here", "there", "on_one_host", "kinds"),
    [
        (CPU, OTHER_CPU, True, ("shm",)),
        (CPU, CPU, True, ("shm",)),
        (CPU, OTHER_CPU, False, ()),
        (GPU, SAME_GPU, True, ("cuda_ipc", "shm")),
        (GPU, OTHER_GPU, True, ("cuda_ipc", "shm")),
        (GPU, End("auto", 1, "gpu-1"), True, ("shm",)),
        (GPU, OTHER_CPU, True, ("shm",)),
        (GPU, OTHER_GPU, False, ()),
        (of(GPU, "cuda_ipc"), OTHER_GPU, True, ("cuda_ipc",)),
        (of(GPU, "socket"), SAME_GPU, True, ()),
        (GPU, of(SAME_GPU, "shm"), True, ("shm",)),
        (of(GPU, "nccl"), OTHER_GPU, True, ("nccl",)),
        (CPU, End(), True, ()),
    ],
)
def test_the_kind_follows_from_where_the_ends_are(
    here: End, there: End, on_one_host: bool, kinds: tuple[str, ...]
) -> None:
    assert choose(here, there, on_one_host=on_one_host) == kinds


@pytest.mark.parametrize(
    ("here", "there", "on_one_host", "why"),
    [
        (of(CPU, "shm"), of(OTHER_CPU, "shm"), False, "different hosts"),
        (of(CPU, "cuda_ipc"), of(OTHER_CPU, "cuda_ipc"), True, "compute on GPUs"),
        (of(GPU, "cuda_ipc"), of(OTHER_CPU, "cuda_ipc"), True, "compute on GPUs"),
        (of(GPU, "cuda_ipc"), of(GPU, "cuda_ipc"), True, "one process"),
        (of(GPU, "nccl"), of(SAME_GPU, "nccl"), True, "two GPUs"),
        (of(CPU, "shm"), of(OTHER_CPU, "socket"), True, "other end wants socket"),
        (of(CPU, "shm"), of(OTHER_CPU, "gloo"), True, "other end wants gloo"),
        (of(CPU, "pigeon"), OTHER_CPU, True, "no such kind"),
    ],
)
def test_a_kind_that_is_demanded_and_cannot_be_is_refused(here: End, there: End, on_one_host: bool, why: str) -> None:
    with pytest.raises(InvalidInput, match=rf"links\.payload: .*{why}"):
        choose(here, there, on_one_host=on_one_host)


@pytest.mark.parametrize("told", [7, {}, {"wish": "auto"}, {"wish": "auto", "pid": "x", "gpu": ""}])
def test_a_malformed_end_is_refused(told: object) -> None:
    with pytest.raises(ProtocolError, match="stranger"):
        End.told(told, "stranger")


def test_an_end_is_told_whole() -> None:
    assert End.told(GPU.fields(), "x") == GPU
    assert End.told(None, "x").wish == "socket"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ProtocolError, match="pigeon"):
        new_carrier("pigeon", AUTO, "stranger", 0)


def test_slots_never_overlap_and_all_room_comes_back() -> None:
    draw, slots = random.Random(0), Slots(1 << 16)
    open_slots: dict[int, range] = {}
    refused = 0
    for _ in range(2000):
        if open_slots and draw.random() < 0.5:
            ticket = draw.choice(list(open_slots))
            del open_slots[ticket]
            slots.free([ticket, ticket, 10**9])
        size = draw.randrange(1, 1 << 13)
        if (taken := slots.take(size)) is None:
            refused += 1
            continue
        ticket, start = taken
        mine = range(start, start + size)
        assert start % ALIGN_BYTES == 0
        assert mine.stop <= 1 << 16
        assert all(mine.stop <= other.start or other.stop <= mine.start for other in open_slots.values())
        assert ticket not in open_slots
        open_slots[ticket] = mine
    assert refused
    slots.free(open_slots)
    assert len(slots) == 0
    assert slots.take(1 << 16) is not None


def test_a_ticket_told_late_frees_nothing_else() -> None:
    slots = Slots(1 << 10)
    first = slots.take(1 << 10)
    assert first is not None
    slots.free([first[0]])
    assert slots.take(1 << 10) is not None
    slots.free([first[0]])
    assert slots.take(1) is None
    assert slots.high_bytes == 1 << 10
