"""The line of a link whose ends are on one host: a unix socket straight from thread to thread, beside zmq's.

It carries the memory that the ends show each other, and from then on short messages: zmq hands each one to a thread of
its own on either side, which takes three times as long as the message itself. Long ones still cross zmq, and so do
short ones while the line is full, so that nobody ever waits for a peer that does not read. Messages are numbered, and
handed on in the order sent whichever way they came.

A message may go ahead of its tensors, where those are copied into memory that the peer sees: the peer wakes up and
decodes it meanwhile, looks out for the word that all of it is there, and hands it on then.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from actors.errors import ProtocolError
from actors.transport.message import Message, Unreadable, decode_or_not
from actors.transport.payload.contract import Carrier

SHORT_BYTES = 1 << 15
"""Of a message with its header, at most."""
MAX_FRAMES = 32
MAX_EARLY = 4096
"""Messages that wait for one that is still on the other way."""
LOOK_OUT_S = 1e-3
"""How long for the tensors of a message that is here, before the thread goes to sleep: 20 MB are copied meanwhile."""
_NUMBER = struct.Struct("<Q")
_HEAD = struct.Struct("<QI")
"""Number of the message, number of its frames; the size of each follows. Without frames: all of the message is there
that went ahead under this number."""
_AHEAD = 1 << 31
"""Beside the number of frames: the message goes ahead of its tensors."""
_RECEIVE_BYTES = SHORT_BYTES + 1024
Frames = list[Any]
Arrived = Message | Unreadable


class Line:
    """One end of it, of the thread that uses the link. `max_bytes`: of a message. `takes_messages`: they may cross the
    line in clear text."""

    def __init__(
        self, connection: socket.socket, carrier: Carrier, peer: str, *, max_bytes: int, takes_messages: bool
    ) -> None:
        connection.setblocking(False)
        self.carrier = carrier
        self.look_out_until = 0.0
        """A `time.monotonic` value: until then it is not worth while to sleep."""
        self._connection, self._peer = connection, peer
        self._max_bytes, self._takes_messages = max_bytes, takes_messages
        self._num_sent = self._num_received = 0
        self._early: dict[int, Frames] = {}
        self._ahead: Arrived | None = None
        """The last one received, if it may lack tensors."""
        self._num_whole = 0
        """Messages up to this number are there with all of their tensors."""

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, frames: Frames) -> Frames | None:
        """Of a message that was encoded with the carrier. None if it has gone; otherwise what is to cross zmq."""
        if not self._takes_messages:
            self.carrier.finish()
            return frames
        self._num_sent += 1
        sizes = [len(frame) for frame in frames]
        is_ahead = self.carrier.is_late
        if sum(sizes) <= SHORT_BYTES:
            head = _HEAD.pack(self._num_sent, len(sizes) | (_AHEAD if is_ahead else 0))
            if self._say([head, struct.pack(f"<{len(sizes)}I", *sizes), *frames]):
                return self._follow_up() if is_ahead else None
        self.carrier.finish()
        return [_NUMBER.pack(self._num_sent), *frames]

    def receive(self) -> list[Arrived]:
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
            is_ahead, count = bool(count & _AHEAD), count & ~_AHEAD
            if count > MAX_FRAMES:
                raise ProtocolError(f"a message of {count} frames", peer=self._peer)
            sizes = struct.unpack_from(f"<{count}I", said, _HEAD.size)
        except struct.error:
            raise ProtocolError("malformed message on the line", peer=self._peer) from None
        return self._in_order(number, _cut(memoryview(said), _HEAD.size + 4 * count, sizes), is_ahead)

    def arrived(self, frames: Frames) -> list[Arrived]:
        """The messages that are next after one that has crossed zmq."""
        if not self._takes_messages:
            return [self._read(frames)]
        if not frames or len(frames[0]) != _NUMBER.size:
            raise ProtocolError("a message without its number", peer=self._peer)
        return self._in_order(_NUMBER.unpack(frames[0])[0], frames[1:], False)

    def close(self) -> None:
        self._early.clear()
        self._ahead = None
        self._connection.close()
        self.carrier.close()

    def _say(self, parts: Sequence[Any]) -> bool:
        """False where the line is full, or at its end, which `receive` tells."""
        try:
            self._connection.sendmsg(parts)
        except OSError:
            return False
        return True

    def _follow_up(self) -> Frames | None:
        """The tensors of the message that has gone ahead, and the word that they are there."""
        self.carrier.finish()
        return None if self._say([_HEAD.pack(self._num_sent, 0)]) else [_NUMBER.pack(self._num_sent)]

    def _read(self, frames: Frames) -> Arrived:
        return decode_or_not(frames, peer=self._peer, max_bytes=self._max_bytes, carrier=self.carrier)

    def _in_order(self, number: int, frames: Frames, is_ahead: bool) -> list[Arrived]:
        """The messages that are next after this one, or after the word (without frames) that it is there."""
        # Before a message is sent, all that the one before it lacked has followed.
        self._num_whole = max(self._num_whole, number - 1 if is_ahead else number)
        if frames:
            if len(self._early) >= MAX_EARLY:
                raise ProtocolError(f"message {self._num_received + 1} is missing", peer=self._peer)
            self._early[number] = frames
        ready = list[Arrived]()
        while self._num_received <= self._num_whole:
            ready += [self._ahead] if self._ahead is not None else []
            self._ahead = None
            if (following := self._early.pop(self._num_received + 1, None)) is None:
                break
            self._num_received += 1
            self._ahead = self._read(following)
        self.look_out_until = time.monotonic() + LOOK_OUT_S if self._ahead is not None else 0.0
        return ready


def _cut(said: memoryview, start: int, sizes: Sequence[int]) -> Frames:
    frames = []
    for size in sizes:
        frames.append(said[start : start + size])
        start += size
    return frames
