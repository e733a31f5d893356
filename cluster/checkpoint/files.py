"""Where checkpoints lie: folders of files below a local path or any fsspec URL.

Locally a draft is a folder of its own name, renamed when it is complete. Object stores cannot rename: there a draft
lies where the checkpoint will be, and its manifest, written last, makes it one.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from actors.errors import CheckpointError, InvalidInput
from cluster.checkpoint.disk import Disk
from cluster.checkpoint.manifest import MANIFEST_NAME
from cluster.checkpoint.names import Folder

ASIDE = ".unreadable"


class Files(ABC):
    """All methods raise OSError. Folders are named by `Folder`, files by their name in it."""

    draft_is_named: bool
    """Whether a draft's folder is told from a checkpoint's by its name; else by having no manifest."""

    def __init__(self, url: str) -> None:
        self.url = url

    def url_of(self, folder: Folder) -> str:
        return f"{self.url}/{folder}"

    @abstractmethod
    def folders(self) -> list[Folder]:
        """In no order. None where nothing was ever written."""

    @abstractmethod
    def make_draft(self, folder: Folder) -> Folder:
        """Under the name that a draft has here."""

    @abstractmethod
    def write(self, folder: Folder, file: str, pieces: Iterable[memoryview]) -> None:
        """Durable on return; after an error there may be a part of it."""

    @abstractmethod
    def publish(self, draft: Folder) -> Folder:
        """Turns a draft that holds its manifest into a checkpoint: wholly or not at all, durable on return."""

    @abstractmethod
    def retire(self, folder: Folder) -> None:
        """Removes it. When cut off, the rest is no checkpoint."""

    @abstractmethod
    def sizes(self, folder: Folder) -> dict[str, int]:
        """File -> bytes."""

    @abstractmethod
    def read(self, folder: Folder, file: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file, fewer where it ends earlier."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """A small file of its own beside the folders: replaced wholly or not at all, durable on return."""

    @abstractmethod
    def get(self, name: str) -> bytes | None:
        """What `put` wrote last; None where it never did."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Removes such a file; one that is gone is no error."""

    @abstractmethod
    def put_aside(self, name: str) -> None:
        """Such a file that cannot be used, under a name that nobody reads. What was put aside before is gone."""


class LocalFiles(Files):
    draft_is_named = True

    def __init__(self, path: str, disk: Disk) -> None:
        super().__init__(path)
        self._disk = disk

    def folders(self) -> list[Folder]:
        try:
            names = os.listdir(self.url)
        except FileNotFoundError:
            return []
        return [folder for name in names if (folder := Folder.parse(name)) is not None]

    def make_draft(self, folder: Folder) -> Folder:
        self._make_root()
        draft = replace(folder, kind="draft")
        self._disk.mkdir(self.url_of(draft))
        return draft

    def _make_root(self) -> None:
        missing = []
        path = self.url
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):  # of another process, a moment ago
                self._disk.mkdir(path)
            self._disk.fsync_dir(os.path.dirname(path))

    def write(self, folder: Folder, file: str, pieces: Iterable[memoryview]) -> None:
        handle = self._disk.create(f"{self.url_of(folder)}/{file}")
        try:
            for piece in pieces:
                self._disk.write(handle, piece)
            self._disk.fsync(handle)
        finally:
            os.close(handle)

    def publish(self, draft: Folder) -> Folder:
        step = replace(draft, kind="step")
        self._disk.fsync_dir(self.url_of(draft))
        self._disk.rename(self.url_of(draft), self.url_of(step))
        self._disk.fsync_dir(self.url)
        return step

    def retire(self, folder: Folder) -> None:
        dead = replace(folder, kind="dead")
        if folder.kind != "dead":
            self._disk.rename(self.url_of(folder), self.url_of(dead))
        path = self.url_of(dead)
        for name in os.listdir(path):
            self._disk.remove(f"{path}/{name}")
        self._disk.rmdir(path)

    def sizes(self, folder: Folder) -> dict[str, int]:
        with os.scandir(self.url_of(folder)) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read(self, folder: Folder, file: str, start: int = 0, end: int | None = None) -> bytes:
        with open(f"{self.url_of(folder)}/{file}", "rb") as handle:
            handle.seek(start)
            return handle.read(-1 if end is None else end - start)

    def put(self, name: str, data: bytes) -> None:
        self._make_root()
        path = f"{self.url}/{name}"
        handle = self._disk.create(f"{path}.new")
        try:
            self._disk.write(handle, memoryview(data))
            self._disk.fsync(handle)
        finally:
            os.close(handle)
        self._disk.rename(f"{path}.new", path)
        self._disk.fsync_dir(self.url)

    def get(self, name: str) -> bytes | None:
        try:
            with open(f"{self.url}/{name}", "rb") as handle:
                return handle.read()
        except FileNotFoundError:
            return None

    def drop(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._disk.remove(f"{self.url}/{name}")

    def put_aside(self, name: str) -> None:
        self._disk.rename(f"{self.url}/{name}", f"{self.url}/{name}{ASIDE}")


class ObjectFiles(Files):
    draft_is_named = False

    def __init__(self, url: str) -> None:
        super().__init__(url)
        import fsspec  # type: ignore[import-untyped]  # not needed, and not imported, for a local path

        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise InvalidInput(str(error), field="url", value=url, remedy="install fsspec's package for it") from None

    def folders(self) -> list[Folder]:
        names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in self._list(self._root))
        return [folder for name in names if (folder := Folder.parse(name)) is not None]

    def make_draft(self, folder: Folder) -> Folder:
        draft = replace(folder, kind="step")
        for path in (self._root, self._path(draft)):
            # Object stores need no folders and may refuse to make one; where they are needed, writing will say so.
            with contextlib.suppress(OSError, NotImplementedError):
                self._fs.mkdir(path, create_parents=False)
        return draft

    def write(self, folder: Folder, file: str, pieces: Iterable[memoryview]) -> None:
        path = f"{self._path(folder)}/{file}"
        with _as_os_error():
            if file == MANIFEST_NAME:
                self._fs.pipe_file(path, b"".join(pieces))  # one request: wholly or not at all
            else:
                with self._fs.open(path, "wb") as handle:
                    for piece in pieces:
                        handle.write(piece)

    def publish(self, draft: Folder) -> Folder:
        return draft  # its manifest did that

    def retire(self, folder: Folder) -> None:
        path = self._path(folder)
        with _as_os_error():
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{path}/{MANIFEST_NAME}")
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(path, recursive=True)

    def sizes(self, folder: Folder) -> dict[str, int]:
        return {entry["name"].rpartition("/")[2]: int(entry["size"] or 0) for entry in self._list(self._path(folder))}

    def read(self, folder: Folder, file: str, start: int = 0, end: int | None = None) -> bytes:
        with _as_os_error():
            data: bytes = self._fs.cat_file(f"{self._path(folder)}/{file}", start=start, end=end)
            return data

    def put(self, name: str, data: bytes) -> None:
        with _as_os_error():
            with contextlib.suppress(OSError, NotImplementedError):  # as of `make_draft`
                self._fs.mkdir(self._root, create_parents=False)
            self._fs.pipe_file(f"{self._root}/{name}", data)  # one request: wholly or not at all

    def get(self, name: str) -> bytes | None:
        self._fs.invalidate_cache()
        with _as_os_error():
            try:
                data: bytes = self._fs.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
            return data

    def drop(self, name: str) -> None:
        with _as_os_error(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def put_aside(self, name: str) -> None:
        with _as_os_error():
            self._fs.mv(f"{self._root}/{name}", f"{self._root}/{name}{ASIDE}")

    def _path(self, folder: Folder) -> str:
        return f"{self._root}/{folder}"

    def _list(self, path: str) -> list[dict[str, Any]]:
        self._fs.invalidate_cache()  # other processes write here too
        try:
            with _as_os_error():
                return list(self._fs.ls(path, detail=True))
        except FileNotFoundError:
            return []


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """fsspec's packages let errors of their HTTP libraries through, of any class."""
    try:
        yield
    except (OSError, InvalidInput):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def open_files(url: str, disk: Disk) -> Files:
    """InvalidInput for a URL of no file system that is known here."""
    protocol, separator, path = url.partition("://")
    if not url or (separator and not path):
        raise InvalidInput("names no folder", field="url", value=url)
    if not separator or protocol in ("file", "local"):
        # Absolute: drafts go to processes with other working directories.
        return LocalFiles(os.path.abspath(os.path.expanduser(path if separator else url)), disk)
    return ObjectFiles(url.rstrip("/"))


def open_folder(url: str, disk: Disk) -> tuple[Files, Folder]:
    """The store and the folder in it that `Files.url_of` names. CheckpointError if it is no such URL."""
    root, _, name = url.rpartition("/")
    folder = Folder.parse(name)
    if folder is None:
        raise CheckpointError("is no folder of a checkpoint", field="url", value=url)
    return open_files(root, disk), folder
