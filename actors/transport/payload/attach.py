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

logger = logging.getLogger(__name__)

TOKEN_BYTES = 32
MAX_DESCRIPTORS = 4
MAX_BEGUN = 64
"""Links that have asked for a carrier and not come to the line yet, at most."""
_MET = b"met"


class Line:
    """The link's end."""

    def __init__(self, carrier: Carrier, connection: socket.socket) -> None:
        self.carrier, self._connection = carrier, connection

    def close(self) -> None:
        self._connection.close()
        self.carrier.close()


def attach(link: Link, settings: PayloadSettings, there: End, *, on_one_host: bool, timeout_s: float) -> Line | None:
    """Of an open link whose peer has told its end. None: payloads cross the socket.

    `InvalidInput` where a kind is demanded that cannot be; whatever else fails is said in the log.
    """
    kind = choose(End.of(settings), there, on_one_host=on_one_host)
    if kind == "socket":
        return None
    try:
        return _attach(link, kind, settings, timeout_s)
    except (PeerLost, LinkTimeout):
        raise
    except (OSError, RuntimeError, MoeClusterError) as error:
        if settings.wish == kind:
            raise InvalidInput(f"{link.peer}: {error}", field="links.payload", value=kind, remedy="use auto") from error
        logger.warning("payloads from and to %s cross the socket: %r", link.peer, error)
        return None


def _attach(link: Link, kind: str, settings: PayloadSettings, timeout_s: float) -> Line:
    carrier = new_carrier(kind, settings, link.peer)
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
    return Line(carrier, connection)


@dataclass(frozen=True)
class _Begun:
    sender: bytes
    carrier: Carrier
    offer: Mapping[str, Any]


class Attachments:
    """The server's end: a carrier for each link that has one. Of one thread."""

    def __init__(self, settings: PayloadSettings, directory: str) -> None:
        self._settings = settings
        self._path = os.path.join(directory, "carry")
        self._begun: OrderedDict[bytes, _Begun] = OrderedDict()
        self._carriers: dict[bytes, Carrier] = {}
        self._lines: dict[int, tuple[socket.socket, bytes | None]] = {}
        """By descriptor: a connection, and whose it is once it has shown its token."""
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

    def of(self, sender: bytes) -> Carrier | None:
        return self._carriers.get(sender)

    def begin(self, sender: bytes, question: Message) -> Message:
        """The answer to `carry`. Raises nothing."""
        fields: Any = question.fields
        try:
            kind, offer = str(fields["kind"]), dict(fields["offer"])
            if self._settings.wish not in ("auto", kind):
                raise InvalidInput(f"this end wants {self._settings.wish}", field="links.payload", value=kind)
            carrier = new_carrier(kind, self._settings, _name(sender))
        except MoeClusterError as error:
            return error_answer(error)
        except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
            logger.warning("%s gets no carrier: %r", _name(sender), error)
            return error_answer(error)
        token = secrets.token_bytes(TOKEN_BYTES)
        self._begun[token] = _Begun(sender, carrier, offer)
        if len(self._begun) > MAX_BEGUN:
            self._begun.popitem(last=False)[1].carrier.close()
        return Message("ok", {"token": token, "line": self._path, "offer": dict(carrier.offer())})

    def look(self) -> None:
        """What has happened at the lines. Does not wait."""
        for descriptor, _ in self._events.poll(0):
            if descriptor == self._listener.fileno():
                self._accept()
            else:
                self._hear(descriptor)

    def close(self) -> None:
        for descriptor in list(self._lines):
            self._drop(descriptor)
        for begun in self._begun.values():
            begun.carrier.close()
        self._events.close()
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # gone already
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._lines[connection.fileno()] = connection, None
            self._events.register(connection.fileno(), select.EPOLLIN)

    def _hear(self, descriptor: int) -> None:
        connection, sender = self._lines[descriptor]
        token, shown = b"", list[int]()
        with contextlib.suppress(OSError):
            token, shown, _, _ = _receive(connection, TOKEN_BYTES)
        begun = self._begun.pop(token, None) if sender is None else None
        if begun is None:  # it has ended, or is not of this cluster
            for other in shown:
                os.close(other)
            self._drop(descriptor)
            return
        try:
            begun.carrier.meet(begun.offer, shown)
            socket.send_fds(connection, [_MET], list(begun.carrier.descriptors()))
        except (MoeClusterError, KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
            logger.warning("%s gets no carrier: %r", _name(begun.sender), error)
            begun.carrier.close()
            self._drop(descriptor)
            return
        self._lines[descriptor] = connection, begun.sender
        self._carriers[begun.sender] = begun.carrier

    def _drop(self, descriptor: int) -> None:
        connection, sender = self._lines.pop(descriptor)
        connection.close()  # which takes it out of what is looked at, too
        if sender is not None:
            self._carriers.pop(sender).close()


def _receive(connection: socket.socket, size: int) -> tuple[bytes, list[int], int, Any]:
    return socket.recv_fds(connection, size, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)


def _name(sender: bytes) -> str:
    return sender.decode(errors="replace")
