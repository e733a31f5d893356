"""A payload of 4 MB to a process of this host and back, over a link as its two ends choose it.

The measure is what no link can do without: two processes that share memory, each copying the bytes into it and waking
the other up. The same over the socket alone shows what the carrier is worth.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.transport.message import Message
from actors.transport.payload.contract import SOCKET_ONLY, PayloadSettings
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address
from cluster.bench.result import Row, interleaved, time_row
from cluster.errors import StartupError

Bytes = NDArray[np.uint8]
PAYLOAD_BYTES = 4 << 20
CALLS_A_ROUND = 100
"""So many that the first few do not count, whose memory the other measure has driven out of the caches."""
MAX_BYTES = 16 << 20
START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0


def payload_rows(rounds: int) -> list[Row]:
    question = Message("exchange", {}, (_payload(),))
    with other_process(_serve) as parent, _copying(question) as copy_pair:
        address = started(parent)
        auto, socket = _opened(address, PayloadSettings()), _opened(address, SOCKET_ONLY)

        def over(link: SocketLink) -> Callable[[], None]:
            def run() -> None:
                for _ in range(CALLS_A_ROUND):
                    link.call(question, CALL_TIMEOUT_S)

            return run

        def copies() -> None:
            for _ in range(CALLS_A_ROUND):
                copy_pair()

        # Each measure has the link beside it alone: what the socket leaves in the caches is not the copies' to share.
        beside_copies = interleaved({"link": over(auto), "peer": copies}, rounds, 3)
        beside_socket = interleaved({"link": over(auto), "peer": over(socket)}, rounds, 3)
        auto.close()
        socket.close()
    return [
        _row("payload_4mb", beside_copies, "copy into shared memory, each way"),
        _row("payload_4mb_socket", beside_socket, "the same over the socket alone"),
    ]


def _row(case: str, seconds: dict[str, list[float]], peer: str) -> Row:
    link, other = ([s / CALLS_A_ROUND for s in seconds[name]] for name in ("link", "peer"))
    return time_row(case, "ms", 1e3, link, peer, other)


def _payload() -> Tensor:
    return torch.randint(0, 256, (PAYLOAD_BYTES,), dtype=torch.uint8)


def _opened(address: Address, payload: PayloadSettings) -> SocketLink:
    return SocketLink("echo", address, name="bench", max_bytes=MAX_BYTES, timeout_s=CALL_TIMEOUT_S, payload=payload)


def _serve(parent: Connection) -> None:
    payload = _payload()

    def handle(peer: str, question: Message) -> Message:
        return Message("ok", {}, (payload,))

    server = SocketServer("echo", handle, max_bytes=MAX_BYTES)
    server.start()
    parent.send(server.address)
    parent.poll(None)  # until the parent closes it, or ends
    server.stop()


@contextmanager
def _copying(question: Message) -> Iterator[Callable[[], None]]:
    """The least that there and back can cost: copy into one memory, wake up, copy into the other, wake up."""
    there, back = (SharedMemory(create=True, size=PAYLOAD_BYTES) for _ in range(2))
    try:
        with other_process(_copy, back.name) as parent:
            started(parent)
            yield partial(_copy_there, there, question.tensors[0].numpy(), parent)
    finally:
        for memory in (there, back):
            memory.close()
            memory.unlink()


def _copy_there(room: SharedMemory, payload: Bytes, other: Connection) -> None:
    _array(room)[:] = payload
    other.send_bytes(b"x")
    other.recv_bytes()


def _array(memory: SharedMemory) -> Bytes:
    assert memory.buf is not None, "open"
    return np.frombuffer(memory.buf, np.uint8, PAYLOAD_BYTES)


def _copy(parent: Connection, back: str) -> None:
    ours = SharedMemory(back)
    payload = _payload().numpy()
    parent.send(None)
    while True:
        try:
            parent.recv_bytes()
        except EOFError:
            break
        _array(ours)[:] = payload
        parent.send_bytes(b"x")
    ours.close()


@contextmanager
def other_process(run: Callable[..., None], *args: str) -> Iterator[Connection]:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=run, args=(there, *args), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()  # which ends it
        process.join(10)
        process.kill()


def started(parent: Connection) -> Address:
    """What the other process says first."""
    if not parent.poll(START_TIMEOUT_S):
        raise StartupError(f"the process to talk to did not start within {START_TIMEOUT_S:.0f} s")
    said: Address = parent.recv()
    return said
