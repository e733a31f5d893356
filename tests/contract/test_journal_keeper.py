"""The journal's file: written when there is news, soon, and read back; what is no journal is put aside."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.fabric import journal as edge
from cluster.fabric.journal import NAME, Keeper, name_for, read_journal
from tests.unit.test_journal import JOBS, JOURNAL

WAIT_S = 20.0


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Desk:
    def __init__(self, url: str) -> None:
        self.journal = replace(JOURNAL, is_pristine=True, jobs=(), operations=(), entries=())
        self.keeper = Keeper(url, lambda: self.journal, lambda journal: not journal.is_empty)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(edge, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(edge, "AFTER_FAILURE_S", 0.01)
    return Desk(str(tmp_path))


def test_nothing_is_written_before_there_is_something_to_tell(desk: Desk, tmp_path: Path) -> None:
    desk.keeper.write_now()
    assert read_journal(str(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []
    desk.journal = JOURNAL
    desk.keeper.write_now()
    assert read_journal(str(tmp_path)) == JOURNAL
    desk.journal = replace(JOURNAL, jobs=(), operations=(), entries=())
    desk.keeper.write_now()
    assert read_journal(str(tmp_path)) == desk.journal, "from then on all is"


def test_news_are_written_by_themselves_and_steps_are_none(desk: Desk, tmp_path: Path) -> None:
    desk.journal = JOURNAL
    desk.keeper.start()
    wait_until(lambda: read_journal(str(tmp_path)) == JOURNAL)
    desk.journal = replace(JOURNAL, jobs=(JOBS[0], replace(JOBS[1], step=18, last_event=22), JOBS[2]))
    desk.keeper.write_now()
    assert read_journal(str(tmp_path)) == JOURNAL
    last = desk.journal = replace(desk.journal, wanted=9)
    desk.keeper.close()
    assert read_journal(str(tmp_path)) == last


def test_storage_that_fails_is_written_to_when_it_does_not_any_more(desk: Desk, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.write_text("in the way")
    broken = Desk(str(folder))
    broken.journal = JOURNAL
    broken.keeper.write_now()
    broken.keeper.start()
    folder.unlink()
    wait_until(lambda: folder.is_dir() and read_journal(str(folder)) == JOURNAL)
    broken.keeper.close()


def test_a_passing_cluster_has_a_journal_of_its_own_that_ends_with_it(desk: Desk, tmp_path: Path) -> None:
    desk.journal = JOURNAL
    desk.keeper.write_now()
    name = name_for("abc", is_passing=True)
    passing = Keeper(str(tmp_path), lambda: replace(JOURNAL, wanted=9), lambda journal: True, name)
    passing.write_now()
    found = read_journal(str(tmp_path), name)
    assert found is not None
    assert found.wanted == 9
    assert read_journal(str(tmp_path), name_for("abc", is_passing=False)) == JOURNAL
    passing.close()
    passing.write_now()
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_what_is_no_journal_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / NAME).write_bytes(JOURNAL.to_json()[:-5])
    assert read_journal(str(tmp_path)) is None
    assert "is put aside" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == [f"{NAME}.unreadable"]
    assert read_journal(str(tmp_path)) is None
