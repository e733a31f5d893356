"""CURVE on links: who may speak to an actor's sockets, so that nobody else is heard and nobody reads along.

All actors of a cluster share one key pair, made by the coordinator and handed to each by a Ray call: it is in no file
and no environment. A server lets in who holds that pair and checks both sides: the client must know the server's key
(libzmq drops it otherwise), and the server must find the pair's key as the client's own (ZAP, https://rfc.zeromq.org/spec/27).
All of that happens in libzmq's threads: a stranger never reaches a handler.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.utils.monitor
import zmq.utils.z85

from actors.errors import InvalidInput

logger = logging.getLogger(__name__)

OVERHEAD_BYTES = 64
"""Of an encrypted frame, at most: libzmq adds 33 bytes before it looks at the largest size allowed."""
KEY_BYTES = 32
LOG_EVERY_S = 60.0
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
"""Monitor events of a link that was not let in."""

_ZAP = "inproc://zeromq.zap.01"
_WHY = {
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "one side of the link encrypts and the other does not",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the peer does not know this side's key",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the peer dropped the handshake: it has other keys, or it went away",
}


@dataclass(frozen=True)
class LinkKeys:
    """The key pair of a cluster's links, both halves as 40 bytes of Z85."""

    public: bytes
    secret: bytes = field(repr=False)
    on_ipc: bool = False
    """ipc:// is encrypted too; otherwise the access rights of its directory are what guards it."""

    @classmethod
    def generate(cls, *, on_ipc: bool = False) -> LinkKeys:
        """A fresh pair. `InvalidInput` where libzmq was built without CURVE."""
        if not zmq.has("curve"):
            remedy = "install pyzmq as a wheel, or set it to off on a network that you trust"
            raise InvalidInput("this libzmq was built without CURVE", field="links.secure", remedy=remedy)
        return cls(*zmq.curve_keypair(), on_ipc)


def secure_client(socket: Any, keys: LinkKeys) -> None:
    """Connections made from here on are encrypted."""
    socket.curve_serverkey = keys.public
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret


def secure_server(socket: Any, keys: LinkKeys) -> None:
    """Addresses bound from here on are for those who hold the keys; those bound before stay as they are."""
    _keep_gate(socket.context)
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.setsockopt(zmq.ZAP_DOMAIN, keys.public)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a gate libzmq would let everybody in who knows the key


def refusal(monitor: Any) -> str:
    """Takes the next event of a link's monitor: why the link was not let in, or nothing if it just ended."""
    event = zmq.utils.monitor.recv_monitor_message(monitor, zmq.DONTWAIT)["event"]
    return f"the handshake failed: {_WHY[event]} (links.secure)" if event in _WHY else ""


_kept: Any = None
_keeping = threading.Lock()


def _keep_gate(context: Any) -> None:
    """One thread a process answers for all servers; libzmq asks it about every client that comes."""
    global _kept
    with _keeping:
        if _kept is context:
            return
        socket = context.socket(zmq.REP)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(_ZAP)
        threading.Thread(target=_Gate(socket).run, name="link-gate", daemon=True).start()
        _kept = context


class _Gate:
    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._refused = 0
        self._next_log_s = 0.0

    def run(self) -> None:
        while True:
            try:
                request = self._socket.recv_multipart()
                self._socket.send_multipart(self._answer(request))
            except zmq.ContextTerminated:
                self._socket.close(0)
                return

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """Request: version, number, domain, address, identity, mechanism, the client's public key (32 bytes)."""
        version, number = (*request, b"", b"")[:2]
        if is_let_in(request):
            return [version, number, b"200", b"OK", b"", b""]
        self._note_refusal(request)
        return [version, number, b"400", b"this key is not known here", b"", b""]

    def _note_refusal(self, request: list[bytes]) -> None:
        self._refused += 1
        if time.monotonic() >= self._next_log_s:
            address = request[3].decode(errors="replace") if len(request) > 3 else "?"
            logger.warning("refused %d connections without the cluster's key, last from %s", self._refused, address)
            self._refused, self._next_log_s = 0, time.monotonic() + LOG_EVERY_S


def is_let_in(request: list[bytes]) -> bool:
    """The domain of a server is the public key that its clients must have."""
    if len(request) != 7 or request[5] != b"CURVE" or len(request[6]) != KEY_BYTES:
        return False
    return hmac.compare_digest(zmq.utils.z85.encode(request[6]), request[2])
