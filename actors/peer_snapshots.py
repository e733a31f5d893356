"""Snapshots in host memory, of this actor and of others: what a recovery goes back to before it looks at the disk.

A snapshot consists of parts, one of each actor that has state. A part is the bytes of the shard that a checkpoint would
have of it; its writer keeps them, and so does a peer on another node. Memory, at rest: one's own part and those that
one keeps for others, each as large as weights and both moments. While the next snapshot is being made there are two
generations, and the tensors that it is made of.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.errors import InvalidInput
from actors.transport.contract import answered
from actors.transport.message import Message

logger = logging.getLogger(__name__)

OPS = frozenset({"keep", "keep_piece", "kept_piece"})
"""Of the messages that `Keeper.handle` answers."""


@dataclass
class _Part:
    bytes_N: Tensor
    """uint8."""
    num_written: int = 0

    @property
    def is_whole(self) -> bool:
        return self.num_written == len(self.bytes_N)


class Keeper:
    """Thread-safe: parts come over links while others are read."""

    def __init__(self) -> None:
        self.complete: Any = None
        """What whoever looks after snapshots says of the last complete one, for its successor."""
        self._lock = threading.Lock()
        self._parts: dict[tuple[str, str], _Part] = {}
        """(snapshot, part)."""

    def handle(self, peer: str, question: Message) -> Message:
        """`keep` and `keep_piece` bring a part here, `kept_piece` reads it. Never raises."""
        return answered("the keeper of snapshots", peer, question, lambda: self._handle(question))

    def _handle(self, question: Message) -> Message:
        fields: Any = question.fields
        snapshot, part = str(fields["snapshot"]), str(fields["part"])
        match question.op:
            case "keep":
                self.begin(snapshot, part, int(fields["num_bytes"]), last=str(fields["last"]))
            case "keep_piece":
                self.write(snapshot, part, int(fields["start"]), *question.tensors)
            case "kept_piece":
                return Message("ok", {}, (self.read(snapshot, part, int(fields["start"]), int(fields["end"])),))
            case _:
                raise InvalidInput("unknown operation", field="op", value=question.op)
        return Message("ok")

    def begin(self, snapshot: str, part: str, num_bytes: int, *, last: str) -> None:
        """Room for a part of a new snapshot. What is neither of it nor of `last`, the last complete one, goes."""
        with self._lock:
            self._keep_only((snapshot, last))
            self._parts[snapshot, part] = _Part(torch.empty(num_bytes, dtype=torch.uint8))

    def write(self, snapshot: str, part: str, start: int, bytes_N: Tensor) -> None:
        """Pieces come in order. `InvalidInput` for one that does not follow what is there."""
        with self._lock:
            found = self._found(snapshot, part)
            end = start + len(bytes_N)
            if start != found.num_written or end > len(found.bytes_N):
                raise InvalidInput(
                    f"{found.num_written} of {len(found.bytes_N)} bytes are here", field="start", value=(start, end)
                )
            found.bytes_N[start:end] = bytes_N
            found.num_written = end

    def read(self, snapshot: str, part: str, start: int, end: int) -> Tensor:
        """Bytes [start, end), fewer where the part ends earlier. `InvalidInput` if it is not here as a whole."""
        with self._lock:
            found = self._found(snapshot, part)
            if not found.is_whole:
                raise InvalidInput("has not arrived as a whole", field="part", value=part)
            return found.bytes_N[max(0, start) : end]

    def has(self, snapshot: str, part: str) -> bool:
        with self._lock:
            found = self._parts.get((snapshot, part))
            return found is not None and found.is_whole

    def drop(self, snapshots: Collection[str]) -> None:
        """These go. Not named are those that stay: what is told late must not meet a snapshot that was begun since."""
        with self._lock:
            self._parts = {key: part for key, part in self._parts.items() if key[0] not in snapshots}

    def num_bytes(self) -> int:
        """Without the lock: it is asked for by heartbeats."""
        return sum(len(part.bytes_N) for part in list(self._parts.values()))

    def _keep_only(self, snapshots: Collection[str]) -> None:
        self._parts = {key: part for key, part in self._parts.items() if key[0] in snapshots}

    def _found(self, snapshot: str, part: str) -> _Part:
        if (snapshot, part) not in self._parts:
            raise InvalidInput(f"nothing of snapshot {snapshot} is here", field="part", value=part)
        return self._parts[snapshot, part]
