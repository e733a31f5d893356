"""`socket`: pyzmq between processes, over ipc:// on one host and tcp:// between hosts.

The expert actor binds one ROUTER socket at two addresses; every link is a DEALER. zmq keeps quiet about a dead peer, so
the link watches its socket's monitor: a DISCONNECTED event ends every wait with `PeerLost`, also in mid-message. With
keys tcp:// is encrypted and only for those who hold them; ipc:// lies in a directory of this user alone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket as os_socket
import tempfile
import threading
import time
import uuid
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import zmq

from actors.errors import InvalidInput, LinkError, LinkTimeout, MoeClusterError, PeerLost, ProtocolError, StepAborted
from actors.transport import curve
from actors.transport.contract import CUT_NOTICED_S, Handler, Link
from actors.transport.curve import LinkKeys
from actors.transport.message import Message, decode, encode, error_answer
from actors.transport.payload.attach import Attachments, attach
from actors.transport.payload.choice import End
from actors.transport.payload.contract import AUTO, Carrier, PayloadSettings
from actors.transport.payload.line import Frames, Line
from actors.transport.turns import SERVING_WEIGHT, Lane, Turns
from actors.values import Address

logger = logging.getLogger(__name__)

# torch warns that a received frame is read-only; nobody writes into a received tensor (contract of Message).
warnings.filterwarnings("ignore", message="The given buffer is not writable")

_GONE = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_MONITOR_STOPPED
    | curve.HANDSHAKE_FAILED
)
COPY_BELOW_BYTES = 1 << 16
"""Smaller frames are copied into zmq: cheaper than tracking a shared buffer."""
MAX_REMEMBERED_LINKS = 4096
MAX_TAKEN_IN = 64
"""Questions that a server looks at to choose the next; more wait in zmq."""
LOOK_AGAIN_MS = 1
"""How long a server with questions that are not ready sleeps before it looks again."""
AFTER_ERROR_S = 0.1
"""Until a server goes on, so that an error that comes again and again does not fill the log."""
SPIN_S = 1e-4
"""How long a server looks for the next question before its thread goes to sleep; waking it costs as much. Questions
that follow each other come back in 0.23 instead of 0.35 ms, others as before."""
SPIN_BELOW_BYTES = 1 << 19
"""After a longer question or answer it sleeps at once: copying the next one alone takes the peer that time, and it may
need this very core for it."""


def _context() -> Any:
    _start_collector()
    return zmq.Context.instance()


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
        self._max_bytes = max_bytes
        self._line: Line | None = None
        self._arrived: deque[Frames] = deque()
        self._ended = ""
        self._socket = _context().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)  # a dead peer stays dead; its successor gets a new link
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes + curve.OVERHEAD_BYTES)
        if keys is not None and (keys.on_ipc or not on_this_host):
            self.kind += "+curve"
            curve.secure_client(self._socket, keys)
        self._socket.setsockopt_string(zmq.IDENTITY, f"{name}/{uuid.uuid4().hex[:12]}")
        self._socket.copy_threshold = COPY_BELOW_BYTES
        self._monitor = self._socket.get_monitor_socket(_GONE)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(address.ipc if on_this_host else address.tcp)
        try:
            hello = self.call(Message("hello", {"name": name}), timeout_s)
            end = End.told(hello.fields.get("end"), peer)
            self._line = attach(
                self,
                payload,
                end,
                on_one_host=on_this_host,
                takes_messages=_in_clear_text(keys),
                timeout_s=timeout_s,
            )
            if self._line is not None:
                self.kind += f"+{self._line.carrier.kind}"
                self._poller.register(self._line.fileno(), zmq.POLLIN)
        except MoeClusterError:
            self.close()
            raise

    @property
    def _carrier(self) -> Carrier | None:
        return self._line.carrier if self._line is not None else None

    def _send(self, question: Message) -> None:
        self._check_size(question.num_bytes)  # before anything is on its way
        frames = encode(question, self._carrier)
        self._check_size(sum(len(f) for f in frames))
        rest = frames if self._line is None else self._line.send(frames)
        if rest is None:
            return
        try:
            self._socket.send_multipart(rest, flags=zmq.DONTWAIT, copy=False)
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
                return self._decoded(self._arrived.popleft())
            wait_s = 0.0 if self._ended else min(deadline - time.monotonic(), CUT_NOTICED_S)
            wait_ms = max(0, int(wait_s * 1e3 + 0.999))
            ready = dict(self._poller.poll(wait_ms))
            is_over = bool(self._ended or self._monitor in ready)
            if self._line is not None and self._line.fileno() in ready:
                try:
                    self._arrived += self._line.receive()
                except EOFError:
                    is_over = True
            if self._socket in ready:
                frames = _received(self._socket)
                self._arrived += [frames] if self._line is None else self._line.arrived(frames)
            elif is_over and not self._arrived:
                self._abort_carrier()
                raise self._lost(otherwise="the connection ended")
            if time.monotonic() >= deadline:
                raise LinkTimeout("no answer before the deadline", peer=self.peer)

    def _decoded(self, frames: Frames) -> Message:
        try:
            return decode(frames, peer=self.peer, max_bytes=self._max_bytes, carrier=self._carrier)
        except PeerLost:
            self.is_cut = True  # what follows would be read in the place of what is missing
            raise

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
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(0)


class SocketServer:
    """Serves a handler to any number of links from one thread: questions are handled one by one, those of a link in
    the order of their arrival, and of several links as `turns` says for the lane of each question.

    `idle` is called between questions and does one piece of deferred work; it returns False when none is left.
    A question for which `ready` is false is kept back until it is true, while others are handled, and refused after
    `keep_s`.
    """

    def __init__(
        self,
        name: str,
        handler: Handler,
        *,
        host: str = "127.0.0.1",
        max_bytes: int,
        idle: Callable[[], bool] = lambda: False,
        ready: Callable[[Message], bool] = lambda question: True,
        keep_s: float = 30.0,
        keys: LinkKeys | None = None,
        lane: Callable[[Message], Lane] = lambda question: "training",
        serving_weight: int = SERVING_WEIGHT,
        payload: PayloadSettings = AUTO,
    ) -> None:
        self.name = name
        self.busy_s = 0.0
        """Time spent on questions since the start."""
        self._handler = handler
        self._idle, self._ready, self._keep_s = idle, ready, keep_s
        self._kept: list[_Kept] = []
        self._lane = lane
        self._turns: Turns[tuple[bytes, Message]] = Turns(serving_weight)
        self._max_bytes = max_bytes
        self._directory = tempfile.mkdtemp(prefix="moe-")  # which nobody else may enter: mode 0700
        self._socket = _context().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes + curve.OVERHEAD_BYTES)
        self._socket.copy_threshold = COPY_BELOW_BYTES
        ipc = f"ipc://{self._directory}/link"
        if keys is not None and keys.on_ipc:
            curve.secure_server(self._socket, keys)
        self._socket.bind(ipc)
        if keys is not None:
            curve.secure_server(self._socket, keys)
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = Address(host_id(), ipc, f"tcp://{host}:{port}")
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._attachments = Attachments(payload, self._directory, takes_messages=_in_clear_text(keys))
        self._poller.register(self._attachments.fileno(), zmq.POLLIN)
        self._last_id: OrderedDict[bytes, int] = OrderedDict()
        self._is_next_soon = True
        """Whether the next question may be here within `SPIN_S`."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"serve-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._attachments.close()
        self._socket.close(0)
        with contextlib.suppress(OSError):
            os.unlink(f"{self._directory}/link")
        with contextlib.suppress(OSError):
            os.rmdir(self._directory)

    def _run(self) -> None:
        busy = False
        while not self._stop.is_set():
            try:
                busy = self._run_once(busy)
            except Exception:  # whatever one message does, those after it are served
                logger.exception("%s goes on after an error", self.name)
                self._stop.wait(AFTER_ERROR_S)

    def _run_once(self, busy: bool) -> bool:
        """One round: takes in what has come, handles one question. `busy`, and the answer: whether there was work."""
        busy = self._answer_kept() or busy
        self._take_in(0 if busy or self._turns else LOOK_AGAIN_MS if self._kept else 100)
        if not self._turns:
            return busy and self._idle()
        started = time.monotonic()
        self._serve_one()
        self.busy_s += time.monotonic() - started
        if not self._turns and self._is_next_soon:
            self._spin()
        return True

    def _take_in(self, timeout_ms: int) -> None:
        """What has arrived, once there is something or the time is over."""
        if timeout_ms and not self._poller.poll(timeout_ms):
            return
        if len(self._turns) < MAX_TAKEN_IN:
            for sender, frames in self._attachments.look():
                self._take_in_one(sender, frames)
        while len(self._turns) < MAX_TAKEN_IN and _has_message(self._socket):
            self._take_from_zmq()

    def _take_from_zmq(self) -> None:
        sender: bytes = self._socket.recv()
        frames = _received(self._socket) if self._socket.getsockopt(zmq.RCVMORE) else []
        line = self._attachments.of(sender)
        try:
            messages = [frames] if line is None else line.arrived(frames)
        except ProtocolError as error:
            logger.warning("refused a message: %s", error)
            return
        for message in messages:
            self._take_in_one(sender, message)

    def _take_in_one(self, sender: bytes, frames: Frames) -> None:
        peer, line = sender.decode(errors="replace"), self._attachments.of(sender)
        try:
            carrier = line.carrier if line is not None else None
            question = decode(frames, peer=peer, max_bytes=self._max_bytes, carrier=carrier)
        except LinkError as error:
            logger.warning("refused a message: %s", error)
            self._answer(sender, error_answer(error))
            return
        if question.id <= self._last_id.get(sender, 0):
            logger.warning("dropped a duplicate of message %d from %s", question.id, peer)
            return
        self._last_id[sender] = question.id
        self._last_id.move_to_end(sender)
        if len(self._last_id) > MAX_REMEMBERED_LINKS:
            self._last_id.popitem(last=False)
        self._turns.put(sender, self._lane(question), (sender, question))

    def _serve_one(self) -> None:
        sender, question = self._turns.take()
        if question.op == "hello":
            fields = {"name": self.name, "end": self._attachments.end()}
            answer = Message("ok", fields, (), question.id)
        elif question.op == "carry":
            answer = replace(self._attachments.begin(sender, question), id=question.id)
        elif not self._ready(question):
            self._kept.append(_Kept(sender, question, time.monotonic() + self._keep_s))
            return
        else:
            answer = self._handle(sender, question)
        self._is_next_soon = max(question.num_bytes, answer.num_bytes) < SPIN_BELOW_BYTES
        del question  # so that this very answer tells what of it nobody reads any more
        self._answer(sender, answer)

    def _handle(self, sender: bytes, question: Message) -> Message:
        answer = self._handler(sender.decode(errors="replace"), question)
        return Message(answer.op, answer.fields, answer.tensors, question.id)

    def _answer_kept(self) -> bool:
        """Those that are ready, or have waited for too long. False if there was none."""
        now = time.monotonic()
        due = [kept for kept in self._kept if now >= kept.until or self._ready(kept.question)]
        for kept in due:
            self._kept.remove(kept)
            if self._ready(kept.question):
                started = time.monotonic()
                self._answer(kept.sender, self._handle(kept.sender, kept.question))
                self.busy_s += time.monotonic() - started
            else:
                error = StepAborted(f"{self.name} could not begin with {kept.question.op} for {self._keep_s:.0f} s")
                answer = error_answer(error)
                self._answer(kept.sender, Message(answer.op, answer.fields, answer.tensors, kept.question.id))
        return bool(due)

    def _answer(self, sender: bytes, answer: Message) -> None:
        line = self._attachments.of(sender)
        rest = encode(answer) if line is None else line.send(encode(answer, line.carrier))
        if rest is not None:
            # Without ROUTER_MANDATORY zmq drops an answer whose asker is gone, which is what we want.
            self._socket.send_multipart([sender, *rest], copy=False)

    def _spin(self) -> None:
        until = time.monotonic() + SPIN_S
        while not (self._attachments.is_ready() or _has_message(self._socket)) and time.monotonic() < until:
            pass


@dataclass(frozen=True, eq=False)
class _Kept:
    """A question that is not ready to be handled."""

    sender: bytes
    question: Message
    until: float
    """A `time.monotonic` value."""


def _in_clear_text(keys: LinkKeys | None) -> bool:
    """Whether messages may go from process to process on one host as they are."""
    return keys is None or not keys.on_ipc


def _has_message(socket: Any) -> bool:
    return bool(socket.getsockopt(zmq.EVENTS) & zmq.POLLIN)


def _received(socket: Any) -> list[Any]:
    """Frames of the message at hand: the header copied, tensors as views of zmq's own buffers."""
    frames: list[Any] = [socket.recv()]
    while socket.getsockopt(zmq.RCVMORE):
        frames.append(socket.recv(copy=False).buffer)
    return frames
