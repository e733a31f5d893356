"""Saving and finding checkpoints. The coordinator begins and commits; in between every actor writes a shard of its own.

A checkpoint is a folder `step-VERSION.SEQUENCE.TOKEN` with a safetensors file of each actor and `manifest.json`. It
appears complete or not at all, whatever moment a process or a machine dies at (`moe-cluster bench checkpoint`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from actors.errors import CheckpointError, InvalidInput
from cluster.checkpoint.disk import DISK, Disk
from cluster.checkpoint.files import Files, open_files, open_folder
from cluster.checkpoint.manifest import MANIFEST_NAME, Manifest, Shard, check_shard_name
from cluster.checkpoint.names import Folder
from cluster.checkpoint.reader import Reader
from cluster.checkpoint.tensors import CHUNK_BYTES, pieces
from cluster.errors import StorageFull

logger = logging.getLogger(__name__)

Verify = Literal["sizes", "hashes"]


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written; goes to the actors that write it."""

    url: str
    """Of its folder."""
    version: int
    """Committed steps."""


@dataclass(frozen=True)
class Found:
    manifest: Manifest
    url: str
    """Of its folder."""
    skipped: tuple[str, ...]
    """A sentence for each newer checkpoint that cannot be used: which shard, and what is wrong with it."""


def write_shard(
    draft: Draft, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, disk: Disk = DISK
) -> Shard:
    """Writes one actor's tensors, durably; returns what the manifest says of them. Memory: one tensor of a GPU at most.

    The tensors must not change until it returns: the hash is of what was written, even if that was torn. StorageFull:
    the whole draft is removed, so other writers of it may get CheckpointError (the draft is gone) for the same reason.
    """
    check_shard_name(name)
    files, folder = open_folder(draft.url, disk)
    digest = hashlib.sha256()
    num_bytes = 0

    def measured() -> Iterator[memoryview]:
        nonlocal num_bytes
        for piece in pieces(tensors, metadata):
            digest.update(piece)
            num_bytes += len(piece)
            yield piece

    with _translated(f"{draft.url}/{name}.safetensors", files, folder):
        files.write(folder, Shard(name, 0, "").file, measured())
    return Shard(name, num_bytes, digest.hexdigest())


def open_shards(found: Found) -> Reader:
    """CheckpointError names a shard that was damaged since it was found."""
    files, folder = open_folder(found.url, DISK)
    return Reader(files, folder, found.manifest.shards)


class CheckpointStore:
    """Checkpoints of one job below a URL (a path, or any that fsspec knows). One draft at a time: `begin` gives up
    those begun before. What was committed last counts as the newest, whatever its version."""

    def __init__(self, url: str, keep: int = 2, *, disk: Disk = DISK) -> None:
        """`keep`: complete checkpoints that stay, at least 2. InvalidInput for a URL that cannot be used."""
        if keep < 2:
            raise InvalidInput("leaves nothing to fall back to", field="keep", value=keep, remedy="keep 2 or more")
        self.keep = keep
        self._files = open_files(url, disk)

    @property
    def url(self) -> str:
        return self._files.url

    def begin(self, version: int) -> Draft:
        """A draft of the state after `version` committed steps. StorageFull, or CheckpointError if nothing can be
        written at the URL."""
        if version < 0:
            raise InvalidInput("is below 0", field="version", value=version)
        with _translated(self.url):
            sequence = 1 + max((folder.sequence for folder in self._files.folders()), default=0)
            self._tidy(sequence)  # first: a full disk may be full of leftovers
            folder = self._files.make_draft(Folder(sequence, version, secrets.token_hex(4), "draft"))
        return Draft(self._files.url_of(folder), version)

    def commit(self, draft: Draft, manifest: Manifest) -> Found:
        """Makes the draft a checkpoint, durably, then removes what `keep` leaves over.

        StorageFull: the draft is removed. CheckpointError: the draft is gone (a newer one was begun, or a writer found
        the storage full), or its shards are not as the manifest says and could not be loaded; the draft stays.
        """
        if manifest.version != draft.version:
            raise InvalidInput(f"is not the draft's, {draft.version}", field="version", value=manifest.version)
        folder = self._folder_of(draft)
        with _translated(draft.url, self._files, folder):
            if flaw := self._flaw(folder, manifest, "sizes"):
                raise CheckpointError(flaw, field=str(folder), remedy="begin another draft")
            Reader(self._files, folder, manifest.shards)  # every header can be read and no tensor is there twice
            self._files.write(folder, MANIFEST_NAME, [memoryview(manifest.to_json())])
            step = self._files.publish(folder)
        self._tidy(step.sequence)
        return Found(manifest, self._files.url_of(step), ())

    def discard(self, draft: Draft) -> None:
        """Gives up a draft; one that is gone already is no error, and neither is storage that cannot be reached."""
        with _survived(f"removal of {draft.url}"):
            self._files.retire(self._folder_of(draft))

    def latest(self, verify: Verify = "hashes") -> Found | None:
        """The newest checkpoint whose manifest and shards are right. None: none was ever committed.

        `hashes` reads every byte of it; `sizes` only what the shards' sizes tell. CheckpointError that says what is
        wrong with each if there are some and none is right, or if the storage cannot be read.
        """
        skipped: list[str] = []
        with _translated(self.url):
            steps = [folder for folder in self._files.folders() if folder.kind == "step"]
            for folder in sorted(steps, reverse=True):
                try:
                    manifest = self._manifest(folder)
                    flaw = "" if manifest is None else self._flaw(folder, manifest, verify)
                except InvalidInput as error:
                    manifest, flaw = None, str(error)
                if manifest is not None and not flaw:
                    return Found(manifest, self._files.url_of(folder), tuple(skipped))
                if flaw:
                    skipped.append(f"{folder}: {flaw}")
        if skipped:
            raise CheckpointError(
                f"no checkpoint can be used; {'; '.join(skipped)}",
                field=self.url,
                remedy="restore one of them, or start in another folder",
            )
        return None

    def committed(self) -> list[Found]:
        """Newest first: those whose manifest and sizes are right. CheckpointError if the storage cannot be read."""
        listed: list[Found] = []
        with _translated(self.url):
            for folder in sorted((f for f in self._files.folders() if f.kind == "step"), reverse=True):
                with contextlib.suppress(InvalidInput):
                    manifest = self._manifest(folder)
                    if manifest is not None and not self._flaw(folder, manifest, "sizes"):
                        listed.append(Found(manifest, self._files.url_of(folder), ()))
        return listed

    def _folder_of(self, draft: Draft) -> Folder:
        root, _, name = draft.url.rpartition("/")
        folder = Folder.parse(name)
        if folder is None or root != self.url:
            raise InvalidInput(f"is no draft of {self.url}", field="draft", value=draft.url)
        return folder

    def _manifest(self, folder: Folder) -> Manifest | None:
        """None: was never committed. InvalidInput: missing or damaged."""
        try:
            data = self._files.read(folder, MANIFEST_NAME)
        except FileNotFoundError:
            if self._files.draft_is_named:
                raise CheckpointError(f"{MANIFEST_NAME} is missing") from None
            return None
        except OSError as error:
            raise _damage(error, MANIFEST_NAME) from error
        manifest = Manifest.from_json(data)
        if manifest.version != folder.version:
            raise CheckpointError(f"{MANIFEST_NAME} is of another checkpoint, version {manifest.version}")
        return manifest

    def _flaw(self, folder: Folder, manifest: Manifest, verify: Verify) -> str:
        """What is wrong with its shards; empty if nothing is."""
        try:
            sizes = self._files.sizes(folder)
        except FileNotFoundError:
            sizes = {}
        if manifest.shards and not any(shard.file in sizes for shard in manifest.shards):
            return "all shards are missing, the folder is gone or empty"
        for shard in manifest.shards:
            size = sizes.get(shard.file)
            if size is None:
                return f"shard {shard.file} is missing"
            if size < shard.num_bytes:
                return f"shard {shard.file} is truncated: has {size} of {shard.num_bytes} bytes"
            if size > shard.num_bytes:
                return f"shard {shard.file} is altered: has {size} bytes, {shard.num_bytes} were written"
        for shard in manifest.shards if verify == "hashes" else ():
            if self._sha256(folder, shard) != shard.sha256:
                return f"shard {shard.file} is altered: its hash differs"
        return ""

    def _sha256(self, folder: Folder, shard: Shard) -> str:
        digest = hashlib.sha256()
        try:
            for start in range(0, shard.num_bytes, CHUNK_BYTES):
                end = min(start + CHUNK_BYTES, shard.num_bytes)
                digest.update(self._files.read(folder, shard.file, start, end))
        except OSError as error:
            raise _damage(error, f"shard {shard.file}") from error
        return digest.hexdigest()

    def _tidy(self, sequence: int) -> None:
        """Removes leftovers of drafts begun before `sequence`, and checkpoints beyond `keep`. Never fails: what it
        cannot do now, the next one does."""
        folders: list[Folder] = []
        with _survived(f"listing of {self.url}"):
            folders = sorted(self._files.folders(), reverse=True)
        kept: list[int] = []
        for folder in folders:
            with _survived(f"removal of {self._files.url_of(folder)}"):
                if self._is_spent(folder, sequence, kept):
                    self._files.retire(folder)

    def _is_spent(self, folder: Folder, sequence: int, kept: list[int]) -> bool:
        """`kept`: versions of the complete checkpoints found so far, newest first; grows by this one if it is one.

        Only a version below those kept counts, so that after a fall-back the damaged ones do not push out good ones.
        What is damaged, or of another course, goes when `keep` newer ones are there.
        """
        if folder.kind == "dead":
            return True
        if folder.kind == "draft" or not (self._files.draft_is_named or MANIFEST_NAME in self._files.sizes(folder)):
            return folder.sequence < sequence
        if len(kept) == self.keep or folder.version in kept:
            return True
        with contextlib.suppress(InvalidInput):
            manifest = self._manifest(folder)
            complete = manifest is not None and not self._flaw(folder, manifest, "sizes")
            if complete and (not kept or folder.version < kept[-1]):
                kept.append(folder.version)
        return False


def _damage(error: OSError, what: str) -> Exception:
    """A file that is gone or that the device cannot read is damage, to fall back from. Storage that is out of reach
    is not: falling back then would lose steps that are safe."""
    if isinstance(error, FileNotFoundError) or error.errno == errno.EIO:
        return CheckpointError(f"{what} cannot be read: {error}")
    return error


@contextlib.contextmanager
def _translated(url: str, files: Files | None = None, draft: Folder | None = None) -> Iterator[None]:
    """The border between OSError and our errors. With a draft: it is removed when the storage is full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            if files is not None and draft is not None:
                with _survived(f"removal of {url}"):
                    files.retire(draft)
            raise StorageFull(f"no room to write {url}; earlier checkpoints are untouched ({error})") from error
        if isinstance(error, FileNotFoundError) and draft is not None:
            raise CheckpointError(
                f"the draft is gone ({error})",
                field=url,
                remedy="begin another; every node must see the same storage, and only one coordinator use the folder",
            ) from error
        raise CheckpointError(f"the storage fails: {error}", field=url) from error


@contextlib.contextmanager
def _survived(action: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        pass  # someone else did it
    except OSError as error:
        logger.warning("%s failed: %s", action, error)
