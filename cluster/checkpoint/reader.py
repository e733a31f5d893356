"""Tensors of a checkpoint by their names, whatever shards they are in and however many actors wrote them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from actors.errors import CheckpointError
from cluster.checkpoint.manifest import Shard
from cluster.checkpoint.names import Folder
from cluster.checkpoint.tensors import Entry, read_header, to_tensor

RUN_BYTES = 64 << 20
"""Tensors that lie side by side are read at once up to this size: a request to an object store takes long."""


class Readable(Protocol):
    """What of `Files` a reader needs."""

    def read(self, folder: Folder, file: str, start: int = 0, end: int | None = None) -> bytes:
        """As `Files.read`."""


class Reader:
    """Reads the shards' headers when made, and later only what is asked for. CheckpointError names a damaged shard."""

    def __init__(self, files: Readable, folder: Folder, shards: Sequence[Shard]) -> None:
        self._files = files
        self._folder = folder
        self._entry_of: dict[str, tuple[Shard, Entry]] = {}
        self._metadata: dict[str, Mapping[str, str]] = {}
        for shard in shards:
            self._add(shard)

    def _add(self, shard: Shard) -> None:
        try:
            header = read_header(partial(self._files.read, self._folder, shard.file), shard.num_bytes)
        except CheckpointError as error:
            raise CheckpointError(f"shard {shard.file} {error}", field=str(self._folder)) from None
        except OSError as error:
            raise CheckpointError(f"shard {shard.file} cannot be read: {error}", field=str(self._folder)) from error
        self._metadata[shard.name] = header.metadata
        for entry in header.entries:
            if entry.name in self._entry_of:
                other = self._entry_of[entry.name][0].file
                raise CheckpointError(
                    f"{entry.name} is in both {other} and {shard.file}",
                    field=str(self._folder),
                    remedy="of an expert with copies only the owner writes",
                )
            self._entry_of[entry.name] = shard, entry

    def names(self) -> tuple[str, ...]:
        """Of all tensors in all shards."""
        return tuple(self._entry_of)

    def metadata(self) -> dict[str, Mapping[str, str]]:
        """Shard -> what its writer gave with it."""
        return dict(self._metadata)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors on the CPU, in the order of `names`. Memory beyond them: twice RUN_BYTES, or the largest tensor."""
        names = list(names)
        wanted: dict[Shard, list[Entry]] = defaultdict(list)
        for name in dict.fromkeys(names):
            if name not in self._entry_of:
                raise CheckpointError(f"{name} is not in the checkpoint", field=str(self._folder))
            shard, entry = self._entry_of[name]
            wanted[shard].append(entry)
        found: dict[str, Tensor] = {}
        for shard, entries in wanted.items():
            for run in _runs(sorted(entries, key=lambda entry: (entry.start, entry.end))):
                found.update(self._read_run(shard, run))
        return {name: found[name] for name in names}

    def _read_run(self, shard: Shard, run: Sequence[Entry]) -> Iterator[tuple[str, Tensor]]:
        start, end = run[0].start, run[-1].end
        try:
            data = self._files.read(self._folder, shard.file, start, end) if end > start else b""
        except OSError as error:
            raise CheckpointError(f"shard {shard.file} cannot be read: {error}", field=str(self._folder)) from error
        if len(data) != end - start:
            raise CheckpointError(f"shard {shard.file} became shorter while it was read", field=str(self._folder))
        view = memoryview(data)
        for entry in run:
            yield entry.name, to_tensor(entry, view[entry.start - start : entry.end - start])


def _runs(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    run: list[Entry] = []
    for entry in entries:
        if run and (entry.start != run[-1].end or entry.end - run[0].start > RUN_BYTES):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run
