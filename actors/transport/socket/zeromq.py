"""What both ends of a link do with zmq."""

from __future__ import annotations

import functools
import socket as os_socket
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import zmq

from actors.transport import curve
from actors.transport.curve import LinkKeys

# torch warns that a received frame is read-only; nobody writes into a received tensor (contract of Message).
warnings.filterwarnings("ignore", message="The given buffer is not writable")

COPY_BELOW_BYTES = 1 << 16
"""Smaller frames are copied into zmq: cheaper than tracking a shared buffer."""

PIECE_BYTES = 1 << 18
"""Of a frame at most where links are secured: libzmq holds strangers to that before it knows who they are."""
HANDSHAKE_MS = 10_000
"""For whoever connects to say who it is."""
SPIN_ON_GPU_S = 4e-4
"""How long either end looks for what comes next before its thread goes to sleep, where tensors of a GPU cross: waking
it takes as long as a layer's tokens there and back. 128 tokens of 7168 there and back: 0.34 ms instead of 0.54."""


class Socket:
    """A zmq socket whose frames may have any size: where links are secured they cross in pieces, each but the last of
    just `PIECE_BYTES`."""

    def __init__(self, kind: int, max_bytes: int, keys: LinkKeys | None) -> None:
        """Of a `zmq.SocketType`; for messages of at most `max_bytes`."""
        _start_collector()
        self._in_pieces = keys is not None
        raw: Any = zmq.Context.instance().socket(kind)
        raw.setsockopt(zmq.LINGER, 0)
        raw.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        most = PIECE_BYTES if self._in_pieces else max_bytes
        raw.setsockopt(zmq.MAXMSGSIZE, most + curve.OVERHEAD_BYTES)
        raw.copy_threshold = COPY_BELOW_BYTES
        self.raw = raw

    @property
    def has_message(self) -> bool:
        return bool(self.raw.getsockopt(zmq.EVENTS) & zmq.POLLIN)

    def send(self, frames: Sequence[Any], flags: int = 0) -> None:
        """`zmq.Again` as of zmq."""
        self.raw.send_multipart([*pieces(frames)] if self._in_pieces else frames, flags=flags, copy=False)

    def receive(self, num_copied: int = 1) -> list[Any]:
        """Frames of the message at hand: so many are copied, as short ones had better be; tensors are views of zmq's
        own buffers."""
        frames: list[Any] = [self.raw.recv()]
        while self.raw.getsockopt(zmq.RCVMORE):
            frames.append(self.raw.recv() if len(frames) < num_copied else self.raw.recv(copy=False).buffer)
        return joined(frames) if self._in_pieces else frames

    def close(self) -> None:
        self.raw.close(0)


def pieces(frames: Sequence[Any]) -> Iterator[Any]:
    """Frames (bytes or buffers of bytes) -> pieces. A frame that fills its last piece has an empty one after it."""
    for frame in frames:
        if len(frame) < PIECE_BYTES:
            yield frame
            continue
        view = memoryview(frame)
        for start in range(0, len(view) + 1, PIECE_BYTES):
            yield view[start : start + PIECE_BYTES]


def joined(found: Sequence[Any]) -> list[Any]:
    """Pieces -> frames."""
    frames: list[Any] = []
    begun: list[Any] = []
    for piece in found:
        begun.append(piece)
        if len(piece) < PIECE_BYTES:
            frames.append(bytearray().join(begun) if len(begun) > 1 else piece)
            begun = []
    return [*frames, *begun]  # of one that never ends `decode` says that it does not fit


@functools.cache
def _start_collector() -> None:
    """pyzmq has a context of its own, with seven file handles, from the first frame on that it sends without a copy.

    Here from the beginning, so that nobody takes it for a leak when messages grow, as they do after an actor's death.
    """
    zmq.Frame(b"-", copy=False, copy_threshold=0)


def host_id() -> str:
    """The same for all processes that can share a unix socket: boot and network name of this machine or container."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        boot = "no-boot-id"
    return f"{boot}/{os_socket.gethostname()}/{tempfile.gettempdir()}"


def in_clear_text(keys: LinkKeys | None) -> bool:
    """Whether messages may go from process to process on one host as they are."""
    return keys is None or not keys.on_ipc
