"""What an attempt at a step must not hide."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import StepAborted
from actors.expert.transaction import Transaction

FIELDS = {"step": 1, "attempt": 0}


def accumulate(part: str) -> None:
    if part == "too much":
        raise MemoryError("no room")


def test_gradients_that_were_lost_between_questions_abort_the_attempt_and_no_later_one() -> None:
    """The server's thread does that work when nobody waits, and goes on after an error."""
    step, stacks = Transaction(0), [SimpleNamespace(accumulate=accumulate)]
    parts: Any = ["fits", "too much"]
    assert step.begins(FIELDS, 0)
    for part in parts:
        step.defer(0, part)
    whatever: Any = stacks
    assert step.do_deferred(whatever)
    with pytest.raises(MemoryError):
        step.do_deferred(whatever)
    assert not step.has_deferred
    with pytest.raises(StepAborted, match="gradients of this attempt are lost: MemoryError in layer 0: no room"):
        step.check_complete()
    step.clear()
    step.check_complete()
