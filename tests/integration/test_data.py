"""Documents through Ray Data: every source, its order, what is held out, and what goes wrong."""

from __future__ import annotations

import itertools
import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from actors.errors import InvalidInput
from cluster.config import BatchConfig, DataConfig
from cluster.fabric import nodes
from cluster.fabric.data import TURN_S, Pause, open_documents, open_tokens
from cluster.jobs.batches import StepBatches
from cluster.jobs.sources import TEXT_DOCUMENT_BYTES
from cluster.jobs.tokenizer import ByteTokenizer

pytestmark = pytest.mark.timeout(600)  # Ray alone takes minutes to start on a busy machine


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    # "local": a new cluster, whatever else runs on the machine.
    with nodes._patience(240.0):
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def source(path: Path | str, **values: object) -> DataConfig:
    return DataConfig(source=f"path:{path}", **values)  # type: ignore[arg-type]


def texts(data: DataConfig, split: str = "train", epochs: int = 1) -> list[str]:
    return list(open_documents(data, split, epochs=epochs))  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty text files, the names in the order of the numbers."""
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}")
    return tmp_path


NUMBERED = [f"text {i}" for i in range(20)]


def test_text_files_in_file_order(folder: Path) -> None:
    config = source(folder, shuffle=False, heldout_every=0)
    assert texts(config) == NUMBERED
    assert texts(config, epochs=2) == NUMBERED * 2
    assert texts(source(folder / "1?.txt", shuffle=False, heldout_every=0)) == NUMBERED[10:]
    assert texts(source(folder / "07.txt", shuffle=False, heldout_every=0)) == ["text 7"]


def test_shuffled_order_follows_the_seed_and_changes_with_the_epoch(folder: Path) -> None:
    config = source(folder, heldout_every=0, seed=1)
    two = texts(config, epochs=2)
    assert two == texts(config, epochs=2)
    assert sorted(two[:20]) == sorted(two[20:]) == sorted(NUMBERED)
    assert len({tuple(two[:20]), tuple(two[20:]), tuple(NUMBERED)}) == 3
    assert texts(source(folder, heldout_every=0, seed=2)) != two[:20]


@pytest.mark.parametrize("shuffle", [True, False])
def test_held_out_documents_are_never_trained_on(folder: Path, shuffle: bool) -> None:
    config = source(folder, shuffle=shuffle, heldout_every=5)
    assert texts(config, "heldout") == ["text 4", "text 9", "text 14", "text 19"]
    assert set(texts(config, epochs=3)) == set(NUMBERED) - {"text 4", "text 9", "text 14", "text 19"}


def test_the_stream_goes_on_for_ever(folder: Path) -> None:
    stream = open_documents(source(folder, shuffle=False, heldout_every=0), "train")
    many = list(itertools.islice(stream, 30 * 20))  # beyond the epochs of one execution
    stream.close()
    assert many == NUMBERED * 30


def test_jsonl(tmp_path: Path) -> None:
    for name in "ab":
        lines = [json.dumps({"body": f"{name}{i} é", "id": i}) for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    config = source(tmp_path, text_field="body", shuffle=False, heldout_every=5)
    train, heldout = texts(config), texts(config, "heldout")
    assert heldout == ["a4 é", "a9 é", "b3 é", "b8 é"]
    assert train == [f"{n}{i} é" for n in "ab" for i in range(10) if f"{n}{i} é" not in heldout]


def test_parquet(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(1000)]
    table = pa.table({"id": range(1000), "text": pa.array([*rows[:-1], None], pa.string())})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=100)
    assert texts(source(tmp_path, shuffle=False, heldout_every=0)) == rows[:-1], "no text, no document"
    config = source(tmp_path, heldout_every=10)
    assert texts(config, "heldout") == rows[9:999:10]
    assert not set(texts(config)) & set(texts(config, "heldout"))


def test_suffix_or_format_decides(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "json"}')
    (tmp_path / "c.md").write_text("neither")
    assert texts(source(tmp_path, shuffle=False, heldout_every=0)) == ["text", "json"]
    assert texts(source(tmp_path / "*.md", format="text", heldout_every=0)) == ["neither"]


def test_a_long_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"line {i} — dash\r\n" for i in range(30_000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    parts = texts(source(tmp_path, shuffle=False, heldout_every=0))
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts)
    assert max(map(len, parts)) < 2 * TEXT_DOCUMENT_BYTES
    config = source(tmp_path, heldout_every=3)
    assert texts(config, "heldout") == parts[2::3]


def test_text_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\xffb")
    assert texts(source(tmp_path, heldout_every=0)) == ["a\ufffdb"]


def test_python_stdlib() -> None:
    config = DataConfig(shuffle=False)
    train, heldout = texts(config), texts(config, "heldout")
    everything = "".join(train + heldout)
    for name in ("argparse.py", "asyncio/tasks.py"):
        source_text = (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8")
        assert source_text[:5000] in everything
    assert len(everything) > 5_000_000
    assert 5 <= len(heldout) <= len(train) / 20
    assert not set(train) & set(heldout)


def test_tokens_are_those_of_the_texts(folder: Path) -> None:
    config = source(folder, heldout_every=5)
    tokenizer = ByteTokenizer()
    tokens = list(open_tokens(config, "train", tokenizer, epochs=1))
    assert [tokenizer.decode(ids.tolist()) for ids in tokens] == texts(config)
    assert all(ids.dtype == np.int32 for ids in tokens)


def test_batches_of_a_job_repeat_and_resume() -> None:
    def steps(count: int, start_step: int = 0) -> list[np.ndarray]:
        documents = open_tokens(DataConfig(seed=3), "train", ByteTokenizer())
        batches = StepBatches(documents, BatchConfig(), ByteTokenizer.eos_id, shuffle_seed=3, start_step=start_step)
        taken = [np.stack(next(batches)) for _ in range(count)]
        documents.close()
        return taken

    first = steps(6)
    assert all(step.shape == (1, 8, 128) for step in first)
    assert np.array_equal(np.stack(first), np.stack(steps(6)))
    assert np.array_equal(np.stack(first[4:]), np.stack(steps(2, start_step=4)))


def test_documents_come_when_actors_hold_every_cpu(folder: Path) -> None:
    @ray.remote(num_cpus=1)
    class Holder:
        def ready(self) -> bool:
            return True

    holders = [Holder.remote() for _ in range(2)]
    assert ray.get([holder.ready.remote() for holder in holders], timeout=60)
    started = time.monotonic()
    try:
        assert texts(source(folder, shuffle=False, heldout_every=0)) == NUMBERED
    finally:
        for holder in holders:
            ray.kill(holder)
    assert time.monotonic() - started < 60


def test_ray_data_s_loop_pauses_while_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[float] = []
    pause = Pause.on_execution_step

    def noted(self: Pause, executor: object) -> None:
        turns.append(time.monotonic())
        pause(self, executor)

    monkeypatch.setattr(Pause, "on_execution_step", noted)
    documents = open_tokens(DataConfig(seed=3), "train", ByteTokenizer())
    next(documents)
    first, deadline = len(turns), time.monotonic() + 60
    while len(turns) < first + 10:
        assert time.monotonic() < deadline, "Ray Data asks us after each turn"
        time.sleep(TURN_S)
    documents.close()
    assert turns[first + 9] - turns[first] >= 9 * TURN_S


FAULTS = {
    "no file": ({}, {}, r"data\.source: no file matches .*give a file, a directory or a glob"),
    "strange suffix": ({"a.md": b"x"}, {"source": "*.md"}, r"a\.md: the format cannot be told from the suffix"),
    "not json": ({"a.jsonl": b'{"text": "x"}\n{x'}, {}, r"a\.jsonl: line 2: not JSON.*one JSON object a line"),
    "no object": ({"a.jsonl": b"[1]"}, {}, r"a\.jsonl: line 1: has no field 'text' \(got 'list'\)"),
    "no field": (
        {"a.jsonl": b'{"body": "x"}'},
        {},
        r"line 1: has no field 'text' \(got \['body'\]\); .*data\.text_field",
    ),
    "no text": ({"a.jsonl": b'{"text": 3}'}, {}, r"line 1: field 'text' is not a text \(got 3\)"),
    "not parquet": ({"a.parquet": b"PAR?"}, {}, r"a\.parquet: not a Parquet file"),
    "empty file": ({"a.txt": b""}, {}, r"data\.source: no text to train on in 1 files"),
    "white space": ({"a.jsonl": b'{"text": " "}', "b.txt": b"\n\n"}, {}, r"no text to train on in 2 files"),
}


@pytest.mark.parametrize(("files", "values", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_name_the_place_and_the_remedy(
    tmp_path: Path, files: dict[str, bytes], values: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        texts(source(tmp_path / values.get("source", ""), heldout_every=0))


def test_parquet_without_the_column_or_with_another_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidInput, match=r"column 'text' holds int64, not text"):
        texts(source(tmp_path, heldout_every=0))
    with pytest.raises(InvalidInput, match=r"has no field 'content' \(got \['body', 'text'\]\)"):
        texts(source(tmp_path, text_field="content", heldout_every=0))


def test_nothing_held_out_says_so(folder: Path) -> None:
    with pytest.raises(InvalidInput, match=r"data\.heldout_every: holds out no document of the 20 files \(got 50\)"):
        texts(source(folder, heldout_every=50), "heldout")


def test_documents_before_a_fault_are_given_out_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * 100_000}) + "\n" for _ in range(40)) + "{")
    stream = open_documents(source(tmp_path, shuffle=False, heldout_every=0), "train")
    assert sum(1 for _ in itertools.islice(stream, 20)) == 20
    with pytest.raises(InvalidInput, match="line 41"):
        list(stream)
