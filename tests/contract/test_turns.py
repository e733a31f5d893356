"""The server of an expert actor, asked by both at a time: order over real sockets."""

from __future__ import annotations

import threading
import time

from actors.expert.host import ExpertHost
from actors.transport.message import Message
from actors.transport.socket import SocketLink, SocketServer

MAX_BYTES = 1 << 20
WAIT_S = 20.0
COUNT = 12


def question(training: bool, number: int) -> Message:
    return Message("forward", {"keep": training, "number": number})


def test_requests_overtake_training_and_do_not_stop_it() -> None:
    """The first question is answered when all others have arrived."""
    seen: list[tuple[bool, int]] = []
    is_held = threading.Event()

    def handle(peer: str, asked: Message) -> Message:
        deadline = time.monotonic() + WAIT_S
        if asked.op == "hold":
            is_held.set()
        while asked.op == "hold" and len(server._turns) < 2 * COUNT and time.monotonic() < deadline:
            server._take_in(10)
        if asked.op == "forward":
            seen.append((bool(asked.fields["keep"]), int(asked.fields["number"])))  # type: ignore[call-overload]
        return Message("ok")

    server = SocketServer("expert-0", handle, max_bytes=MAX_BYTES, lane=ExpertHost.lane, serving_weight=3)
    server.start()
    links = [
        SocketLink("expert-0", server.address, name=name, max_bytes=MAX_BYTES, timeout_s=WAIT_S)
        for name in ("holder", "training", "serving")
    ]
    try:
        holder, training, serving = links
        waiting = [holder.start(Message("hold"))]
        assert is_held.wait(WAIT_S)
        waiting += [training.start(question(True, n)) for n in range(COUNT)]
        waiting += [serving.start(question(False, n)) for n in range(COUNT)]
        for pending in waiting:
            pending.result(2 * WAIT_S)
    finally:
        for link in links:
            link.close()
        server.stop()
    for lane in (True, False):
        assert [number for training, number in seen if training == lane] == list(range(COUNT)), "a link's own order"
    kinds = "".join("T" if training else "s" for training, _ in seen)
    assert kinds == "sssT" * (COUNT // 3) + "T" * (COUNT - COUNT // 3)
