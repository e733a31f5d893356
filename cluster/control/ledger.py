"""What every disturbance cost: who was hit, how long it took, and what had to be done again. All times Unix seconds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, cast, get_args, get_type_hints

from actors.errors import InvalidInput
from cluster.errors import NotFound

Kind = Literal[
    "actor_death",
    "node_death",
    "frozen",
    "router_death",
    "coordinator_restart",
    "scale_up",
    "scale_down",
    "rebalance",
    "drain",
    "storage_full",
    "grow",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT = 1
_REMEDY = f"use one of {', '.join(KINDS)}"


@dataclass(frozen=True)
class Entry:
    number: int
    """From 1 without gaps."""
    kind: Kind
    subject: str
    """Actor or node that was hit, or what was asked for, e.g. `4 experts`."""
    started_s: float
    detected_s: float | None = None
    """None where there is nothing to detect: it was asked for."""
    recovered_s: float | None = None
    """When all was as before, copies of expert groups included; None while it is not."""
    stall_s: float = 0.0
    """How long steps waited."""
    steps_replayed: int = 0
    tokens_recomputed: int = 0
    updates_lost: int = 0
    """Optimizer updates of expert groups that are in no weights."""
    requests_delayed: int = 0
    requests_failed: int = 0
    message: str = ""

    @property
    def detection_s(self) -> float | None:
        return None if self.detected_s is None else _seconds(self.started_s, self.detected_s)

    @property
    def interruption_s(self) -> float | None:
        """None while it goes on."""
        return None if self.recovered_s is None else _seconds(self.started_s, self.recovered_s)


@dataclass(frozen=True)
class Summary:
    """Of entries of one kind."""

    n: int
    num_open: int
    median_s: float | None
    """Of the interruptions that are over; None without any."""
    maximum_s: float | None


class Ledger:
    """The newest `max_entries`, in the order in which they began."""

    def __init__(self, max_entries: int = 1000) -> None:
        if max_entries < 1:
            raise InvalidInput("is below 1", field="max_entries", value=max_entries, remedy="use 1 or more")
        self._max_entries = max_entries
        self._entries: dict[int, Entry] = {}
        self._last = 0

    def open(self, kind: Kind, subject: str, now: float, *, detected_s: float | None = None, message: str = "") -> int:
        """`now`: when it began, as far as is known: for a frozen actor, its last answer. Returns the entry's number."""
        if kind not in KINDS:
            raise InvalidInput("is no kind of disturbance", field="kind", value=kind, remedy=_REMEDY)
        self._last += 1
        self._keep(Entry(self._last, kind, subject, now, detected_s, message=message))
        return self._last

    def add(
        self,
        number: int,
        *,
        stall_s: float = 0.0,
        steps_replayed: int = 0,
        tokens_recomputed: int = 0,
        updates_lost: int = 0,
        requests_delayed: int = 0,
        requests_failed: int = 0,
        message: str = "",
    ) -> None:
        """Adds to the costs, also after the end. Nothing comes of it for an entry that was dropped meanwhile.

        What is below 0 (the clock was set back) counts as 0. `NotFound` for a number that was never given.
        """
        if entry := self._get(number):
            self._entries[number] = replace(
                entry,
                stall_s=entry.stall_s + max(0.0, stall_s),
                steps_replayed=entry.steps_replayed + max(0, steps_replayed),
                tokens_recomputed=entry.tokens_recomputed + max(0, tokens_recomputed),
                updates_lost=entry.updates_lost + max(0, updates_lost),
                requests_delayed=entry.requests_delayed + max(0, requests_delayed),
                requests_failed=entry.requests_failed + max(0, requests_failed),
                message="; ".join(part for part in (entry.message, message) if part),
            )

    def close(self, number: int, now: float) -> None:
        """It is over; what is over already stays as it is. `NotFound` as in `add`."""
        if (entry := self._get(number)) and entry.recovered_s is None:
            self._entries[number] = replace(entry, recovered_s=now)

    def entries(self, after: int = 0) -> tuple[Entry, ...]:
        """Those with a number above `after`, oldest first. One that was given out before may have changed since."""
        return tuple(entry for number, entry in self._entries.items() if number > after)

    def summary(self) -> dict[Kind, Summary]:
        """Of the entries that are kept."""
        return summed_up(self._entries.values())

    def to_json(self) -> str:
        entries = [dataclasses.asdict(entry) for entry in self._entries.values()]
        return json.dumps({"format": FORMAT, "entries": entries}, allow_nan=False)

    @classmethod
    def of(cls, entries: Iterable[Entry], max_entries: int = 1000) -> Ledger:
        """Of entries that were given out, in their order; the next number follows the last."""
        ledger = cls(max_entries)
        for entry in entries:
            if entry.number <= ledger._last:
                raise InvalidInput("is out of order", field="ledger.entries.number", value=entry.number)
            ledger._last = entry.number
            ledger._keep(entry)
        return ledger

    @classmethod
    def from_json(cls, text: str, max_entries: int = 1000) -> Ledger:
        """What `to_json` gave; `InvalidInput` with the path of the first value that it cannot have given."""
        ledger = cls(max_entries)
        content = _loaded(text)
        _require(set(content) == {"format", "entries"}, "", "is not a ledger", sorted(content))
        _require(content["format"] == FORMAT, "format", f"is not {FORMAT}", content["format"])
        rows = content["entries"]
        _require(isinstance(rows, list), "entries", "is not a list", type(rows).__name__)
        for place, row in enumerate(rows):
            entry = _entry(row, f"entries[{place}]")
            _require(entry.number > ledger._last, f"entries[{place}].number", "is out of order", entry.number)
            ledger._last = entry.number
            ledger._keep(entry)
        return ledger

    def _keep(self, entry: Entry) -> None:
        self._entries[entry.number] = entry
        while len(self._entries) > self._max_entries:
            del self._entries[next(iter(self._entries))]

    def _get(self, number: int) -> Entry | None:
        if not 1 <= number <= self._last:
            raise NotFound(f"no entry {number} in the ledger, the last is {self._last}")
        return self._entries.get(number)


def _seconds(start_s: float, end_s: float) -> float:
    """0 where the clock was set back between the two."""
    return max(0.0, end_s - start_s)


def summed_up(entries: Collection[Entry]) -> dict[Kind, Summary]:
    """Of the kinds that are among them."""
    found = {kind: [entry for entry in entries if entry.kind == kind] for kind in KINDS}
    return {kind: _summary(of_kind) for kind, of_kind in found.items() if of_kind}


def _summary(entries: Sequence[Entry]) -> Summary:
    times = [entry.interruption_s for entry in entries if entry.interruption_s is not None]
    n = len(entries)
    return Summary(n, n - len(times), median(times) if times else None, max(times) if times else None)


# --- Reading -----------------------------------------------------------------------------------------------------

_TYPES = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Entry).items()}
_TYPES["kind"] = (str,)


def _loaded(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"is not JSON: {error}", field="ledger") from None
    _require(isinstance(content, dict), "", "is not a JSON object", type(content).__name__)
    return cast(dict[str, Any], content)


def _entry(row: Any, path: str) -> Entry:
    _require(isinstance(row, dict), path, "is not a JSON object", type(row).__name__)
    wrong = sorted(set(row) ^ set(_TYPES))
    _require(not wrong, path, "misses or adds a field", wrong)
    values = {name: _value(value, _TYPES[name], f"{path}.{name}") for name, value in row.items()}
    _require(values["kind"] in KINDS, f"{path}.kind", "is no kind of disturbance", values["kind"])
    return Entry(**values)


def _value(value: Any, allowed: tuple[type, ...], path: str) -> Any:
    """Exactly of a type that is allowed: true is no number. Whole numbers will do for seconds."""
    if type(value) is int and float in allowed:
        value = float(value) if abs(value) < 2**53 else math.inf
    names = " or ".join(sorted(each.__name__ for each in allowed))
    _require(type(value) in allowed, path, f"is not of type {names}", value)
    is_time = path.endswith(("started_s", "detected_s", "recovered_s"))
    if type(value) is float:
        _require(math.isfinite(value), path, "is not finite", value)
    if type(value) in (int, float) and not is_time:
        _require(value >= 0, path, "is below 0", value)
    return value


def _require(condition: bool, path: str, message: str, value: object) -> None:
    if not condition:
        raise InvalidInput(message, field=f"ledger.{path}" if path else "ledger", value=value)
