from __future__ import annotations

import pytest

from cluster.fabric import sessions as module
from cluster.fabric.sessions import Sessions


def test_a_session_is_wanted_until_it_is_ended() -> None:
    sessions = Sessions()
    assert sessions.begin("a")
    assert sessions.is_wanted("a")
    sessions.end("a")
    assert not sessions.is_wanted("a")


def test_one_that_was_ended_before_it_began_does_not_begin() -> None:
    """Its begin waits for a free thread while its caller gives up."""
    sessions = Sessions()
    sessions.end("a")
    assert not sessions.begin("a")
    assert sessions.begin("b")


def test_what_is_remembered_of_ends_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENDED", 2)
    sessions = Sessions()
    for session in ("a", "b", "c"):
        assert sessions.begin(session)
        sessions.leave(session)
        sessions.end(session)  # as the caller of every stream does when it is over
    assert [sessions.begin(session) for session in ("a", "b", "c")] == [True, False, False]
