"""Ray calls with a deadline, whose failures come out as errors of our own tree."""

from __future__ import annotations

import asyncio
import time
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


def as_they_come(refs: Sequence[Any], timeout_s: float) -> Iterator[int]:
    """Indices of Ray calls in the order in which they end, with or without an error; those that have not in time come
    last."""
    todo = {ref: index for index, ref in enumerate(refs)}
    deadline = time.monotonic() + timeout_s
    while todo:
        ready, _ = ray.wait(list(todo), timeout=max(0.0, deadline - time.monotonic()))
        for ref in ready or list(todo):
            yield todo.pop(ref)


async def acall(who: str, ref: Any, timeout_s: float) -> Any:
    with translated(who):
        async with asyncio.timeout(timeout_s):  # `wait_for` of Python 3.11 may lose a cancellation
            return await ref
