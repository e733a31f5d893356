"""Where documents come from: which files a `DataConfig` means, how each is read, which documents are held out.

No Ray here: `cluster.fabric.data` runs `read_documents` in its tasks.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from actors.errors import InvalidInput
from cluster.config import DataConfig

Split = Literal["train", "heldout"]
Format = Literal["text", "jsonl", "parquet"]

FORMATS: dict[str, Format] = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
STDLIB = "builtin:python-stdlib"
STDLIB_LEAVES_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})

TEXT_DOCUMENT_BYTES = 64 << 10
"""A longer text file is cut at line ends into documents of about this size, so that it streams and part of it can be
held out. Shorter ones are one document."""


@dataclass(frozen=True)
class SourceFile:
    index: int
    """Place in the sorted list of the source's files."""
    path: str
    format: Format
    size_bytes: int


def list_files(data: DataConfig) -> tuple[SourceFile, ...]:
    """The files of a source, sorted by path. `InvalidInput` when there are none or a suffix says nothing."""
    paths = _stdlib_paths() if data.source == STDLIB else _matching_paths(data)
    if not paths:
        remedy = "give a file, a directory or a glob of .txt, .jsonl or .parquet files that this machine can read"
        raise InvalidInput("no file matches", field="data.source", value=data.source, remedy=remedy)
    return tuple(
        SourceFile(index, str(path), _format_of(path, data), path.stat().st_size) for index, path in enumerate(paths)
    )


def file_order(num_files: int, data: DataConfig, epoch: int) -> list[int]:
    """File indices in the order of an epoch: sorted, or a permutation drawn from (seed, epoch)."""
    if not data.shuffle:
        return list(range(num_files))
    return [int(i) for i in np.random.default_rng([data.seed, epoch]).permutation(num_files)]


def is_heldout(file_index: int, row: int, every: int) -> bool:
    """Every n-th document of a file, and every n-th file of one document, whatever the order or epoch."""
    return every > 0 and (file_index + row) % every == every - 1


def may_contain(file: SourceFile, split: Split, every: int) -> bool:
    """Whether `file` can hold a document of the split, known without opening it."""
    if file.size_bytes == 0:
        return False
    if file.format == "text" and file.size_bytes <= TEXT_DOCUMENT_BYTES:
        return is_heldout(file.index, 0, every) == (split == "heldout")
    return True


def read_documents(file: SourceFile, text_field: str) -> Iterator[str]:
    """The documents of a file in their order. `InvalidInput` names file, place and remedy."""
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    try:
        yield from readers[file.format](file.path, text_field)
    except OSError as error:
        raise InvalidInput(f"cannot be read: {error}", field=file.path) from error


# --- Finding files -----------------------------------------------------------------------------------------------


def _stdlib_paths() -> list[Path]:
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        # In place, so that the walk does not enter them: site-packages may hold many times the library's files.
        subfolders[:] = [name for name in subfolders if name not in STDLIB_LEAVES_OUT]
        paths += (Path(folder, name) for name in names if name.endswith(".py"))
    return sorted(paths)


def _matching_paths(data: DataConfig) -> list[Path]:
    name = data.source.removeprefix("path:")
    if Path(name).is_dir():
        paths = [path for path in Path(name).rglob("*") if path.suffix in _suffixes(data)]
    else:
        paths = [Path(path) for path in glob.glob(name, recursive=True)]
    return sorted(path for path in paths if path.is_file())


def _suffixes(data: DataConfig) -> set[str]:
    return {suffix for suffix, format_ in FORMATS.items() if data.format in ("auto", format_)}


def _format_of(path: Path, data: DataConfig) -> Format:
    if data.source == STDLIB:
        return "text"
    if data.format != "auto":
        return data.format
    if path.suffix not in FORMATS:
        remedy = f"set data.format, or use one of the suffixes {', '.join(FORMATS)}"
        raise InvalidInput("the format cannot be told from the suffix", field=str(path), remedy=remedy)
    return FORMATS[path.suffix]


# --- Reading files -----------------------------------------------------------------------------------------------


def _read_text(path: str, text_field: str) -> Iterator[str]:
    # newline="": the bytes of the file are the text, line ends included.
    with open(path, encoding="utf-8", errors="replace", newline="") as lines:
        while document := "".join(lines.readlines(TEXT_DOCUMENT_BYTES)):
            yield document


def _read_jsonl(path: str, text_field: str) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_text(line, f"{path}: line {number}", text_field)


def _json_text(line: str, place: str, text_field: str) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise InvalidInput(f"not JSON: {error}", field=place, remedy="write one JSON object a line") from None
    if not isinstance(record, dict) or text_field not in record:
        known = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise _missing_field(place, text_field, known)
    text = record[text_field]
    if not isinstance(text, str):
        raise InvalidInput(f"field {text_field!r} is not a text", field=place, value=text)
    return text


def _read_parquet(path: str, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise _missing_field(path, text_field, file.schema_arrow.names)
            kind = file.schema_arrow.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InvalidInput(f"column {text_field!r} holds {kind}, not text", field=path)
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except pa.ArrowInvalid as error:
        raise InvalidInput(f"not a Parquet file: {error}", field=path) from error


def _missing_field(place: str, text_field: str, known: object) -> InvalidInput:
    remedy = "name the field that holds the text in data.text_field"
    return InvalidInput(f"has no field {text_field!r}", field=place, value=known, remedy=remedy)
