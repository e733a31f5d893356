"""Ray calls with a deadline, whose failures come out as errors of our own tree."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from actors.errors import LinkTimeout, MoeClusterError
from cluster.errors import Unavailable


@contextmanager
def translated(who: str) -> Iterator[None]:
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MoeClusterError):
            raise cause from None
        raise MoeClusterError(f"{who} failed: {type(cause).__name__}: {cause}") from error
    except (ActorDiedError, ActorUnavailableError, RayActorError) as error:
        raise Unavailable(f"{who} is not there: its process died or its node is away") from error
    except (GetTimeoutError, TimeoutError) as error:
        raise LinkTimeout("no answer before the deadline", peer=who) from error
    except RayError as error:
        raise Unavailable(f"{who} cannot be reached: {type(error).__name__}") from error


def is_death(error: MoeClusterError) -> bool:
    """Whether the actor that was asked is itself gone, not somebody that it needs."""
    return isinstance(error, Unavailable) and isinstance(error.__cause__, RayActorError)


def call(who: str, ref: Any, timeout_s: float) -> Any:
    with translated(who):
        return ray.get(ref, timeout=timeout_s)


def ended(refs: Sequence[Any], timeout_s: float) -> list[Any]:
    """Those of these Ray calls that have ended, with or without an error, when all have or the time is up."""
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
    return list(ready)


async def acall(who: str, ref: Any, timeout_s: float) -> Any:
    with translated(who):
        async with asyncio.timeout(timeout_s):  # `wait_for` of Python 3.11 may lose a cancellation
            return await ref
