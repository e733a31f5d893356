"""What a servicer knows about the call it answers. The interceptor sets it, once a call."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Call:
    method: str
    """Full name: `/moecluster.v1.TrainingService/GetJob`."""
    request_id: str
    deadline_s: float
    """On the clock of `time.monotonic`; infinite for health and reflection."""
    started_s: float

    @property
    def remaining_s(self) -> float:
        return max(0.0, self.deadline_s - time.monotonic())


_current: ContextVar[Call] = ContextVar("call")
_caller: ContextVar[str] = ContextVar("caller", default="")


def enter(call: Call) -> None:
    _current.set(call)


def identify(caller: str) -> None:
    """Whose token the call carries; set before `enter`."""
    _caller.set(caller)


def caller() -> str:
    """Empty where no token is asked for, or none was known."""
    return _caller.get()


def remaining_s() -> float:
    """Seconds left to the caller of the running servicer method; what it passes on as `timeout_s`."""
    return _current.get().remaining_s


@asynccontextmanager
async def closing(iterator: AsyncIterator[Item]) -> AsyncIterator[AsyncIterator[Item]]:
    """Closes a stream at once when its reader ends early, whether it is a generator or a plain iterator."""
    try:
        yield iterator
    finally:
        aclose = getattr(iterator, "aclose", None)
        if aclose is not None:
            await aclose()
