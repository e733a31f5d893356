"""The line of a link whose ends are on one host: a unix socket straight from thread to thread, beside zmq's.

It carries the memory that the ends show each other, and from then on short messages: zmq hands each one to a thread of
its own on either side, which takes three times as long as the message itself. Long ones still cross zmq, and so do
short ones while the line is full, so that nobody ever waits for a peer that does not read. Messages are numbered, and
handed on in the order sent whichever way they came.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from actors.errors import ProtocolError
from actors.transport.payload.contract import Carrier

SHORT_BYTES = 1 << 15
"""Of a message with its header, at most."""
MAX_FRAMES = 32
MAX_EARLY = 4096
"""Messages that wait for one that is still on the other way."""
_NUMBER = struct.Struct("<Q")
_HEAD = struct.Struct("<QI")
"""Number of the message, number of its frames; the size of each follows."""
_RECEIVE_BYTES = SHORT_BYTES + 1024
Frames = list[Any]


class Line:
    """One end of it, of the thread that uses the link. `takes_messages`: they may cross it in clear text."""

    def __init__(self, connection: socket.socket, carrier: Carrier, peer: str, *, takes_messages: bool) -> None:
        connection.setblocking(False)
        self.carrier = carrier
        self._connection, self._peer, self._takes_messages = connection, peer, takes_messages
        self._num_sent = self._num_received = 0
        self._early: dict[int, Frames] = {}

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, frames: Frames) -> Frames | None:
        """None if the message has gone; otherwise what is to cross zmq for it."""
        if not self._takes_messages:
            return frames
        self._num_sent += 1
        sizes = [len(frame) for frame in frames]
        if sum(sizes) <= SHORT_BYTES:
            head = _HEAD.pack(self._num_sent, len(sizes)) + struct.pack(f"<{len(sizes)}I", *sizes)
            with suppress(OSError):  # full, or at its end, which `receive` tells
                self._connection.sendmsg([head, *frames])
                return None
        return [_NUMBER.pack(self._num_sent), *frames]

    def receive(self) -> list[Frames]:
        """The messages that are next after what has come on the line. EOFError when the other end is gone."""
        try:
            said = self._connection.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise EOFError(str(error)) from None
        if not said:
            raise EOFError
        try:
            number, count = _HEAD.unpack_from(said)
            if count > MAX_FRAMES:
                raise ProtocolError(f"a message of {count} frames", peer=self._peer)
            sizes = struct.unpack_from(f"<{count}I", said, _HEAD.size)
        except struct.error:
            raise ProtocolError("malformed message on the line", peer=self._peer) from None
        return self._in_order(number, _cut(memoryview(said), _HEAD.size + 4 * count, sizes))

    def arrived(self, frames: Frames) -> list[Frames]:
        """The messages that are next after one that has crossed zmq."""
        if not self._takes_messages:
            return [frames]
        if not frames or len(frames[0]) != _NUMBER.size:
            raise ProtocolError("a message without its number", peer=self._peer)
        return self._in_order(_NUMBER.unpack(frames[0])[0], frames[1:])

    def close(self) -> None:
        self._connection.close()
        self.carrier.close()

    def _in_order(self, number: int, frames: Frames) -> list[Frames]:
        if len(self._early) >= MAX_EARLY:
            raise ProtocolError(f"message {self._num_received + 1} is missing", peer=self._peer)
        self._early[number] = frames
        ready = []
        while (following := self._early.pop(self._num_received + 1, None)) is not None:
            self._num_received += 1
            ready.append(following)
        return ready


def _cut(said: memoryview, start: int, sizes: Sequence[int]) -> Frames:
    frames = []
    for size in sizes:
        frames.append(said[start : start + size])
        start += size
    return frames
