"""Checkpoints on a local disk and in memory:// (an object store without rename): whole, newest first, never mixed."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load as load_with_library
from safetensors.torch import save as save_with_library

from actors.errors import CheckpointError, InvalidInput
from cluster.checkpoint import store as store_module
from cluster.checkpoint.disk import DISK, Disk
from cluster.checkpoint.manifest import MANIFEST_NAME, Manifest, Shard, _checksum
from cluster.checkpoint.names import ExpertEntry, expert_entry, parse_expert_entry
from cluster.checkpoint.reader import Reader
from cluster.checkpoint.store import CheckpointStore, Draft, Found, open_shards, write_shard
from cluster.checkpoint.tensors import DTYPES, pieces, read_header, to_tensor
from cluster.errors import StorageFull

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"model_type": "mixtral", "num_layers": 2, "num_experts": 8, "dtype": "float32"}
EXPERTS = {"expert-0": range(5), "expert-1": range(5, 8)}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"


def tensors_of(writer: str, value: float) -> dict[str, torch.Tensor]:
    return {
        expert_entry(layer, expert, "gate_up_proj", kind): torch.full((3, 4), value + expert / 100 + layer / 10)
        for layer in range(2)
        for expert in EXPERTS[writer]
        for kind in KINDS
    }


def manifest_of(draft: Draft, shards: tuple[Shard, ...]) -> Manifest:
    return Manifest(draft.version, 1.5, MODEL, {"request_id": "a", "position": [1, 2]}, shards)


def save(url: str, version: int, *, value: float | None = None, disk: Disk = DISK) -> Found:
    store = CheckpointStore(url, disk=disk)
    draft = store.begin(version)
    value = float(version) if value is None else value
    shards = tuple(write_shard(draft, name, tensors_of(name, value), {"actor": name}, disk=disk) for name in EXPERTS)
    return store.commit(draft, manifest_of(draft, shards))


def latest(url: str) -> Found:
    found = CheckpointStore(url).latest()
    assert found is not None
    return found


def value_of(found: Found) -> float:
    """What `save` was given; every tensor of the checkpoint is looked at."""
    reader = open_shards(found)
    read = reader.read(reader.names())
    values = {
        round(float(tensor[i, j]) - entry.expert / 100 - entry.layer / 10, 4)
        for name, tensor in read.items()
        for entry in [parse_expert_entry(name)]
        if entry is not None
        for i in range(3)
        for j in range(4)
    }
    assert len(read) == 2 * 8 * 3
    assert len(values) == 1
    return values.pop()


def folders(url: str) -> list[str]:
    files, root = fsspec.core.url_to_fs(url)
    return sorted(path["name"].rpartition("/")[2] for path in files.ls(root, detail=True)) if files.exists(root) else []


def versions(url: str) -> list[int]:
    assert all(name.startswith("step-") for name in folders(url))
    return [int(name.split("-")[1].split(".")[0]) for name in folders(url)]


def alter(found: Found, file: str, change: Callable[[bytes], bytes] | None) -> None:
    files, path = fsspec.core.url_to_fs(f"{found.url}/{file}")
    if change is None:
        files.rm_file(path)
    else:
        files.pipe_file(path, change(files.cat_file(path)))


def flipped(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# Round trips.


def test_what_was_saved_is_found_and_read(url: str) -> None:
    assert CheckpointStore(url).latest() is None
    committed = save(url, 7)
    found = latest(url)
    assert found == committed
    assert (found.manifest.version, found.manifest.created_s, found.skipped) == (7, 1.5, ())
    assert found.manifest.job == {"request_id": "a", "position": [1, 2]}
    assert open_shards(found).metadata() == {name: {"actor": name} for name in EXPERTS}
    assert value_of(found) == 7.0
    assert CheckpointStore(url).latest(verify="sizes") == found


def test_any_number_of_actors_reads_by_name(url: str) -> None:
    found = pickle.loads(pickle.dumps(save(url, 1)))  # noqa: S301 - it goes to actors
    seen = {}
    for share in (range(3), range(3, 6), range(6, 8)):  # 2 actors wrote
        names = [
            expert_entry(layer, expert, "gate_up_proj", kind) for expert in share for layer in (1, 0) for kind in KINDS
        ]
        read = open_shards(found).read(names)
        assert list(read) == names
        seen.update(read)
    expected = {**tensors_of("expert-0", 1.0), **tensors_of("expert-1", 1.0)}
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in seen)


def test_a_name_that_is_not_there(url: str) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.9\.x is not in the checkpoint"):
        open_shards(save(url, 1)).read(["layers.9.x"])


def test_reading_takes_just_the_bytes_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_shards(save(str(tmp_path), 1))
    reads: list[tuple[str, int]] = []
    files = reader._files
    plain = files.read

    def read(folder: Any, file: str, start: int = 0, end: int | None = None) -> bytes:
        data = plain(folder, file, start, end)
        reads.append((file, len(data)))
        return data

    monkeypatch.setattr(files, "read", read)
    names = [expert_entry(1, expert, "gate_up_proj", kind) for expert in (3, 4, 5) for kind in KINDS]
    reader.read(names)
    assert reads == [("expert-0.safetensors", 6 * 48), ("expert-1.safetensors", 3 * 48)]  # neighbours at once


def test_shards_are_safetensors_files_of_every_dtype() -> None:
    tensors = {code: torch.arange(6).reshape(2, 3).to(dtype) for code, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "strided": torch.arange(6.0).view(2, 3).T}
    data = b"".join(pieces(tensors, {"made": "here"}))
    same(load_with_library(data), tensors)
    library = save_with_library({name: tensor.contiguous() for name, tensor in tensors.items()}, {"made": "there"})
    for written in (data, library):
        header = read_header(lambda start, end, written=written: written[start:end], len(written))
        view = memoryview(written)
        same({entry.name: to_tensor(entry, view[entry.start : entry.end]) for entry in header.entries}, tensors)
    assert header.metadata == {"made": "there"}


def same(read: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert read.keys() == wanted.keys()
    for name, tensor in read.items():
        assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape)
        assert torch.equal(tensor.double(), wanted[name].double())


def test_a_large_tensor_is_written_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cluster.checkpoint.tensors.CHUNK_BYTES", 1000)
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 700)
    monkeypatch.setattr("cluster.checkpoint.reader.RUN_BYTES", 500)
    store = CheckpointStore(str(tmp_path))
    draft = store.begin(1)
    wanted = {"a": torch.randn(999), "b": torch.randn(7), "c": torch.randn(1)}
    store.commit(draft, manifest_of(draft, (write_shard(draft, "trunk", wanted, {}),)))
    same(open_shards(latest(str(tmp_path))).read(wanted), wanted)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}}', "cannot be read"),
        (b'{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}', "cannot be read"),
        (b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}', "cannot be read"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', "gap"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "speaks of"),
        (b"[1]", "cannot be read"),
        (b"{", "cannot be read"),
    ],
)
def test_a_header_that_lies_is_refused(header: bytes, said: str) -> None:
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    with pytest.raises(CheckpointError, match=said):
        read_header(lambda start, end: data[start:end], len(data))
    with pytest.raises(CheckpointError, match="longer than the file"):
        read_header(lambda start, end: b"\xff" * 8, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_experts_go_both_ways(kind: Any) -> None:
    entry = expert_entry(3, 17, "gate_up_proj", kind)
    assert parse_expert_entry(entry) == ExpertEntry(3, 17, "gate_up_proj", kind)
    assert entry == "layers.3.experts.17.gate_up_proj" + ("" if kind == "weight" else f".{kind}")


def test_names_that_are_no_experts() -> None:
    assert parse_expert_entry("model.layers.3.mlp.gate.weight") is None
    with pytest.raises(InvalidInput):
        expert_entry(0, 0, "down_proj.exp_avg", "weight")


# Falling back.


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("expert-1.safetensors", lambda data: data[:-5], r"shard expert-1\.safetensors is truncated: has \d+ of \d+"),
        ("expert-0.safetensors", lambda data: flipped(data, -1), r"shard expert-0\.safetensors is altered: its hash"),
        ("expert-0.safetensors", lambda data: data + b"x", r"shard expert-0\.safetensors is altered: has \d+ bytes"),
        ("expert-1.safetensors", None, r"shard expert-1\.safetensors is missing"),
        (MANIFEST_NAME, lambda data: data.replace(b"mixtral", b"mixtraL"), r"manifest\.json: is altered"),
        (MANIFEST_NAME, lambda data: data[: len(data) // 2], r"manifest\.json: is no JSON"),
        (MANIFEST_NAME, None, r"manifest\.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_named(
    url: str, file: str, change: Callable[[bytes], bytes] | None, said: str
) -> None:
    save(url, 1)
    damaged = save(url, 2)
    alter(damaged, file, change)
    found = latest(url)
    assert (found.manifest.version, value_of(found)) == (1, 1.0)
    if file == MANIFEST_NAME and change is None and url.startswith("memory"):
        assert found.skipped == ()  # in an object store it was never committed
    else:
        (sentence,) = found.skipped
        assert sentence.startswith(damaged.url.rpartition("/")[2])
        assert re.search(said, sentence)


def test_sizes_alone_find_no_altered_byte_but_a_truncated_shard(url: str) -> None:
    alter(save(url, 1), "expert-0.safetensors", lambda data: flipped(data, -1))
    found = CheckpointStore(url).latest(verify="sizes")
    assert found is not None
    alter(found, "expert-0.safetensors", lambda data: data[:-1])
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used; .*truncated"):
        CheckpointStore(url).latest(verify="sizes")


def test_the_next_save_after_a_fall_back_is_the_newest(url: str) -> None:
    for version in (90, 100):
        damaged = save(url, version)
    alter(damaged, "expert-1.safetensors", lambda data: flipped(data, -1))
    assert latest(url).manifest.version == 90
    save(url, 95)
    assert (latest(url).manifest.version, latest(url).skipped) == (95, ())
    assert versions(url) == [90, 95, 100]  # the damaged one does not push out a good one
    save(url, 100, value=5.0)
    assert value_of(latest(url)) == 5.0
    assert versions(url) == [95, 100]


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EACCES, "the storage fails"), (errno.EIO, r"no checkpoint can be used.*manifest\.json")]
)
def test_storage_out_of_reach_is_no_reason_to_fall_back(
    url: str, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    save(url, 1)
    store = CheckpointStore(url)

    def read(*args: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store._files, "read", read)
    with pytest.raises(CheckpointError, match=said):
        store.latest()


def test_no_altered_manifest_passes_for_another(url: str) -> None:
    manifest = save(url, 1).manifest
    data = manifest.to_json()
    assert Manifest.from_json(data) == manifest
    for at in range(len(data)):
        for changed in (flipped(data, at), data[:at]):
            try:
                read = Manifest.from_json(changed)
            except InvalidInput:
                continue
            assert read == manifest  # a space or line end


@pytest.mark.parametrize(
    "change",
    [{"version": True}, {"version": -1}, {"created_s": "now"}, {"model": None}, {"job": 3}, {"shards": [1]}]
    + [{"format": 2}, {"more": 1}]
    + [{"shards": [{"name": name, "num_bytes": 1, "sha256": "0" * 64}]} for name in ("../x", "", ".x", 3)]
    + [{"shards": [{"name": "a", "num_bytes": 1, "sha256": "0" * 64}] * 2}]
    + [{"shards": [{"name": "a", "num_bytes": -1, "sha256": "0" * 64}]}],
)
def test_a_manifest_that_cannot_be_is_refused_even_with_the_right_checksum(change: dict[str, Any]) -> None:
    body = {**json.loads(Manifest(1, 2.0, {}, None, ()).to_json()), **change}
    body.pop("sha256")
    with pytest.raises(InvalidInput):
        Manifest.from_json(json.dumps({**body, "sha256": _checksum(body)}).encode())


def test_a_checkpoint_of_another_model_is_refused_by_field(url: str) -> None:
    manifest = save(url, 1).manifest
    manifest.check_model(dict(MODEL))
    with pytest.raises(InvalidInput, match=r"model\.num_experts: the checkpoint has 8, the model has 16; load it into"):
        manifest.check_model({**MODEL, "num_experts": 16})
    with pytest.raises(InvalidInput, match=r"model\.gate: the checkpoint has none, the model has 'x'"):
        manifest.check_model({**MODEL, "gate": "x"})


def test_a_manifest_holds_json_only() -> None:
    for job in ({"loss": float("nan")}, {"a": object()}, 3):
        with pytest.raises(InvalidInput):
            Manifest(1, 2.0, {}, job, ())  # type: ignore[arg-type]


# Keeping and cleaning up.


def test_two_are_kept(url: str) -> None:
    for version in range(1, 5):
        save(url, version)
    assert versions(url) == [3, 4]
    with pytest.raises(InvalidInput, match="keep"):
        CheckpointStore(url, keep=1)


def test_only_complete_ones_count_as_kept(url: str) -> None:
    save(url, 1)
    alter(save(url, 2), "expert-0.safetensors", lambda data: data[:9])
    save(url, 3)
    assert versions(url) == [1, 2, 3]
    save(url, 4)
    assert versions(url) == [3, 4]


def test_a_version_saved_again_replaces_it(url: str) -> None:
    save(url, 1)
    save(url, 2)
    first = latest(url)
    again = save(url, 2, value=9.0)
    assert again.url != first.url
    assert value_of(latest(url)) == 9.0
    assert versions(url) == [1, 2]


def test_leftovers_of_dead_drafts_go_with_the_next_save(url: str) -> None:
    save(url, 1)
    dead = CheckpointStore(url).begin(2)
    write_shard(dead, "expert-0", tensors_of("expert-0", 2.0), {})
    assert len(folders(url)) == 2
    assert (latest(url).manifest.version, latest(url).skipped) == (1, ())
    newer = CheckpointStore(url).begin(3)
    write_shard(newer, "expert-0", tensors_of("expert-0", 2.0), {})
    assert newer.url.rpartition("/")[2] in folders(url)
    assert dead.url.rpartition("/")[2] not in folders(url)
    CheckpointStore(url).discard(newer)
    CheckpointStore(url).discard(newer)
    assert versions(url) == [1]


def test_a_draft_that_was_given_up_cannot_be_committed(url: str) -> None:
    store = CheckpointStore(url)
    draft = store.begin(1)
    shards = tuple(write_shard(draft, name, tensors_of(name, 1.0), {}) for name in EXPERTS)
    save(url, 2)
    with pytest.raises(CheckpointError, match="gone"):
        store.commit(draft, manifest_of(draft, shards))
    assert (latest(url).manifest.version, versions(url)) == (2, [2])


def test_a_shard_for_a_draft_that_is_gone(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    draft = store.begin(1)
    store.discard(draft)
    with pytest.raises(CheckpointError, match="the draft is gone"):
        write_shard(draft, "trunk", {}, {})


def test_what_could_not_be_loaded_is_not_committed(url: str) -> None:
    store = CheckpointStore(url)
    draft = store.begin(1)
    one = write_shard(draft, "one", {"a": torch.zeros(1)}, {})
    two = write_shard(draft, "two", {"a": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match=r"a is in both one\.safetensors and two\.safetensors"):
        store.commit(draft, manifest_of(draft, (one, two)))
    with pytest.raises(CheckpointError, match=r"three\.safetensors is missing"):
        store.commit(draft, manifest_of(draft, (one, replace(two, name="three"))))
    with pytest.raises(InvalidInput, match="not the draft's"):
        store.commit(draft, replace(manifest_of(draft, (one,)), version=3))
    assert store.latest() is None
    assert store.commit(draft, manifest_of(draft, (one,))) == store.latest()


def test_shards_and_urls_that_cannot_be(tmp_path: Path) -> None:
    draft = CheckpointStore(str(tmp_path)).begin(1)
    with pytest.raises(InvalidInput, match="name of a file"):
        write_shard(draft, "../x", {}, {})
    with pytest.raises(InvalidInput, match="a: cannot be written"):
        write_shard(draft, "x", {"a": torch.zeros(1, dtype=torch.complex128)}, {})
    for url in ("", "s3://", "nonsense://x/y"):
        with pytest.raises(InvalidInput, match="url"):
            CheckpointStore(url)
    with pytest.raises(InvalidInput, match="no draft of"):
        CheckpointStore(str(tmp_path / "other")).commit(draft, manifest_of(draft, ()))


def test_a_relative_path_and_a_file_url_are_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore("run/x")
    assert store.url == CheckpointStore(f"file://{tmp_path}/run/x/").url == f"{tmp_path}/run/x"
    assert os.path.isabs(store.begin(1).url)


# Durability.


class RecordingDisk(Disk):
    def __init__(self) -> None:
        self.done: list[str] = []

    def before(self, operation: str) -> None:
        self.done.append(operation)


def test_everything_is_synced_before_the_rename_and_nothing_removed_before_the_parent_is(tmp_path: Path) -> None:
    save(str(tmp_path), 1)
    save(str(tmp_path), 2)
    disk = RecordingDisk()
    save(str(tmp_path), 3, disk=disk)
    writes = "mkdir create write fsync create write fsync create write fsync"
    commit = "fsync_dir rename fsync_dir"
    prune = "rename remove rmdir"
    once = [op for op, before in zip(disk.done, ["", *disk.done], strict=False) if op != before]
    assert once == f"{writes} {commit} {prune}".split()


class FailingDisk(Disk):
    """Raises `number` at operation `at`, and if it `stays` at every later one that takes room."""

    def __init__(self, at: int, number: int, *, stays: bool) -> None:
        self.left = at
        self.number = number
        self.stays = stays

    def before(self, operation: str) -> None:
        self.left -= 1
        room = operation in ("mkdir", "create", "write", "fsync", "fsync_dir")
        if self.left == -1 or (self.stays and self.left < 0 and room):
            raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("stays", [True, False])
def test_a_full_disk_at_any_operation_leaves_the_earlier_ones(tmp_path: Path, number: int, stays: bool) -> None:
    root = str(tmp_path)
    version, refused, at = 2, 0, 0
    save(root, 1)
    save(root, 2)
    while True:
        disk = FailingDisk(at, number, stays=stays)
        try:
            save(root, version + 1, disk=disk)
        except StorageFull:
            refused += 1
            assert "draft-" not in " ".join(folders(root))
        else:
            version += 1
        if disk.left >= 0:
            break
        found = latest(root)
        version = max(version, found.manifest.version)  # the last sync failed: it is there, but not surely for good
        assert found.manifest.version == version == value_of(found)
        at += 1
    assert refused >= 30
    assert versions(root) == [version - 1, version]


def test_a_full_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    save(url, 1)
    draft = CheckpointStore(url).begin(2)
    write_shard(draft, "expert-0", tensors_of("expert-0", 1.0), {})

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "open", full)
    with pytest.raises(StorageFull):
        write_shard(draft, "expert-1", tensors_of("expert-1", 1.0), {})
    monkeypatch.undo()
    assert (versions(url), value_of(latest(url))) == ([1], 1.0)


def test_other_failures_are_errors_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the storage fails"):
        save(str(tmp_path / "a"), 1, disk=FailingDisk(4, errno.EIO, stays=False))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="the storage fails"):
        CheckpointStore(str(tmp_path / "file" / "run")).begin(1)
    store = CheckpointStore(f"memory://{uuid.uuid4().hex}")

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("429 slow down")  # as gcsfs's and botocore's errors, of no class of ours

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "ls", broken)
    with pytest.raises(CheckpointError, match="RuntimeError: 429 slow down"):
        store.latest()


def test_a_checkpoint_that_cannot_be_removed_is_logged_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Sticky(Disk):
        def rename(self, source: str, target: str) -> None:
            if "dead-" in target:
                raise PermissionError(errno.EACCES, "denied")
            super().rename(source, target)

    with caplog.at_level(logging.WARNING):
        for version in (1, 2, 3):
            save(str(tmp_path), version, disk=Sticky())
    assert "removal of" in caplog.text
    assert versions(str(tmp_path)) == [1, 2, 3]
    save(str(tmp_path), 4)
    assert versions(str(tmp_path)) == [3, 4]


def test_a_reader_says_which_shard_was_damaged_since(tmp_path: Path) -> None:
    found = save(str(tmp_path), 1)
    reader: Reader = open_shards(found)
    alter(found, "expert-0.safetensors", lambda data: data[:-1000])
    with pytest.raises(CheckpointError, match=r"shard expert-0\.safetensors became shorter"):
        reader.read(reader.names())
    alter(found, "expert-0.safetensors", None)
    with pytest.raises(CheckpointError, match=r"shard expert-0\.safetensors cannot be read"):
        open_shards(found)


def test_no_kill_at_any_operation_of_a_save_loses_anything() -> None:
    code = "import json; from cluster.bench.checkpoint import sweep; print(json.dumps(list(sweep(3))))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    outcomes = json.loads(done.stdout)
    assert len(outcomes) >= 60, "three saves of two shards, the third with a pruning"
    assert set(outcomes) == {""}, done.stderr
