"""The carrier contract: another way than the socket for the large tensors of one link.

The header stays on the socket, with its order, ids, deadlines and keys, and says of each tensor where it is: its
**place**, a few integers that begin with the **ticket** of this sending. What `put` leaves at a place stays there until
the peer has told the ticket back, which it does with any later header, once nobody there reads the tensor any more.
A carrier never waits for room: without it the tensor goes over the socket.

Both ends make one carrier of the same kind, show each other what `offer` and `descriptors` give, and `meet`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from actors.errors import ProtocolError

Wish = Literal["auto", "socket", "shm", "cuda_ipc", "nccl", "gloo"]
Place = tuple[int, ...]

MAX_TOLD = 1024
"""Tickets that one header tells back, at most; others wait for the next."""


@dataclass(frozen=True)
class PayloadSettings:
    """What one end of a link wants of its payloads."""

    wish: Wish = "auto"
    device: str = "cpu"
    """Where this end computes, e.g. `cuda` or `cuda:1`."""
    region_bytes: int = 256 << 20
    """Of host memory that each end may fill with tensors that the peer still reads; memory is taken as it is used."""
    gpu_region_bytes: int = 512 << 20
    """The same on a GPU, where memory that was taken is kept as long as the link is open."""
    carry_from_bytes: int = 1 << 16
    """Smaller tensors cross the socket, but for those of `cuda_ipc`."""


AUTO = PayloadSettings()
SOCKET_ONLY = PayloadSettings("socket")


class Way(abc.ABC):
    """Tensors straight from one process to the other without a word about them, since both know what comes next.
    `PeerLost` once it is over.

    Calls return at once: they take their place in the current CUDA stream, and a graph can hold them. Both ends must
    make the same ones in the same order; what a carrier sends between them counts too.
    """

    @property
    @abc.abstractmethod
    def is_over(self) -> bool:
        """The peer is gone, or the link has ended. What waits for it on the device then ends, with anything in it."""

    @abc.abstractmethod
    def send(self, tensor: Tensor) -> Arrival:
        """Of a tensor that is contiguous, and stays as it is until it has gone."""

    @abc.abstractmethod
    def receive(self, room: Tensor) -> Arrival:
        """Into a tensor that is contiguous."""

    @abc.abstractmethod
    def end(self) -> None:
        """This end gives it up. Any thread; does not wait."""

    @abc.abstractmethod
    def when_over(self, drop: Callable[[], None]) -> None:
        """`drop` is called then, in another thread than this, also if it is over already: it must let go of every graph
        that holds a call of this way, for which the end of the communicator waits. More than once may happen."""


class Arrival(Protocol):
    """Of one tensor, on its way."""

    def wait(self) -> object:
        """The current stream goes on once it is there, or has gone."""


class Carrier(abc.ABC):
    """One end's half. Used by the thread that uses the link; tensors that it gave may be dropped in any thread."""

    kind: str = ""

    @abc.abstractmethod
    def offer(self) -> Mapping[str, Any]:
        """Plain values that the peer needs in order to `meet` this end."""

    def descriptors(self) -> Sequence[int]:
        """Open files that the peer needs as well; they stay this end's own."""
        return ()

    @abc.abstractmethod
    def meet(self, offer: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Takes what the peer has shown, and its descriptors for good. `ProtocolError`, OSError if that is no use."""

    @abc.abstractmethod
    def put(self, tensor: Tensor) -> Place | None:
        """Sends one tensor, which nobody changes (contract of Message); None if this one is to cross the socket."""

    @property
    def is_late(self) -> bool:
        """Whether something of what was put is not at its place before `finish`."""
        return False

    def finish(self) -> None:
        """Everything is at its place afterwards."""

    def ship(self) -> None:
        """All tensors of a message were put, and its header follows."""

    @abc.abstractmethod
    def take(self, dtype: torch.dtype, shape: Sequence[int], place: Sequence[int]) -> Tensor:
        """What the peer put there, read-only. Called once for each place, in the order of the headers. `ProtocolError`
        for one that cannot be, `PeerLost` where it will not come. The peer may still be about to `finish` it."""

    def told(self) -> list[int]:
        """For the next header: tickets of the peer that it may forget, at most `MAX_TOLD`."""
        return []

    def hear(self, tickets: Sequence[int]) -> None:
        """Counterpart of `told`."""

    @property
    def over(self) -> Event | None:
        """Set when tensors that it gave may never come to hold what they should: they come on the device, where the
        current stream waits for them, and the end of the carrier ends that wait. None where they are there at once."""
        return None

    def way(self) -> Way | None:
        """For tensors that need no header. None where there is none."""
        return None

    def abort(self) -> None:
        """The peer is gone or out of reach: a `take` that waits ends with `PeerLost`. Any thread; does not wait."""

    def close(self) -> None:
        """The link has ended. Tensors that were taken stay valid. More than once does nothing more."""


def span(
    dtype: torch.dtype, shape: Sequence[int], place: Sequence[int], region_bytes: int, peer: str
) -> tuple[int, slice]:
    """-> (ticket, bytes) of a tensor that the peer says to have put at (ticket, start) of its region. `ProtocolError`
    where none can be, before anything is read."""
    if len(place) != 2:
        raise ProtocolError(f"a tensor at {place!r}, where nothing can be", peer=peer)
    num_bytes = math.prod(shape) * dtype.itemsize
    ticket, start = place
    if not 0 <= start < start + num_bytes <= region_bytes or start % dtype.itemsize:
        raise ProtocolError(f"a tensor of {num_bytes} bytes at {start}, outside of its memory", peer=peer)
    return ticket, slice(start, start + num_bytes)
