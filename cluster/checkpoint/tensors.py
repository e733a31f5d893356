"""The safetensors format, a piece at a time: a shard is neither built nor read as a whole.

The file is an 8-byte length, a JSON header of that length, and the tensors' bytes without gaps. The library writes only
whole files or whole byte strings, by calls that show no disk operation; the tests hold both ways to each other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.errors import CheckpointError, InvalidInput

CHUNK_BYTES = 8 << 20
MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""
_METADATA = "__metadata__"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes [start, end) of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The file's bytes in pieces of at most CHUNK_BYTES (the header: of its own size); one tensor at a time is copied
    to the CPU. Tensors keep their order, wide types first, so that each lies at a multiple of its item's size."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    yield memoryview(_header_bytes(ordered, metadata))
    for _, tensor in ordered:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def _header_bytes(tensors: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for name, tensor in tensors:
        if name == _METADATA or tensor.dtype not in _CODES:
            raise InvalidInput("cannot be written to a shard", field=name, value=tensor.dtype)
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidInput("too many tensors for one shard", field="tensors", value=len(tensors))
    return struct.pack("<Q", len(text)) + text


def read_header(read: Callable[[int, int], bytes], num_bytes: int) -> Header:
    """`read(start, end)` gives bytes of a file of `num_bytes`. CheckpointError if it is no safetensors file of just
    that length; nothing is allocated for a length that cannot be."""
    if num_bytes < 8:
        raise CheckpointError("is no safetensors file: it is shorter than 8 bytes")
    (length,) = struct.unpack("<Q", _exactly(read, 0, 8))
    if length > min(MAX_HEADER_BYTES, num_bytes - 8):
        raise CheckpointError("is no safetensors file: its header is longer than the file")
    try:
        body = json.loads(_exactly(read, 8, 8 + length))
        metadata = {str(key): str(value) for key, value in body.pop(_METADATA, {}).items()}
        entries = tuple(_entry(name, value, 8 + length) for name, value in body.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"has a header that cannot be read: {error!r}") from None
    end = 8 + length
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != end:
            raise CheckpointError(f"has a header with a gap or an overlap before {entry.name}")
        end = entry.end
    if end != num_bytes:
        raise CheckpointError(f"has {num_bytes} bytes, its header speaks of {end}")
    return Header(entries, metadata)


def _entry(name: str, value: Mapping[str, Any], base: int) -> Entry:
    dtype = DTYPES[value["dtype"]]
    shape = tuple(int(size) for size in value["shape"])
    start, end = (base + int(offset) for offset in value["data_offsets"])
    if min(shape, default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - start} bytes for the shape {shape}")
    return Entry(name, dtype, shape, start, end)


def _exactly(read: Callable[[int, int], bytes], start: int, end: int) -> bytes:
    data = read(start, end)
    if len(data) != end - start:
        raise CheckpointError(f"is truncated: bytes {start} to {end} are not there")
    return data


def to_tensor(entry: Entry, data: memoryview) -> Tensor:
    """A tensor of its own memory from just its bytes."""
    if not len(data):
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(bytearray(data), dtype=entry.dtype).reshape(entry.shape)
