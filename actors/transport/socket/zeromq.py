"""What both ends of a link do with zmq."""

from __future__ import annotations

import functools
import socket as os_socket
import tempfile
import warnings
from typing import Any

import zmq

from actors.transport import curve
from actors.transport.curve import LinkKeys

# torch warns that a received frame is read-only; nobody writes into a received tensor (contract of Message).
warnings.filterwarnings("ignore", message="The given buffer is not writable")

COPY_BELOW_BYTES = 1 << 16
"""Smaller frames are copied into zmq: cheaper than tracking a shared buffer."""


def new_socket(kind: int, max_bytes: int) -> Any:
    """Of a `zmq.SocketType`; for messages of at most `max_bytes`."""
    _start_collector()
    socket: Any = zmq.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes + curve.OVERHEAD_BYTES)
    socket.copy_threshold = COPY_BELOW_BYTES
    return socket


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


def has_message(socket: Any) -> bool:
    return bool(socket.getsockopt(zmq.EVENTS) & zmq.POLLIN)


def received(socket: Any) -> list[Any]:
    """Frames of the message at hand: the header copied, tensors as views of zmq's own buffers."""
    frames: list[Any] = [socket.recv()]
    while socket.getsockopt(zmq.RCVMORE):
        frames.append(socket.recv(copy=False).buffer)
    return frames
