"""How the two ends of a link come to share a carrier, and how each learns that the other is gone.

    link:    carry {kind, offer}          over the socket (and under its keys)
    server:  ok {token, line, offer}      the same
    link:    token + descriptors          over the line, a unix socket in a directory of this user alone
    server:  "met" + descriptors          the same

The line stays open as long as the link: when it ends, the server lets go of what the link has shown.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import socket
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.errors import InvalidInput, LinkTimeout, MoeClusterError, PeerLost, ProtocolError
from actors.transport.contract import Link
from actors.transport.message import Message, error_answer
from actors.transport.payload.choice import End, choose, new_carrier
from actors.transport.payload.contract import Carrier, PayloadSettings
from actors.transport.payload.line import Arrived, Line

logger = logging.getLogger(__name__)

TOKEN_BYTES = 32
MAX_DESCRIPTORS = 4
MAX_BEGUN = 64
"""Links that have asked for a carrier and not come to the line yet, at most; and connections without a token."""
_MET = b"met"


def attach(
    link: Link,
    settings: PayloadSettings,
    there: End,
    *,
    on_one_host: bool,
    max_bytes: int,
    takes_messages: bool,
    timeout_s: float,
) -> Line | None:
    """Of an open link whose peer has told its end. None: payloads cross the socket. `max_bytes` and `takes_messages` as
    of a `Line`.

    `InvalidInput` where a kind is demanded that cannot be; whatever else fails is said in the log.
    """
    for kind in choose(End.of(settings), there, on_one_host=on_one_host):
        try:
            connection, carrier = _attach(link, kind, settings, timeout_s)
        except (PeerLost, LinkTimeout):
            raise
        except (OSError, RuntimeError, MoeClusterError) as error:
            if settings.wish == kind:
                raise InvalidInput(
                    f"{link.peer}: {error}", field="links.payload", value=kind, remedy="use auto"
                ) from error
            logger.warning("payloads from and to %s go another way than %s: %r", link.peer, kind, error)
        else:
            return Line(connection, carrier, link.peer, max_bytes=max_bytes, takes_messages=takes_messages)
    return None


def _attach(link: Link, kind: str, settings: PayloadSettings, timeout_s: float) -> tuple[socket.socket, Carrier]:
    carrier = new_carrier(kind, settings, link.peer, 0)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        fields: Any = link.call(Message("carry", {"kind": kind, "offer": dict(carrier.offer())}), timeout_s).fields
        connection.settimeout(timeout_s)
        connection.connect(str(fields["line"]))
        socket.send_fds(connection, [fields["token"]], list(carrier.descriptors()))
        said, descriptors, _, _ = _receive(connection, len(_MET))
        if said != _MET:
            raise ProtocolError("does not know this link's carrier", peer=link.peer)
        carrier.meet(fields["offer"], descriptors)
    except BaseException:
        connection.close()
        carrier.close()
        raise
    return connection, carrier


@dataclass(frozen=True)
class _Begun:
    sender: bytes
    carrier: Carrier
    offer: Mapping[str, Any]


class Attachments:
    """The server's end: a line and a carrier for each link that has them. Of one thread."""

    def __init__(self, settings: PayloadSettings, directory: str, *, max_bytes: int, takes_messages: bool) -> None:
        """`max_bytes` and `takes_messages` as of a `Line`."""
        self._settings, self._max_bytes, self._takes_messages = settings, max_bytes, takes_messages
        self._path = os.path.join(directory, "line")
        self._begun: OrderedDict[bytes, _Begun] = OrderedDict()
        self._strangers: dict[int, socket.socket] = {}
        """By descriptor: connections that have not shown a token yet."""
        self._senders: dict[int, bytes] = {}
        self._lines: dict[bytes, Line] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(self._path)
        self._listener.listen()
        self._events = select.epoll()
        self._events.register(self._listener.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """Of a file that can be read when there is something to `look` at."""
        return self._events.fileno()

    def end(self) -> dict[str, Any]:
        """For the answer to `hello`."""
        return End.of(self._settings).fields()

    def of(self, sender: bytes) -> Line | None:
        return self._lines.get(sender)

    def begin(self, sender: bytes, question: Message) -> Message:
        """The answer to `carry`. Raises nothing."""
        fields: Any = question.fields
        try:
            kind, offer = str(fields["kind"]), dict(fields["offer"])
            if self._settings.wish not in ("auto", kind):
                raise InvalidInput(f"this end wants {self._settings.wish}", field="links.payload", value=kind)
            carrier = new_carrier(kind, self._settings, _name(sender), 1)
        except MoeClusterError as error:
            return error_answer(error)
        except Exception as error:  # whatever a driver does, the server must live on
            logger.warning("%s gets no carrier", _name(sender), exc_info=True)
            return error_answer(error)
        token = secrets.token_bytes(TOKEN_BYTES)
        self._begun[token] = _Begun(sender, carrier, offer)
        if len(self._begun) > MAX_BEGUN:
            self._begun.popitem(last=False)[1].carrier.close()
        return Message("ok", {"token": token, "line": self._path, "offer": dict(carrier.offer())})

    @property
    def look_out_until(self) -> float:
        """The latest of the lines, of which see."""
        return max((line.look_out_until for line in self._lines.values()), default=0.0)

    def is_ready(self) -> bool:
        """Whether there is something to `look` at."""
        return bool(self._events.poll(0))

    def look(self) -> list[tuple[bytes, Arrived]]:
        """What has happened at the lines: messages, by sender. Does not wait."""
        messages: list[tuple[bytes, Arrived]] = []
        for descriptor, _ in self._events.poll(0):
            if descriptor == self._listener.fileno():
                self._accept()
            elif descriptor in self._strangers:
                self._meet(self._strangers.pop(descriptor))
            else:
                sender = self._senders[descriptor]
                try:
                    messages += [(sender, message) for message in self._lines[sender].receive()]
                except (EOFError, ProtocolError):
                    self._unwatch(descriptor)
                    del self._senders[descriptor]
                    self._lines.pop(sender).close()
        return messages

    def close(self) -> None:
        for line in self._lines.values():
            line.close()
        for stranger in self._strangers.values():
            stranger.close()
        for begun in self._begun.values():
            begun.carrier.close()
        self._events.close()
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # gone already
            connection, _ = self._listener.accept()
            if len(self._strangers) >= MAX_BEGUN:
                connection.close()
                return
            connection.setblocking(False)
            self._strangers[connection.fileno()] = connection
            self._events.register(connection.fileno(), select.EPOLLIN)

    def _meet(self, connection: socket.socket) -> None:
        """It has said something, which must be the token of a link that has asked, or has ended."""
        token, shown = b"", list[int]()
        with contextlib.suppress(OSError):
            token, shown, _, _ = _receive(connection, TOKEN_BYTES)
        begun = self._begun.pop(token, None)
        if begun is not None and begun.sender in self._lines:
            begun.carrier.close()
            begun = None
        if begun is None:
            for descriptor in shown:
                os.close(descriptor)
            self._unwatch(connection.fileno())
            connection.close()
            return
        try:
            begun.carrier.meet(begun.offer, shown)
            socket.send_fds(connection, [_MET], list(begun.carrier.descriptors()))
        except Exception:  # as in `begin`
            logger.warning("%s gets no carrier", _name(begun.sender), exc_info=True)
            begun.carrier.close()
            self._unwatch(connection.fileno())
            connection.close()
            return
        line = Line(
            connection,
            begun.carrier,
            _name(begun.sender),
            max_bytes=self._max_bytes,
            takes_messages=self._takes_messages,
        )
        self._senders[connection.fileno()], self._lines[begun.sender] = begun.sender, line

    def _unwatch(self, descriptor: int) -> None:
        """Before it is closed: epoll forgets by itself only what no process has a duplicate of, as a child has that was
        just forked."""
        self._events.unregister(descriptor)


def _receive(connection: socket.socket, size: int) -> tuple[bytes, list[int], int, Any]:
    return socket.recv_fds(connection, size, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)


def _name(sender: bytes) -> str:
    return sender.decode(errors="replace")
