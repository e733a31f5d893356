"""Snapshots kept in actors' memory, as checkpoints whose shards are there instead of in storage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch

from actors.errors import MoeClusterError
from actors.peer_snapshots import Keeper
from actors.snapshots import ExpertKey, SavedState
from actors.transport.contract import Link
from actors.transport.message import Message
from actors.values import Address
from cluster.checkpoint.manifest import Shard
from cluster.checkpoint.names import Folder
from cluster.checkpoint.reader import Reader
from cluster.checkpoint.state import ShardContent, read_experts, read_router
from cluster.checkpoint.store import Found
from cluster.checkpoint.tensors import pieces

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Holder:
    """An actor that keeps a part of a snapshot."""

    name: str
    pid: int
    """Names of routers are used again, and the next one has nothing."""
    address: Address
    """Where others ask it for the part."""


@dataclass(frozen=True)
class KeptDraft:
    """A snapshot that is being made; goes to the actors that make it."""

    id: str
    version: int
    """Committed steps."""
    last: str
    """The snapshot that stays until this one is complete; empty: none."""


@dataclass(frozen=True)
class Kept(Found):
    """A snapshot that was complete. Its manifest names a shard for each part."""

    id: str
    holders: Mapping[str, tuple[Holder, ...]]
    """Of each part: who wrote it first, then the peer."""


@dataclass(frozen=True)
class Told:
    """Of the last complete snapshot, to every actor, for a coordinator that is new to them."""

    kept: Kept
    run: int
    """It may be gone back to as long as this run goes on: other weights, and returns to anything else, begin others."""


def later(before: Told | None, told: Told) -> Told:
    """Which of them holds: nobody waits for what actors are told, and it may come in another order."""
    return told if before is None or _age(told) >= _age(before) else before


def _age(told: Told) -> tuple[int, int, float]:
    return told.run, told.kept.manifest.version, told.kept.manifest.created_s


@dataclass(frozen=True)
class Way:
    """How an actor reaches parts that it does not keep itself."""

    open_link: Callable[[str, Address], Link]
    timeout_s: float
    """For one piece."""
    piece_bytes: int
    """Largest message."""


def keep_part(
    draft: KeptDraft, name: str, content: ShardContent, keeper: Keeper, peer: Holder | None, way: Way
) -> Shard:
    """Here and at the peer. `LinkError` if that one cannot be reached: nothing comes of the snapshot then."""
    size = sum(len(piece) for piece in pieces(*content))
    keeper.begin(draft.id, name, size, last=draft.last)
    with ExitStack() as stack:
        link = None
        if peer is not None:
            link = way.open_link(peer.name, peer.address)
            stack.callback(link.close)
            fields = {"snapshot": draft.id, "part": name, "num_bytes": size, "last": draft.last}
            link.call(Message("keep", fields), way.timeout_s)
        start = 0
        for piece in _cut(pieces(*content), way.piece_bytes):
            bytes_N = torch.frombuffer(piece, dtype=torch.uint8)
            keeper.write(draft.id, name, start, bytes_N)
            if link is not None:
                fields = {"snapshot": draft.id, "part": name, "start": start}
                link.call(Message("keep_piece", fields, (bytes_N,)), way.timeout_s)
            start += len(piece)
    return Shard(name, size, "")


def _cut(found: Iterator[memoryview], limit: int) -> Iterator[memoryview]:
    for piece in found:
        writable = memoryview(bytearray(piece)) if piece.readonly else piece  # torch warns of the others
        for start in range(0, len(piece), limit):
            yield writable[start : start + limit]


@contextmanager
def saved_experts(found: Found, keeper: Keeper, way: Way) -> Iterator[SavedState[ExpertKey]]:
    """What the experts were, from storage or from memory, here and elsewhere. Errors as `read_experts`."""
    with _reader_of(found, keeper, way) as reader:
        yield read_experts(found, reader)


@contextmanager
def saved_router(found: Found, keeper: Keeper, way: Way) -> Iterator[SavedState[str]]:
    """As `saved_experts`."""
    with _reader_of(found, keeper, way) as reader:
        yield read_router(found, reader)


@contextmanager
def _reader_of(found: Found, keeper: Keeper, way: Way) -> Iterator[Reader | None]:
    """None of what is in storage."""
    if not isinstance(found, Kept):
        yield None
        return
    with _Parts(found, keeper, way) as parts:
        yield parts.reader()


class _Parts:
    """Bytes of parts: what is here from here, else from whoever is left of its holders."""

    def __init__(self, kept: Kept, keeper: Keeper, way: Way) -> None:
        self._kept, self._keeper, self._way = kept, keeper, way
        self._links: dict[str, Link] = {}

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *error: object) -> None:
        for link in self._links.values():
            link.close()

    def reader(self) -> Reader:
        folder = Folder(0, self._kept.manifest.version, "00000000", "step")
        return Reader(self, folder, self._kept.manifest.shards)

    def read(self, folder: Folder, file: str, start: int = 0, end: int | None = None) -> bytes:
        part = file.removesuffix(".safetensors")
        size = next(shard.num_bytes for shard in self._kept.manifest.shards if shard.name == part)
        end = size if end is None else min(end, size)
        spans = [(a, min(end, a + self._way.piece_bytes)) for a in range(start, end, self._way.piece_bytes)]
        return b"".join(self._piece(part, *span) for span in spans)

    def _piece(self, part: str, start: int, end: int) -> bytes:
        if self._keeper.has(self._kept.id, part):
            with suppress(MoeClusterError):  # it may go at this moment, for a newer one
                return _bytes(self._keeper.read(self._kept.id, part, start, end))
        errors = []
        for holder in self._kept.holders[part]:
            try:
                return self._ask(holder, part, start, end)
            except MoeClusterError as error:
                logger.warning("%s does not give part %s: %s", holder.name, part, error)
                self._drop(holder)
                errors.append(str(error))
        raise OSError("; ".join(errors))

    def _ask(self, holder: Holder, part: str, start: int, end: int) -> bytes:
        if holder.name not in self._links:
            self._links[holder.name] = self._way.open_link(holder.name, holder.address)
        fields = {"snapshot": self._kept.id, "part": part, "start": start, "end": end}
        (bytes_N,) = self._links[holder.name].call(Message("kept_piece", fields), self._way.timeout_s).tensors
        return _bytes(bytes_N)

    def _drop(self, holder: Holder) -> None:
        if (link := self._links.pop(holder.name, None)) is not None:
            link.close()


def _bytes(bytes_N: torch.Tensor) -> bytes:
    return bytes_N.numpy().tobytes()


def alive(kept: Kept, living: Mapping[str, int]) -> bool:
    """Whether every part of it is still with somebody. `living`: actor -> process id."""
    return all(any(living.get(holder.name) == holder.pid for holder in held) for held in kept.holders.values())
