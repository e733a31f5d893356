"""What a checkpoint consists of and what it belongs to: one JSON file, written after everything that it names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from actors.errors import CheckpointError, InvalidInput

FORMAT = 1
MANIFEST_NAME = "manifest.json"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One safetensors file, written by one actor."""

    name: str
    """Letters, digits, `.`, `_` and `-`; the file's name is this and `.safetensors`."""
    num_bytes: int
    sha256: str
    """Of the whole file, in lower-case hexadecimal."""

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """InvalidInput when made of values that JSON cannot hold, or of shards with one name."""

    version: int
    """Committed steps."""
    created_s: float
    """Unix time."""
    model: Mapping[str, Any]
    """The facts that must agree for a load, e.g. model_type, num_layers, num_experts, hidden_size, dtype."""
    job: Mapping[str, Any] | None
    """The caller's own: request id, config, step of the job, position in the data."""
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        if self.version < 0:
            raise InvalidInput("is below 0", field="version", value=self.version)
        # As they will be read back: tuples are lists and keys are text.
        object.__setattr__(self, "created_s", float(self.created_s))
        object.__setattr__(self, "model", _json_mapping("model", self.model))
        object.__setattr__(self, "job", None if self.job is None else _json_mapping("job", self.job))
        names = [shard.name for shard in self.shards]
        for name in names:
            check_shard_name(name)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidInput("is there twice", field="shards", value=twice[0])

    def to_json(self) -> bytes:
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps({**body, "sha256": _checksum(body)}, indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """InvalidInput (a CheckpointError if the file is damaged) that says what is wrong, for anything but what
        `to_json` gave."""
        try:
            body = json.loads(data)
        except ValueError as error:  # UnicodeDecodeError is one
            raise CheckpointError(f"is no JSON, it is truncated or altered: {error}", field=MANIFEST_NAME) from None
        if not isinstance(body, dict):
            raise CheckpointError("is not a mapping", field=MANIFEST_NAME)
        if _take(body, "format", int) != FORMAT:
            raise CheckpointError(
                "was written by another release", field=f"{MANIFEST_NAME}: format", value=body["format"]
            )
        if body.pop("sha256", None) != _checksum(body):
            raise CheckpointError("is altered: its checksum differs", field=MANIFEST_NAME)
        if unknown := sorted(set(body) - {"format", "version", "created_s", "model", "job", "shards"}):
            raise CheckpointError("is an unknown key", field=MANIFEST_NAME, value=unknown[0])
        return cls(
            version=_take(body, "version", int),
            created_s=_take(body, "created_s", float),
            model=_take(body, "model", dict),
            job=None if body.get("job", "") is None else _take(body, "job", dict),
            shards=tuple(_shard(entry) for entry in _take(body, "shards", list)),
        )

    def check_model(self, facts: Mapping[str, Any]) -> None:
        """InvalidInput that names the first field in which the model to load into differs, with both values."""
        wanted = _json_mapping("model", facts)
        for name in sorted({*self.model, *wanted}):
            stored, here = (_shown(values, name) for values in (self.model, wanted))
            if stored != here:
                raise InvalidInput(
                    f"the checkpoint has {stored}, the model has {here}",
                    field=f"model.{name}",
                    remedy="load it into the model that it was written from, or start in another folder",
                )


def check_shard_name(name: str) -> None:
    if not _SHARD_NAME.fullmatch(name):
        raise InvalidInput("cannot be the name of a file", field="shard", value=name)


def _shard(entry: object) -> Shard:
    if not isinstance(entry, dict) or set(entry) != {"name", "num_bytes", "sha256"}:
        raise CheckpointError("is no shard", field=f"{MANIFEST_NAME}: shards", value=entry)
    shard = Shard(_take(entry, "name", str), _take(entry, "num_bytes", int), _take(entry, "sha256", str))
    if shard.num_bytes < 0 or not _SHA256.fullmatch(shard.sha256):
        raise CheckpointError("has a size or hash that cannot be", field=f"{MANIFEST_NAME}: shards", value=entry)
    return shard


def _take(body: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = body.get(key)
    if type(value) is not kind:  # a bool is no int here
        raise CheckpointError(f"is no {kind.__name__}", field=f"{MANIFEST_NAME}: {key}", value=value)
    return value


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _json_mapping(field: str, value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        read_back: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"cannot be written as JSON: {error}", field=field) from None
    return read_back


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "none"
