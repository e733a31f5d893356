"""Values that files hold, for processes that outlive the files' content: mounted secrets are exchanged beneath them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from actors.errors import InvalidInput

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
Signature = tuple[tuple[int, int, int] | None, ...]


class Reloaded(Generic[Value]):
    """What `read` made of the files, made anew when one of them has changed. Thread-safe.

    `read` raises `InvalidInput` for files that cannot be used: from the constructor that goes to the caller; later it
    is logged, once a change, and the last good value stays in use.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], Value]) -> None:
        self._files, self._read = tuple(files), read
        self._lock = threading.Lock()
        # Before reading: what changes in between is then seen as a change.
        self._seen = _signature(self._files)
        self._value = read()

    def current(self) -> Value:
        """Looks at the files' inode, time and size first: microseconds."""
        with self._lock:
            seen = _signature(self._files)
            if seen != self._seen:
                self._seen = seen
                self._read_anew()
            return self._value

    def _read_anew(self) -> None:
        names = ", ".join(map(str, self._files))
        try:
            self._value = self._read()
        except InvalidInput as error:
            logger.error("%s; what was read before stays in use", error)
        else:
            logger.info("read anew: %s", names)


def read_bytes(file: Path, field: str) -> bytes:
    """`InvalidInput` that blames `field` if there is no such file, or nothing in it."""
    try:
        content = file.read_bytes()
    except OSError as error:
        remedy = "name a file that this process may read"
        raise InvalidInput(f"cannot be read: {error.strerror}", field=field, value=str(file), remedy=remedy) from None
    if not content.strip():
        raise InvalidInput("is empty", field=field, value=str(file), remedy="write it anew")
    return content


def _signature(files: Sequence[Path]) -> Signature:
    return tuple(map(_signature_of, files))


def _signature_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
