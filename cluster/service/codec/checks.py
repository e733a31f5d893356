"""Checks of single values from outside."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from actors.errors import InvalidInput

MAX_INT64 = (1 << 63) - 1
MAX_INT32 = (1 << 31) - 1
MAX_PATH_CHARS = 4096
MAX_ID_CHARS = 128
_ID = re.compile(rf"[A-Za-z0-9._:\-]{{1,{MAX_ID_CHARS}}}")


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; an open end is not part of it."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:,}, {self.high:,}{')' if self.open_high else ']'}"


def number(field: str, value: float, allowed: Range) -> None:
    if value not in allowed:
        raise InvalidInput("out of range", field=field, value=value, remedy=f"give a number in {allowed}")


def text(field: str, value: str, max_chars: int) -> None:
    if not value:
        raise InvalidInput("must not be empty", field=field, remedy=f"give 1 to {max_chars:,} characters")
    if len(value) > max_chars:
        raise InvalidInput(
            f"{len(value):,} characters are too many", field=field, value=value, remedy=f"at most {max_chars:,}"
        )


def path(field: str, value: str) -> None:
    text(field, value, MAX_PATH_CHARS)
    if not value.isprintable():
        raise InvalidInput("holds characters that no path should", field=field, value=value, remedy="remove them")


def identifier(field: str, value: str) -> None:
    """Ids travel in log lines and metadata, so only plain characters are let in."""
    if not _ID.fullmatch(value):
        remedy = f"give 1 to {MAX_ID_CHARS} letters, digits and ._:-"
        raise InvalidInput("is not an id", field=field, value=value, remedy=remedy)


def is_identifier(value: str) -> bool:
    return _ID.fullmatch(value) is not None
