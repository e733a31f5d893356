"""Pinned versions, and which one a request wants."""

from __future__ import annotations

from actors.errors import InvalidInput
from actors.values import VersionChoice
from cluster.backend import Pin
from cluster.service.codec import checks, times
from cluster.service.codec.checks import MAX_INT32, MAX_INT64, Range
from protos.moecluster.v1 import cluster_pb2, inference_pb2

MAX_TTL_S = 366 * 24 * 3600.0


def choice_from_message(message: inference_pb2.VersionChoice) -> VersionChoice:
    kind = message.WhichOneof("choice")
    choice = VersionChoice(**{kind: getattr(message, kind)}) if kind else VersionChoice()
    if kind == "pin":
        checks.identifier("version.pin", message.pin)
    check_choice(choice)
    return choice


def choice_to_message(choice: VersionChoice) -> inference_pb2.VersionChoice:
    check_choice(choice)
    message = inference_pb2.VersionChoice()
    if choice.pin:
        message.pin = choice.pin
    elif choice.pinned is not None:
        message.pinned = choice.pinned
    elif choice.max_behind:
        message.max_behind = choice.max_behind
    return message


def check_choice(choice: VersionChoice) -> None:
    if bool(choice.pin) + (choice.pinned is not None) + bool(choice.max_behind) > 1:
        raise InvalidInput(
            "is more than one choice", field="version", value=choice, remedy="give one of pinned, pin and max_behind"
        )
    if choice.pin:
        checks.identifier("version.pin", choice.pin)
    if choice.pinned is not None:
        checks.number("version.pinned", choice.pinned, Range(0, MAX_INT64))
    checks.number("version.max_behind", choice.max_behind, Range(0, MAX_INT32))


def pin_request_from_message(message: cluster_pb2.PinVersionRequest) -> tuple[str, float]:
    """-> name, which may be empty, and seconds to live, 0 for no end."""
    check_pin(message.name, message.ttl_s)
    return message.name, message.ttl_s


def check_pin(name: str, ttl_s: float) -> None:
    if name:
        checks.identifier("name", name)
    checks.number("ttl_s", ttl_s, Range(0, MAX_TTL_S))


def pin_to_message(pin: Pin) -> cluster_pb2.Pin:
    return cluster_pb2.Pin(
        name=pin.name,
        version=pin.version,
        create_time=times.to_message(pin.created_s),
        expire_time=None if pin.expires_s is None else times.to_message(pin.expires_s),
    )


def pin_from_message(message: cluster_pb2.Pin) -> Pin:
    return Pin(
        name=message.name,
        version=message.version,
        created_s=times.from_message(message.create_time),
        expires_s=times.from_message(message.expire_time) if message.HasField("expire_time") else None,
    )
