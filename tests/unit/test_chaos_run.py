"""What the fault benchmark does where the cluster is not ready for a fault yet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.backend import Operation, OperationState
from cluster.chaos import run
from cluster.errors import FailedPrecondition

DONE = Operation("operation-1", "r", "scale_experts", OperationState.SUCCEEDED, 3, 1.0, "", 8.0)


def scaled(answers: list[Any]) -> tuple[str, int]:
    """-> what went wrong, and the number wanted afterwards."""

    def scale(target: int) -> Operation:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    disturbed: Any = object.__new__(run._Disturbed)
    disturbed._client = SimpleNamespace(scale=scale)
    disturbed._look = lambda doing: ""
    disturbed._wanted = 2
    return disturbed._scale(3), disturbed._wanted


def test_scaling_waits_for_the_healing_before_it() -> None:
    busy = FailedPrecondition("healing is under way; wait until it has ended")
    assert scaled([busy, busy, DONE]) == ("", 3)


def test_a_healing_without_end_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEAL_TIMEOUT_S", 0.05)
    assert scaled([FailedPrecondition("healing is under way")]) == ("scaling to 3 failed: healing is under way", 2)
