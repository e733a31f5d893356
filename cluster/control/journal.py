"""What the coordinator knows and no other actor can tell, as a value that is kept on disk and survives its death."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_type_hints

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.backend import Job, Operation, OperationState
from cluster.control.jobtable import job_of_dict, job_to_dict
from cluster.control.ledger import Entry, Ledger
from cluster.control.model import ModelFacts

FORMAT = 1
Record = TypeVar("Record")


@dataclass(frozen=True)
class Process:
    """Where an actor of the cluster runs, so that one that hangs can be ended."""

    name: str
    node_id: str
    pid: int


@dataclass(frozen=True)
class LeavingNode:
    node_id: str
    name: str


@dataclass(frozen=True)
class Journal:
    cluster: str
    """Which life of a cluster it is of: another one has other actors."""
    written_s: float
    """Unix time."""
    origin: ModelFacts
    """Of the model as the config says."""
    model: ModelFacts
    """As it is now: it may have grown."""
    is_pristine: bool
    """As of `Coordinator`."""
    placement: Placement
    wanted: int
    """Expert actors there should be."""
    next_number: int
    """Of expert actors: those below have been given out."""
    wanted_routers: int
    next_router: int
    """As of expert actors."""
    jobs: tuple[Job, ...] = ()
    """Oldest first. Steps and events of one that runs are those of some moment before."""
    operations: tuple[Operation, ...] = ()
    """Oldest first."""
    entries: tuple[Entry, ...] = ()
    """Of the ledger, oldest first."""
    actors: tuple[Process, ...] = ()
    leaving: tuple[LeavingNode, ...] = ()
    """Nodes that have been emptied and are to be taken away."""
    importing: str = ""
    """The model directory of an import that was under way; empty if none was."""

    @property
    def essence(self) -> Journal:
        """Without what changes with every step: while it is equal there is no need to write."""
        jobs = tuple(job if job.state.is_final else replace(job, step=0, last_event=0) for job in self.jobs)
        return replace(self, written_s=0.0, jobs=jobs)

    @property
    def is_empty(self) -> bool:
        """Whether the actors can tell everything that is in it."""
        return self.is_pristine and not (self.jobs or self.operations or self.entries)

    def to_json(self) -> bytes:
        ledger = Ledger.of(self.entries)
        values = {
            "format": FORMAT,
            "cluster": self.cluster,
            "written_s": self.written_s,
            "origin": dataclasses.asdict(self.origin),
            "model": dataclasses.asdict(self.model),
            "is_pristine": self.is_pristine,
            "placement": dataclasses.asdict(self.placement),
            "wanted": self.wanted,
            "next_number": self.next_number,
            "wanted_routers": self.wanted_routers,
            "next_router": self.next_router,
            "jobs": [job_to_dict(job) for job in self.jobs],
            "operations": [{**dataclasses.asdict(o), "state": o.state.value} for o in self.operations],
            "ledger": json.loads(ledger.to_json()),
            "actors": [dataclasses.asdict(actor) for actor in self.actors],
            "leaving": [dataclasses.asdict(node) for node in self.leaving],
            "importing": self.importing,
        }
        return json.dumps(values, allow_nan=False, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, source: str) -> Journal:
        """What `to_json` gave. `InvalidInput` that names the `source`, and what in it cannot be right."""
        read = _Reader(source)
        values = {"importing": "", **read.document(data)}  # files of before had none
        read.keys(values, _KEYS, "")
        if values["format"] != FORMAT:
            raise read.error(f"is not {FORMAT}", "format", values["format"])
        jobs = tuple(job_of_dict(read.mapping(job, "jobs"), source) for job in read.rows(values, "jobs"))
        operations = tuple(read.operation(row) for row in read.rows(values, "operations"))
        read.numbered("job", [job.id for job in jobs], "jobs")
        read.numbered("operation", [operation.id for operation in operations], "operations")
        return cls(
            cluster=read.value(values, "cluster", str),
            written_s=read.value(values, "written_s", float),
            origin=read.record(ModelFacts, values["origin"], "origin"),
            model=read.record(ModelFacts, values["model"], "model"),
            is_pristine=read.value(values, "is_pristine", bool),
            placement=read.placement(values["placement"]),
            wanted=read.value(values, "wanted", int),
            next_number=read.value(values, "next_number", int),
            wanted_routers=read.value(values, "wanted_routers", int),
            next_router=read.value(values, "next_router", int),
            jobs=jobs,
            operations=operations,
            entries=Ledger.from_json(json.dumps(values["ledger"])).entries(),
            actors=tuple(read.record(Process, row, "actors") for row in read.rows(values, "actors")),
            leaving=tuple(read.record(LeavingNode, row, "leaving") for row in read.rows(values, "leaving")),
            importing=read.value(values, "importing", str),
        )


_COUNTS = ("wanted", "next_number", "wanted_routers", "next_router")
_PLAIN = ("format", "cluster", "written_s", "is_pristine", "importing", *_COUNTS)
_LISTS = ("jobs", "operations", "actors", "leaving")
_KEYS = frozenset((*_PLAIN, *_LISTS, "origin", "model", "placement", "ledger"))


class _Reader:
    """Values of JSON as ours, each checked."""

    def __init__(self, source: str) -> None:
        self._source = source

    def error(self, message: str, path: str, value: object) -> InvalidInput:
        return InvalidInput(
            message, field=f"{self._source}: {path}", value=value, remedy="it is put aside, or remove the file"
        )

    def document(self, data: bytes) -> Mapping[str, Any]:
        try:
            return self.mapping(json.loads(data), "")
        except (ValueError, RecursionError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"is no journal: {error}", field=self._source) from None

    def mapping(self, value: Any, path: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.error("is not an object", path, type(value).__name__)
        return value

    def keys(self, values: Mapping[str, Any], names: frozenset[str], path: str) -> None:
        if wrong := sorted(set(values) ^ names):
            raise self.error("misses or adds a field", path, wrong)

    def numbered(self, kind: str, ids: Sequence[Any], path: str) -> None:
        if len(set(map(str, ids))) != len(ids) or not all(re.fullmatch(f"{kind}-[1-9][0-9]*", str(i)) for i in ids):
            raise self.error(f"are not ids of one {kind} each", path, ids)

    def rows(self, values: Mapping[str, Any], name: str) -> Sequence[Any]:
        if not isinstance(values[name], list):
            raise self.error("is not a list", name, type(values[name]).__name__)
        return values[name]  # type: ignore[no-any-return]

    def value(self, values: Mapping[str, Any], name: str, kind: Any, path: str = "") -> Any:
        """Exactly of the type: true is no number. Whole numbers will do for seconds."""
        value: Any = values[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.error(f"is not of type {kind.__name__}", f"{path}{name}", value)
        if kind is int and value < 0:
            raise self.error("is below 0", f"{path}{name}", value)
        return value

    def record(self, cls: type[Record], row: Any, path: str) -> Record:
        """A dataclass of numbers and texts."""
        values = self.mapping(row, path)
        types = get_type_hints(cls)
        self.keys(values, frozenset(types), path)
        return cls(**{name: self.value(values, name, kind, f"{path}.") for name, kind in types.items()})

    def placement(self, row: Any) -> Placement:
        values = self.mapping(row, "placement")
        self.keys(values, frozenset(("epoch", "holders", "group_size")), "placement")
        holders = self.rows(values, "holders")
        if not all(isinstance(held, list) and all(type(name) is str for name in held) for held in holders):
            raise self.error("is not a list of lists of actors", "placement.holders", holders)
        epoch, size = (self.value(values, name, int, "placement.") for name in ("epoch", "group_size"))
        return Placement(epoch, tuple(tuple(held) for held in holders), size)

    def operation(self, row: Any) -> Operation:
        values = self.mapping(row, "operations")
        try:
            return Operation(**{**values, "state": OperationState(values["state"])})
        except (KeyError, TypeError, ValueError) as error:
            raise self.error(f"cannot be read: {error}", "operations", sorted(values)) from None
