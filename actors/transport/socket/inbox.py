"""What reaches a server over the socket and the lines of its links, as messages; and the way back for their answers."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import zmq

from actors.errors import ProtocolError
from actors.transport import curve
from actors.transport.curve import LinkKeys
from actors.transport.message import Message, Unreadable, decode_or_not, encode, error_answer
from actors.transport.payload.attach import Attachments
from actors.transport.payload.contract import PayloadSettings
from actors.transport.payload.line import Arrived
from actors.transport.rundir import RunDirectory
from actors.transport.socket.zeromq import Socket, host_id, in_clear_text
from actors.values import Address

logger = logging.getLogger(__name__)

MAX_REMEMBERED_LINKS = 4096
Question = tuple[bytes, Message]
"""The link that it came over, by zmq's name for it, and what is asked."""


class Inbox:
    """One ROUTER socket bound at two addresses, with the lines of links of this host. Of one thread."""

    def __init__(self, name: str, host: str, max_bytes: int, keys: LinkKeys | None, payload: PayloadSettings) -> None:
        self._name, self._max_bytes = name, max_bytes
        self._directory = RunDirectory()  # which nobody else may enter
        self._socket = Socket(zmq.ROUTER, max_bytes, keys)
        ipc = f"ipc://{self._directory.path}/link"
        if keys is not None and keys.on_ipc:
            curve.secure_server(self._socket.raw, keys)
        self._socket.raw.bind(ipc)
        if keys is not None:
            curve.secure_server(self._socket.raw, keys)
        port = self._socket.raw.bind_to_random_port(f"tcp://{host}")
        self.address = Address(host_id(), ipc, f"tcp://{host}:{port}")
        self._attachments = Attachments(
            payload, self._directory.path, max_bytes=max_bytes, takes_messages=in_clear_text(keys)
        )
        self._poller = zmq.Poller()
        self._poller.register(self._socket.raw, zmq.POLLIN)
        self._poller.register(self._attachments.fileno(), zmq.POLLIN)
        self._last_id: OrderedDict[bytes, int] = OrderedDict()

    def close(self) -> None:
        self._attachments.close()
        self._socket.close()
        self._directory.remove()

    # -- questions ----------------------------------------------------------------------------------------------------

    def watch(self, pollables: Sequence[Any]) -> None:
        """`wait` also ends when there is something to read from these, until they are given to `unwatch`."""
        for pollable in pollables:
            self._poller.register(pollable, zmq.POLLIN)

    def unwatch(self, pollables: Sequence[Any]) -> None:
        for pollable in pollables:
            self._poller.unregister(pollable)

    def wait(self, timeout_ms: int) -> set[Any]:
        """Until something has come, or the time is over. -> where; empty if nothing has."""
        return {pollable for pollable, _ in self._poller.poll(timeout_ms)}

    def has_something(self) -> bool:
        """Without waiting."""
        return self._attachments.is_ready() or self.has_message()

    def has_message(self) -> bool:
        """In zmq, where messages wait until they are taken."""
        return self._socket.has_message

    @property
    def look_out_until(self) -> float:
        """A `time.monotonic` value: until then it is not worth while to sleep, as a question lacks but its tensors."""
        return self._attachments.look_out_until

    def from_lines(self) -> Iterator[Question]:
        """All that has come over lines. What cannot be read is answered here."""
        for sender, message in self._attachments.look():
            yield from self._admitted(sender, message)

    def from_zmq(self) -> Iterator[Question]:
        """The next message in zmq, and those that were waiting for it. Only if `has_message`."""
        sender, *frames = self._socket.receive(num_copied=2)
        # A link that has given up its line sends messages without numbers: its line's end was there before them.
        yield from self.from_lines()
        line, peer = self._attachments.of(sender), sender.decode(errors="replace")
        try:
            if line is None:
                messages = [decode_or_not(frames, peer=peer, max_bytes=self._max_bytes, carrier=None)]
            else:
                messages = line.arrived(frames)
        except ProtocolError as error:
            logger.warning("refused a message: %s", error)
            return
        for message in messages:
            yield from self._admitted(sender, message)

    def _admitted(self, sender: bytes, message: Arrived) -> Iterator[Question]:
        """The question, unless it cannot be read or has been here before."""
        if isinstance(message, Unreadable):
            logger.warning("refused a message: %s", message.error)
            self.answer(sender, error_answer(message.error, message.id))
            return
        if message.id <= self._last_id.get(sender, 0):
            logger.warning("dropped a duplicate of message %d from %s", message.id, sender.decode(errors="replace"))
            return
        self._last_id[sender] = message.id
        self._last_id.move_to_end(sender)
        if len(self._last_id) > MAX_REMEMBERED_LINKS:
            self._last_id.popitem(last=False)
        line = self._attachments.of(sender)
        yield sender, replace(message, via=line.carrier if line is not None else None)

    # -- answers ------------------------------------------------------------------------------------------------------

    def introduce(self, sender: bytes, question: Message) -> Message | None:
        """The answer to a question of the link itself; None to those that are meant for others."""
        if question.op == "hello":
            return Message("ok", {"name": self._name, "end": self._attachments.end()}, (), question.id)
        if question.op == "carry":
            return replace(self._attachments.begin(sender, question), id=question.id)
        return None

    def answer(self, sender: bytes, answer: Message) -> None:
        line = self._attachments.of(sender)
        rest = encode(answer) if line is None else line.send(encode(answer, line.carrier))
        if rest is not None:
            # Without ROUTER_MANDATORY zmq drops an answer whose asker is gone, which is what we want.
            self._socket.send([sender, *rest])
