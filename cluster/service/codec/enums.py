"""Enum values on the wire <-> the lower-case names that the plain values use: JOB_STATE_RUNNING <-> `running`."""

from __future__ import annotations

import re
from typing import Any

from actors.errors import InvalidInput

EnumDescriptor = Any
"""google.protobuf's; its stubs give two unrelated classes for it."""


def to_number(enum: EnumDescriptor, name: str) -> Any:
    """0, which every enum calls UNSPECIFIED, for a name that this version of the protocol has no value for."""
    value = enum.values_by_name.get(_prefix(enum) + name.upper())
    return value.number if value is not None else 0


def to_name(enum: EnumDescriptor, number: int) -> str:
    """The empty name for UNSPECIFIED and for values of a newer protocol."""
    value = enum.values_by_number.get(number)
    return value.name.removeprefix(_prefix(enum)).lower() if value is not None and value.number else ""


def name_from_caller(field: str, enum: EnumDescriptor, number: int) -> str:
    """The empty name for UNSPECIFIED, which asks for the default; a number without a name is the caller's mistake."""
    if number not in enum.values_by_number:
        names = ", ".join(value.name for value in enum.values if value.number)
        raise InvalidInput("no such value", field=field, value=number, remedy=f"give one of {names}")
    return to_name(enum, number)


def _prefix(enum: EnumDescriptor) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper() + "_"
