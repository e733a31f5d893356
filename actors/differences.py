"""Two nested configs compared value by value. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of all that is no mapping, or an empty one; parts of a path are divided by dots."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first key, in the order of `one` and then of `other`, whose values differ; what is missing counts as None."""
    for key in [*one, *(key for key in other if key not in one)]:
        if one.get(key) != other.get(key):
            return key
    return None
