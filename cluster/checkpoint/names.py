"""Names: of tensors, one entry per expert so that any number of actors can load them, and of checkpoint folders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from actors.errors import InvalidInput

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
"""A parameter itself, or one of AdamW's moments of it."""

_MOMENTS = tuple(kind for kind in get_args(Kind) if kind != "weight")
_ENTRY = re.compile(rf"layers\.(\d+)\.experts\.(\d+)\.(.+?)(?:\.({'|'.join(_MOMENTS)}))?")
_FOLDER = re.compile(r"(step|draft|dead)-(\d{10,})\.(\d+)\.([0-9a-f]{8})")


@dataclass(frozen=True)
class ExpertEntry:
    layer: int
    """Counts the MoE layers, from 0."""
    expert: int
    """Among all experts of the layer."""
    name: str
    """Of the parameter, e.g. `gate_up_proj`."""
    kind: Kind


def expert_entry(layer: int, expert: int, name: str, kind: Kind) -> str:
    """`layers.3.experts.17.gate_up_proj`, with `.exp_avg` or `.exp_avg_sq` for the moments. InvalidInput if it could
    not be told apart from another entry."""
    entry = f"layers.{layer}.experts.{expert}.{name}" + ("" if kind == "weight" else f".{kind}")
    if parse_expert_entry(entry) != ExpertEntry(layer, expert, name, kind):
        raise InvalidInput("cannot be named as an expert's entry", field="name", value=(layer, expert, name, kind))
    return entry


def parse_expert_entry(entry: str) -> ExpertEntry | None:
    """None: an entry of something that is no expert."""
    match = _ENTRY.fullmatch(entry)
    if match is None:
        return None
    layer, expert, name, moment = match.groups()
    return ExpertEntry(int(layer), int(expert), name, cast(Kind, moment or "weight"))


@dataclass(frozen=True, order=True)
class Folder:
    """A folder of the store. Ordered by `sequence`: the last one begun is the newest, whatever its version, since a
    job that fell back from a damaged checkpoint goes on from an older version."""

    sequence: int
    """Counts the drafts of this store; also lets a version be saved again beside its earlier folder."""
    version: int
    token: str
    """Random: two coordinators that do not know of each other never write into one folder."""
    kind: Literal["step", "draft", "dead"]

    def __str__(self) -> str:
        return f"{self.kind}-{self.version:010d}.{self.sequence}.{self.token}"

    @classmethod
    def parse(cls, name: str) -> Folder | None:
        """None: not a folder of ours."""
        match = _FOLDER.fullmatch(name)
        if match is None:
            return None
        kind, version, sequence, token = match.groups()
        return cls(int(sequence), int(version), token, cast(Literal["step", "draft", "dead"], kind))
