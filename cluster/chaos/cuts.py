"""Links of a living process cut from outside: a duplicate of its socket is shut down, and both ends see it end.

Without rights beyond those over one's own processes, and without a switch in the product: Linux 5.6's pidfd_getfd gives
the descriptors of a process that one may trace, such as a descendant. Only links over ipc:// are cut, as all are on one
machine; Ray's own connections stay.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

_PIDFD_GETFD = 438
"""Its number on every architecture; neither libc nor Python have it by name."""
_LINK = re.compile(r".*/moe\.[^/]+/(link|line)")
"""Where a `SocketServer` listens, for zmq and for lines."""


def cut_links(pid: int) -> int:
    """Every link from and to this process. -> how many ends. OSError if that is not allowed; none if it has ended."""
    count = 0
    with suppress(ProcessLookupError), _opened(pid) as process:
        for number in _sockets(pid):
            with suppress(ProcessLookupError), closing(_duplicate(process, number)) as found:
                if _is_link(found):
                    found.shutdown(socket.SHUT_RDWR)
                    count += 1
    return count


@contextmanager
def _opened(pid: int) -> Iterator[int]:
    process = os.pidfd_open(pid)
    try:
        yield process
    finally:
        os.close(process)


def _sockets(pid: int) -> list[int]:
    found = []
    with suppress(FileNotFoundError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if os.readlink(entry).startswith("socket:"):
                    found.append(int(entry.name))
    return found


def _duplicate(process: int, number: int) -> socket.socket:
    """`ProcessLookupError` if it was closed meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    duplicate = libc.syscall(_PIDFD_GETFD, process, number, 0)
    if duplicate < 0:
        error = ctypes.get_errno()
        if error in (errno.EBADF, errno.ESRCH):
            raise ProcessLookupError(error, os.strerror(error))
        raise OSError(error, f"{os.strerror(error)}: pidfd_getfd")
    return socket.socket(fileno=duplicate)


def _is_link(found: socket.socket) -> bool:
    if found.family != socket.AF_UNIX or found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    try:
        names = found.getsockname(), found.getpeername()
    except OSError:  # its other end has gone already
        return False
    return any(_LINK.fullmatch(name if isinstance(name, str) else name.decode(errors="replace")) for name in names)
