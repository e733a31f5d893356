"""For processes that have this folder on their PYTHONPATH: the disk below FULL_DISK is full while a file `full` is in
it. Stands in for a small file system where the right to mount one is missing."""

import errno
import os
from typing import Any

_open = os.open


def _open_unless_full(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
    disk = os.environ["FULL_DISK"]
    if flags & os.O_CREAT and str(path).startswith(f"{disk}/") and os.path.exists(f"{disk}/full"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    return _open(path, flags, *args, **kwargs)


if "FULL_DISK" in os.environ:
    os.open = _open_unless_full
