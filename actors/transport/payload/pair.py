"""`nccl` (and `gloo`): each link has communicators of its own, of two ranks, over which payloads go in the order of the
headers. A rank that dies breaks its own links only.

Built from a store in a directory of this user alone, without torch.distributed's global group. One communicator for
each direction: on a single one a send to a peer that is sending too would wait for itself.
What a link needs of a backend is `PairBackend`; NCCL's differs from gloo's in nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from actors.errors import PeerLost, ProtocolError
from actors.transport.payload.contract import MAX_TOLD, Arrival, Carrier, PayloadSettings, Place, Way
from actors.transport.rundir import RunDirectory

_dist: Any = torch.distributed
"""Its stubs lack what is used here."""
logger = logging.getLogger(__name__)

BUILD_TIMEOUT_S = 30.0
TAKE_TIMEOUT_S = 30.0
"""A payload whose header is here is on its way: one that takes longer will not come."""
ABORT_NOTICED_S = 0.02
LOOK_EVERY_S = 1.0
"""Whether the device still waits for a payload."""
NCCL_CHANNELS = 16
"""Of a communicator, at most: each has buffers of its own on the GPU. A layer of 128 tokens of 7168 takes 66 us there
and back in a graph with 16 of them, 89 with 8, 115 with 4, between two H200. With 4 a communicator took 262 MiB (torch
2.11), what NCCL loads with its first included; a link has two."""


class PairBackend(ABC):
    """Two processes that send each other tensors."""

    kind: str = ""
    is_ordered = False
    """Whether calls take their place in the current stream, so that tensors need no header."""

    @abstractmethod
    def communicator(self, store: Any, rank: int) -> Any:
        """Of ranks 0 and 1. RuntimeError if the other does not come."""

    @abstractmethod
    def carries(self, tensor: Tensor) -> bool: ...

    @abstractmethod
    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised, for what arrives."""

    @abstractmethod
    def settle(self, work: Any, is_over: Callable[[], bool]) -> None:
        """Until what was received may be used. RuntimeError if the peer is gone, or it `is_over`."""

    def mark(self) -> Any:
        """What tells, by `query`, that what was received last is there, or that nobody waits for it any more. None
        where `settle` waits."""
        return None

    @abstractmethod
    def is_gone(self, work: Any) -> bool:
        """Whether nobody reads a tensor any more that was sent, and that the peer has told to have taken."""


class GlooPair(PairBackend):
    """Tensors of the host, over TCP on loopback. What NCCL's links are tested with where there is one GPU or none."""

    kind = "gloo"

    def communicator(self, store: Any, rank: int) -> Any:
        options = _dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=BUILD_TIMEOUT_S)
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        return _dist.ProcessGroupGloo(store, rank, 2, options)

    def carries(self, tensor: Tensor) -> bool:
        return tensor.is_cpu

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def is_gone(self, work: Any) -> bool:
        return True

    def settle(self, work: Any, is_over: Callable[[], bool]) -> None:
        """gloo cannot be told to stop waiting, so a thread of its own waits, which may be left behind."""
        done, errors = threading.Event(), list[RuntimeError]()

        def wait() -> None:
            try:
                if not work.wait(timedelta(seconds=TAKE_TIMEOUT_S)):
                    raise RuntimeError("gloo gave it up")
            except RuntimeError as error:
                errors.append(error)
            done.set()

        threading.Thread(target=wait, name="payload", daemon=True).start()
        while not done.wait(ABORT_NOTICED_S):
            if is_over():
                raise RuntimeError("the link has ended")
        if errors:
            raise errors[0]


class NcclPair(PairBackend):
    """Tensors of this GPU. Nothing waits on the host: what is received is ready for the current stream."""

    kind = "nccl"
    is_ordered = True

    def __init__(self, device: str) -> None:
        if not _dist.is_nccl_available():
            raise RuntimeError("this torch has no NCCL")
        found = torch.device(device)
        self._device = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
        # A peer that dies is the link's to notice: torch would end this whole process for it.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")

    def communicator(self, store: Any, rank: int) -> Any:
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=BUILD_TIMEOUT_S)
        options.config.max_ctas = NCCL_CHANNELS
        return _dist.ProcessGroupNCCL(store, rank, 2, options)

    def carries(self, tensor: Tensor) -> bool:
        return tensor.device == self._device

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def is_gone(self, work: Any) -> bool:
        return bool(work.is_completed())

    def settle(self, work: Any, is_over: Callable[[], bool]) -> None:
        work.wait()

    def mark(self) -> Any:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self._device))
        return mark


class PairCarrier(Carrier):
    """The link's end is rank 0, the server's rank 1. A place is the number of the payload in its direction.

    A tensor is kept until the peer tells that it has it; more than `region_bytes` on their way go over the socket.
    """

    def __init__(self, settings: PayloadSettings, peer: str, rank: int, backend: PairBackend) -> None:
        self.kind = backend.kind
        self._peer, self._rank, self._backend = peer, rank, backend
        self._from_bytes = settings.carry_from_bytes
        self._max_bytes = settings.region_bytes if backend.kind == "gloo" else settings.gpu_region_bytes
        self._directory = RunDirectory() if rank == 0 else None
        self._going: dict[int, tuple[Tensor, Any]] = {}
        self._there: set[int] = set()
        """Of those, what the peer has taken: on a GPU that is still to be done."""
        self._num_going_bytes = 0
        self._num_sent = self._num_taken = 0
        self._taken: list[int] = []
        self._coming: deque[Any] = deque()
        """Marks of what was received; who uses the link drops those that are through."""
        self._watch: threading.Thread | None = None
        self._ends: tuple[Any, Any] | None = None
        """Communicators for what is sent and for what comes; read once where both are used, since another thread may
        end them."""
        self._is_over = threading.Event()
        self._building: threading.Thread | None = None
        self._way: PairWay | None = None

    def offer(self) -> Mapping[str, Any]:
        return {"store": os.path.join(self._directory.path, "store")} if self._directory else {}

    def meet(self, offer: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Rank 0 waits until both are there; rank 1 has others to serve meanwhile."""
        for descriptor in descriptors:
            os.close(descriptor)
        path = os.path.join(self._directory.path, "store") if self._directory else str(offer["store"])
        self._building = threading.Thread(target=self._build, args=(path,), name="pair", daemon=True)
        self._building.start()
        if self._rank == 0 and self._built() is None:
            raise ProtocolError(f"no communicator with it within {BUILD_TIMEOUT_S:.0f} s", peer=self._peer)

    def put(self, tensor: Tensor) -> Place | None:
        num_bytes = tensor.numel() * tensor.element_size()
        if not self._backend.carries(tensor) or num_bytes < self._from_bytes:
            return None
        if self._num_going_bytes + num_bytes > self._max_bytes or (ends := self._built()) is None:
            return None
        tensor = tensor.detach().contiguous()
        try:
            work = ends[0].send([_bytes_of(tensor)], 1 - self._rank, 0)
        except RuntimeError:
            self.abort()
            return None
        self._num_sent += 1
        self._going[self._num_sent] = tensor, work
        self._num_going_bytes += num_bytes
        return (self._num_sent,)

    def take(self, dtype: torch.dtype, shape: Sequence[int], place: Sequence[int]) -> Tensor:
        self._num_taken += 1
        if list(place) != [self._num_taken] or math.prod(shape) == 0:
            self.abort()
            raise ProtocolError(f"payload {place!r} where {self._num_taken} is due", peer=self._peer)
        if (ends := self._built()) is None:
            raise PeerLost("the way of its payloads has ended", peer=self._peer)
        try:
            room = self._backend.room(shape, dtype)
            if not dtype.is_floating_point:
                # Should it never come, the device goes on with what is here. Where Triton does not work, an index out
                # of range would end every computation of this process.
                room.zero_()
        except BaseException:  # no memory: what comes next would be taken for this
            self.abort()
            raise
        try:
            work = ends[1].recv([_bytes_of(room)], 1 - self._rank, 0)
            self._backend.settle(work, self._is_over.is_set)
        except RuntimeError as error:
            self.abort()
            raise PeerLost(f"its payload did not come: {error}", peer=self._peer) from None
        self._taken.append(self._num_taken)
        self._have_watched(self._backend.mark())
        return room

    def _have_watched(self, mark: Any) -> None:
        """Whoever waits for the device may be the one that would see the link end, and waits for ever then."""
        if mark is None:
            return
        while self._coming and self._coming[0].query():
            self._coming.popleft()
        self._coming.append(mark)
        if self._watch is None:
            self._watch = threading.Thread(target=self._end_late, name=f"payloads-{self._peer}", daemon=True)
            self._watch.start()

    def _end_late(self) -> None:
        first, since = None, 0.0
        while not self._is_over.wait(LOOK_EVERY_S):
            found = next(iter(self._coming.copy()), None)
            if found is None or found.query():
                first = None
            elif found is not first:
                first, since = found, time.monotonic()
            elif time.monotonic() - since > TAKE_TIMEOUT_S:
                logger.warning("a payload of %s has not come in %.0f s", self._peer, TAKE_TIMEOUT_S)
                self.abort()

    def told(self) -> list[int]:
        told, self._taken = self._taken[:MAX_TOLD], self._taken[MAX_TOLD:]
        return told

    def hear(self, tickets: Sequence[int]) -> None:
        self._there.update(tickets)
        for ticket in list(self._there):
            sent = self._going.get(ticket)  # which the link's end clears, in another thread
            if sent is None:
                self._there.discard(ticket)
            elif self._backend.is_gone(sent[1]):
                self._going.pop(ticket, None)
                self._num_going_bytes -= sent[0].numel() * sent[0].element_size()

    @property
    def over(self) -> threading.Event | None:
        return self._is_over if self._backend.is_ordered else None

    def way(self) -> Way | None:
        if self._way is None and self._backend.is_ordered and (ends := self._built()) is not None:
            self._way = PairWay(*ends, self._peer, 1 - self._rank, self._is_over, self.abort)
        return self._way

    def abort(self) -> None:
        """NCCL takes half a second to abort, beside whatever this thread goes on with."""
        if not self._is_over.is_set():
            self._is_over.set()
            # No daemon: a process that ends in the middle of it would be aborted itself.
            threading.Thread(target=self._end, name="abort-pair").start()

    def close(self) -> None:
        self.abort()

    def _built(self) -> tuple[Any, Any] | None:
        """Waits for it, which is short: the peer has built its half before it sends anything."""
        if self._building is None:
            return None
        if not self._is_over.is_set():
            self._building.join(BUILD_TIMEOUT_S)
        return None if self._is_over.is_set() else self._ends

    def _build(self, path: str) -> None:
        try:
            store = _dist.FileStore(path, 2)
            there, back = (
                self._backend.communicator(_dist.PrefixStore(name, store), self._rank) for name in ("there", "back")
            )
            self._greet(there, sender=0)
            self._greet(back, sender=1)
            self._ends = (there, back) if self._rank == 0 else (back, there)
        except RuntimeError as error:
            logger.warning("no %s with %s: %s", self.kind, self._peer, error)

    def _greet(self, way: Any, sender: int) -> None:
        """The first tensor makes the connection, both ends waiting: now, and one direction after the other."""
        one = self._backend.room((1,), torch.uint8)
        pass_on = way.send if self._rank == sender else way.recv
        self._backend.settle(pass_on([one], 1 - self._rank, 0), self._is_over.is_set)

    def _end(self) -> None:
        if self._building is not None:
            self._building.join(BUILD_TIMEOUT_S)
        ends, self._ends = self._ends, None
        if ends is not None and self._way is not None:
            self._end_way(self._way, ends)
        elif ends is not None:
            for communicator in ends:
                _abort(communicator)
        self._going.clear()  # before the communicators go, which still know of what was being sent
        if self._directory:
            self._directory.remove()

    @staticmethod
    def _end_way(way: PairWay, ends: Sequence[Any]) -> None:
        """Both communicators at once: each waits for the graphs that hold it, and a graph for the other."""
        aborts = [threading.Thread(target=_abort, args=(end,)) for end in ends]
        for abort in aborts:
            abort.start()
        way.let_go()
        for abort in aborts:
            abort.join()
        way.forget()


class PairWay(Way):
    def __init__(
        self, there: Any, here: Any, peer: str, rank: int, ended: threading.Event, end: Callable[[], None]
    ) -> None:
        """`there` and `here`: communicators; `rank`: of the peer; `ended` and `end`: of the carrier."""
        self._out, self._in, self._peer, self._rank, self._ended, self._end = there, here, peer, rank, ended, end
        self._drops: list[Callable[[], None]] = []

    @property
    def is_over(self) -> bool:
        return self._ended.is_set()

    def send(self, tensor: Tensor) -> Arrival:
        communicator = self._known(self._out)
        with self._until_over():
            arrival: Arrival = communicator.send([_bytes_of(tensor)], self._rank, 0)
        return arrival

    def receive(self, room: Tensor) -> Arrival:
        communicator = self._known(self._in)
        with self._until_over():
            arrival: Arrival = communicator.recv([_bytes_of(room)], self._rank, 0)
        return arrival

    def end(self) -> None:
        self._end()

    def when_over(self, drop: Callable[[], None]) -> None:
        self._drops.append(drop)
        if self.is_over:  # perhaps since a moment ago, and who calls may hold what `drop` waits for
            threading.Thread(target=drop, name="let-go", daemon=True).start()

    def let_go(self) -> None:
        """Of all graphs, once the communicators are being ended."""
        for drop in list(self._drops):
            drop()

    def forget(self) -> None:
        """The communicators have ended: torch wants them gone before the process ends."""
        self._out = self._in = None

    def _known(self, communicator: Any) -> Any:
        if communicator is None:
            raise self._lost()
        return communicator

    @contextlib.contextmanager
    def _until_over(self) -> Iterator[None]:
        """What an ended communicator says is that the peer is lost; another thread may end it at any moment."""
        try:
            yield
        except RuntimeError as error:
            if not self.is_over:
                raise
            raise self._lost() from error

    def _lost(self) -> PeerLost:
        return PeerLost("the way to it has ended", peer=self._peer)


def _abort(communicator: Any) -> None:
    if communicator is not None:
        with contextlib.suppress(RuntimeError):
            communicator.abort()


def _bytes_of(tensor: Tensor) -> Tensor:
    """As backends know them all, whatever the dtype is. The tensor is contiguous."""
    return tensor.reshape(-1).view(torch.uint8)
