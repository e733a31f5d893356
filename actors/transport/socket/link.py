"""The asking end of a socket link."""

from __future__ import annotations

import os
import time
import uuid
from collections import deque
from threading import Event
from typing import Any

import zmq

from actors.errors import InvalidInput, LinkTimeout, MoeClusterError, PeerLost
from actors.transport import curve
from actors.transport.contract import CUT_NOTICED_S, Link
from actors.transport.curve import LinkKeys
from actors.transport.message import Message, decode_or_not, encode
from actors.transport.payload.attach import attach
from actors.transport.payload.choice import End
from actors.transport.payload.contract import AUTO, Carrier, PayloadSettings, Way
from actors.transport.payload.line import Arrived, Frames, Line
from actors.transport.socket.zeromq import SPIN_ON_GPU_S, Socket, host_id, in_clear_text
from actors.values import Address

_GONE = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_MONITOR_STOPPED
    | curve.HANDSHAKE_FAILED
)


class SocketLink(Link):
    """One DEALER. Opening waits for the peer's answer to `hello`, so an open link has a living peer."""

    def __init__(
        self,
        peer: str,
        address: Address,
        *,
        name: str,
        max_bytes: int,
        timeout_s: float,
        keys: LinkKeys | None = None,
        payload: PayloadSettings = AUTO,
    ) -> None:
        super().__init__(peer)
        on_this_host = address.host_id == host_id() and os.path.exists(address.ipc.removeprefix("ipc://"))
        self.kind = "socket/ipc" if on_this_host else "socket/tcp"
        self.max_bytes = self._max_bytes = max_bytes
        self._line: Line | None = None
        self._arrived: deque[Arrived] = deque()
        self._ended = ""
        self._is_soon = False
        """Whether the next answer may be here within `SPIN_ON_GPU_S`."""
        self._socket = Socket(zmq.DEALER, max_bytes, keys)
        self._socket.raw.setsockopt(zmq.RECONNECT_IVL, -1)  # a dead peer stays dead; its successor gets a new link
        if keys is not None and (keys.on_ipc or not on_this_host):
            self.kind += "+curve"
            curve.secure_client(self._socket.raw, keys)
        self._socket.raw.setsockopt_string(zmq.IDENTITY, f"{name}/{uuid.uuid4().hex[:12]}")
        self._monitor = self._socket.raw.get_monitor_socket(_GONE)
        self._poller = zmq.Poller()
        self._poller.register(self._socket.raw, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.raw.connect(address.ipc if on_this_host else address.tcp)
        try:
            self._meet(name, keys, payload, on_this_host, timeout_s)
        except MoeClusterError:
            self.close()
            raise

    def _meet(
        self, name: str, keys: LinkKeys | None, payload: PayloadSettings, on_this_host: bool, timeout_s: float
    ) -> None:
        """The peer lives, and there is a line to it if there can be one."""
        hello = self.call(Message("hello", {"name": name}), timeout_s)
        end = End.told(hello.fields.get("end"), self.peer)
        clear = in_clear_text(keys)
        self._line = attach(
            self,
            payload,
            end,
            on_one_host=on_this_host,
            max_bytes=self._max_bytes,
            takes_messages=clear,
            timeout_s=timeout_s,
        )
        if self._line is not None:
            self.kind += f"+{self._line.carrier.kind}"
            self._poller.register(self._line.fileno(), zmq.POLLIN)

    @property
    def pollables(self) -> tuple[Any, ...]:
        line = (self._line.fileno(),) if self._line is not None else ()
        return (self._socket.raw, self._monitor, *line)

    @property
    def way(self) -> Way | None:
        return None if self._line is None or self.closed else self._line.carrier.way()

    @property
    def over(self) -> Event | None:
        return None if self._line is None else self._line.carrier.over

    @property
    def _carrier(self) -> Carrier | None:
        return self._line.carrier if self._line is not None else None

    def _send(self, question: Message) -> None:
        self._check_size(question.num_bytes)  # before anything is on its way
        self._is_soon = question.is_of_gpu
        frames = encode(question, self._carrier)
        self._check_size(sum(len(f) for f in frames))
        rest = frames if self._line is None else self._line.send(frames)
        if rest is None:
            return
        try:
            self._socket.send(rest, zmq.DONTWAIT)
        except zmq.Again:
            # Of a connection that has ended, too; the monitor tells.
            raise self._lost(otherwise="the peer does not take messages") from None

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise InvalidInput(
                "message is larger than the link allows",
                field="links.max_message_bytes",
                value=size,
                remedy=f"raise it above {self._max_bytes} or send fewer tokens a micro-batch",
            )

    def _receive(self, deadline: float) -> Message:
        while True:
            if self.closed or self.is_cut:
                raise PeerLost("the link is closed", peer=self.peer)
            if self._arrived:
                return self._handed_on(self._arrived.popleft())
            wait_s = 0.0 if self._ended else min(deadline - time.monotonic(), CUT_NOTICED_S)
            ready = self._poll(wait_s)
            is_over = bool(self._ended or self._monitor in ready)
            if self._line is not None and self._line.fileno() in ready:
                try:
                    self._arrived += self._line.receive()
                    is_over = False  # before the line has been read to its end
                except EOFError:
                    is_over = True
            if self._socket.raw in ready:
                frames = self._socket.receive()
                self._arrived += [self._read(frames)] if self._line is None else self._line.arrived(frames)
            elif is_over and not self._arrived:
                self._abort_carrier()
                raise self._lost(otherwise="the connection ended")
            if self._arrived:  # also of a link that was cut while this was being read, for what it says of that
                return self._handed_on(self._arrived.popleft())
            if time.monotonic() >= deadline:
                raise LinkTimeout("no answer before the deadline", peer=self.peer)

    def _poll(self, wait_s: float) -> dict[Any, int]:
        now = time.monotonic()
        until = self._line.look_out_until if self._line is not None else 0.0
        until = min(now + wait_s, now + SPIN_ON_GPU_S if self._is_soon else until)
        while time.monotonic() < until:
            if found := self._poller.poll(0):
                return dict(found)
        self._is_soon = False
        return dict(self._poller.poll(max(0, int(wait_s * 1e3 + 0.999))))

    def _read(self, frames: Frames) -> Arrived:
        return decode_or_not(frames, peer=self.peer, max_bytes=self._max_bytes, carrier=None)

    def _handed_on(self, answer: Arrived) -> Message:
        if isinstance(answer, Message):
            return answer
        # What follows one that was lost would be read in the place of what is missing.
        self.is_cut |= isinstance(answer.error, PeerLost)
        try:
            raise answer.error
        finally:
            del answer  # the error has this frame, which would keep the error, and with it this link

    def _abort_carrier(self) -> None:
        if self._line is not None:
            self._line.carrier.abort()

    def cut(self) -> None:
        super().cut()
        self._abort_carrier()

    def _lost(self, *, otherwise: str) -> PeerLost:
        """Why, as the first event of the monitor tells, or `otherwise` if there is none. It stays so."""
        if not self._ended and self._monitor.poll(int(CUT_NOTICED_S * 1e3)):
            self._ended = curve.refusal(self._monitor) or "the connection ended"
        return PeerLost(self._ended or otherwise, peer=self.peer)

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self._line is not None:
                self._line.close()
            self._socket.raw.disable_monitor()
            self._monitor.close(0)
            self._socket.close()
