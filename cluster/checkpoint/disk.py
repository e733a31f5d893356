"""Every change that checkpoints make to a local file system, so that trials can strike between any two of them."""

from __future__ import annotations

import os


class Disk:
    """Plain system calls. Each raises OSError and has no effect beyond its name."""

    def before(self, operation: str) -> None:
        """Called ahead of every operation with its name; trials kill the process or raise an OSError here."""

    def mkdir(self, path: str) -> None:
        self.before("mkdir")
        os.mkdir(path)

    def create(self, path: str) -> int:
        """A file descriptor of an empty file; what was there is gone."""
        self.before("create")
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, file: int, data: memoryview) -> None:
        self.before("write")
        while len(data):  # one call takes at most 2 GiB, and less when a signal comes
            data = data[os.write(file, data) :]

    def fsync(self, file: int) -> None:
        self.before("fsync")
        os.fsync(file)

    def fsync_dir(self, path: str) -> None:
        """Makes names in the directory (created, renamed) survive a power failure."""
        self.before("fsync_dir")
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def rename(self, source: str, target: str) -> None:
        self.before("rename")
        os.rename(source, target)

    def remove(self, path: str) -> None:
        self.before("remove")
        os.remove(path)

    def rmdir(self, path: str) -> None:
        self.before("rmdir")
        os.rmdir(path)


DISK = Disk()
