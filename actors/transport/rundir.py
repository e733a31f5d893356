"""Directories of a process in the temporary folder, which go when it dies, however it does.

    moe.3k9d_2hx/      mode 0700
        lock           held (flock) as long as the process lives: the kernel lets go of it
        link, line, .. what it is for

Whoever makes one also removes some of those that were left behind: of the same user, and whose lock can be taken. A
lock gets its name when it is held, so that a directory that is being made is nobody's to remove.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import random
import shutil
import stat
import tempfile
from collections.abc import Iterator

logger = logging.getLogger(__name__)

PREFIX = "moe."
"""Short: the path of a unix socket has 107 bytes, with the folder's and its own name."""
MAX_LOOKED_AT = 32
"""Directories at a time: as many processes may die for each that starts."""
_LOCK, _UNHELD = "lock", "lock.new"


class RunDirectory:
    """Of this process alone, for one thread at a time. More than one `remove` does nothing more."""

    def __init__(self) -> None:
        """`OSError` where the temporary folder cannot be written to."""
        remove_abandoned()
        self.path = tempfile.mkdtemp(prefix=PREFIX)
        self._lock = os.open(f"{self.path}/{_UNHELD}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: nobody can take it then, nor remove this
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(f"{self.path}/{_UNHELD}", f"{self.path}/{_LOCK}")

    def remove(self) -> None:
        """With all that is in it."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_abandoned(limit: int = MAX_LOOKED_AT) -> int:
    """Looks at `limit` directories, chosen at random, so that those of living processes are in nobody's way. -> how
    many are gone. Raises nothing."""
    folder = tempfile.gettempdir()
    try:
        names = [name for name in os.listdir(folder) if name.startswith(PREFIX)]
    except OSError:
        return 0
    chosen = random.sample(names, min(limit, len(names)))
    return sum(_remove_if_abandoned(os.path.join(folder, name)) for name in chosen)


def _remove_if_abandoned(path: str) -> bool:
    with contextlib.suppress(OSError), _taken(path) as is_taken:
        if is_taken:
            shutil.rmtree(path, ignore_errors=True)
            return True
    return False


@contextlib.contextmanager
def _taken(path: str) -> Iterator[bool]:
    """Whether its process is gone; inside nobody else finds the same. `OSError` for what is not ours to open."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        yield False
        return
    lock = os.open(f"{path}/{_LOCK}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield _try_lock(lock) and _is_same(lock, f"{path}/{_LOCK}")
    finally:
        os.close(lock)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def _is_same(descriptor: int, path: str) -> bool:
    """Somebody else may have removed it meanwhile, and a third made another one of that name."""
    return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
