"""Directories that go with their process, and what is left of those whose process had no time for it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.transport import rundir
from actors.transport.payload.contract import AUTO
from actors.transport.payload.pair import GlooPair, PairCarrier
from actors.transport.rundir import RunDirectory, remove_abandoned
from actors.transport.socket.inbox import Inbox

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 30.0
MAKE = """
import sys
from actors.transport.rundir import RunDirectory
mine = [RunDirectory() for _ in range(int(sys.argv[1]))]
for each in mine:
    open(f"{each.path}/link", "w").close()
print(*(each.path for each in mine), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextmanager
def process(folder: Path, count: int) -> Iterator[tuple[subprocess.Popen[str], list[Path]]]:
    """That has so many directories."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    command = [sys.executable, "-c", MAKE, str(count)]
    pipe = subprocess.PIPE
    started = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
    try:
        assert started.stdout is not None
        yield started, [Path(path) for path in started.stdout.readline().split()]
    finally:
        started.kill()
        started.communicate(timeout=WAIT_S)


def kill(started: subprocess.Popen[str]) -> None:
    started.send_signal(signal.SIGKILL)
    started.wait(WAIT_S)


def test_what_a_killed_process_left_goes_when_another_directory_is_made(folder: Path) -> None:
    with process(folder, 2) as (started, paths):
        assert [path.stat().st_mode & 0o777 for path in paths] == [0o700, 0o700]
        mine = RunDirectory()
        assert all((path / "link").exists() for path in paths), "it lives"
        kill(started)
        another = RunDirectory()
        assert {*folder.iterdir()} == {Path(mine.path), Path(another.path)}
    for directory in (mine, another, another):
        directory.remove()
    assert not list(folder.iterdir())


def test_servers_and_pairs_leave_theirs_to_the_next(folder: Path) -> None:
    inbox, pair = Inbox("one", "127.0.0.1", 1 << 20, None, AUTO), PairCarrier(AUTO, "two", 0, GlooPair())
    paths = [Path(str(inbox.address.ipc).removeprefix("ipc://")).parent, Path(pair.offer()["store"]).parent]
    assert {*folder.iterdir()} == {*paths}
    assert all((path / "lock").exists() for path in paths)
    assert remove_abandoned() == 0
    inbox.close()
    assert not paths[0].exists()
    pair._end()
    assert not list(folder.iterdir())


def test_only_so_many_at_a_time(folder: Path) -> None:
    with process(folder, 7) as (started, _):
        kill(started)
    assert [remove_abandoned(limit=3) for _ in range(4)] == [3, 3, 1, 0]
    assert not list(folder.iterdir())


def test_what_is_being_made_is_nobodys_to_remove(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever somebody looks: before it has a file, before that is locked, and before it has its name."""
    removed, flock, rename = [], fcntl.flock, os.rename

    def look() -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        removed.append(remove_abandoned())
        monkeypatch.setattr(fcntl, "flock", watched)

    def watched(descriptor: int, operation: int) -> None:
        look()
        flock(descriptor, operation)
        look()

    def renamed(old: str, new: str) -> None:
        look()
        rename(old, new)
        look()

    monkeypatch.setattr(fcntl, "flock", watched)
    monkeypatch.setattr(os, "rename", renamed)
    made = RunDirectory()
    assert removed == [0, 0, 0, 0]
    assert os.listdir(made.path) == ["lock"]
    monkeypatch.undo()
    made.remove()


def test_what_is_not_ours_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with process(folder, 1) as (started, (abandoned,)):
        kill(started)
    other, file = folder / "elsewhere", folder / "moe.file"
    other.mkdir()
    (other / "lock").touch()
    file.touch()
    (folder / "moe.link").symlink_to(other)
    before = {*folder.iterdir()}
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert remove_abandoned() == 0, "of another user"
    assert {*folder.iterdir()} == before
    monkeypatch.setattr(os, "geteuid", lambda: mine)
    assert remove_abandoned() == 1
    assert {*folder.iterdir()} == before - {abandoned}


def test_a_name_that_another_process_uses_again_is_not_abandoned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a look at a lock and its taking somebody else has removed the directory, and a third made its own."""
    with process(folder, 1) as (started, (path,)):
        kill(started)
    take = rundir._try_lock

    def late(descriptor: int) -> bool:
        path.rename(folder / "gone")
        path.mkdir()
        (path / "lock").touch()
        return take(descriptor)

    monkeypatch.setattr(rundir, "_try_lock", late)
    assert remove_abandoned() == 0
    assert (path / "lock").exists()


def test_many_that_come_and_go_leave_each_other_alone(folder: Path) -> None:
    def come_and_go() -> None:
        for _ in range(40):
            mine = RunDirectory()
            assert os.listdir(mine.path) == ["lock"]
            mine.remove()

    with process(folder, 5) as (started, _), ThreadPoolExecutor(8) as pool:
        kill(started)
        for future in [pool.submit(come_and_go) for _ in range(8)]:
            future.result(WAIT_S)
    assert not list(folder.iterdir())


def test_sockets_in_it_have_room_for_their_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    made = RunDirectory()
    assert len(f"{made.path}/link") <= 30, "of 107: the rest is for another temporary folder"
    made.remove()
