"""The journal: what comes back is what was written, and nothing else is taken for one."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.backend import Job, JobState, Operation, OperationState
from cluster.checkpoint.disk import Disk
from cluster.checkpoint.files import LocalFiles, open_files
from cluster.config import BatchConfig, JobConfig
from cluster.control.journal import Journal, LeavingNode, Process
from cluster.control.ledger import Entry
from cluster.control.model import ModelFacts

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)
JOBS = (
    Job("job-1", "a", JobConfig(steps=3), JobState.SUCCEEDED, 3, 1.0, 2.0, 3.0, last_event=9),
    Job("job-2", "b", JobConfig(batch=BatchConfig(sequences=3)), JobState.RUNNING, 17, 1.5, 4.0, last_event=21),
    Job("job-3", "c", JobConfig(), JobState.QUEUED, 0, 5.0, last_event=1),
)
JOURNAL = Journal(
    cluster="abc",
    written_s=10.5,
    origin=MODEL,
    model=replace(MODEL, num_experts=10, num_parameters=1200, shared_share=0.125),
    is_pristine=False,
    placement=Placement(4, (("expert-0", "expert-1"), ("expert-1",), (), ("expert-0",)), 2),
    wanted=3,
    next_number=7,
    wanted_routers=2,
    next_router=4,
    jobs=JOBS,
    operations=(Operation("operation-1", "r", "scale_experts", OperationState.RUNNING, 3, 0.25, "moved 1 of 4", 8.0),),
    entries=(Entry(3, "actor_death", "expert-2", 7.0, 7.25, message="killed"),),
    actors=(Process("router-0", "n0", 11), Process("expert-0", "n1", 12)),
    leaving=(LeavingNode("n2", "node-2"),),
    importing="/models/other",
)


def test_what_was_written_comes_back() -> None:
    assert Journal.from_json(JOURNAL.to_json(), "here") == JOURNAL


def test_a_journal_of_before_knows_no_import() -> None:
    document = json.loads(JOURNAL.to_json())
    del document["importing"]
    assert Journal.from_json(json.dumps(document).encode(), "here") == replace(JOURNAL, importing="")


def changed(path: tuple[Any, ...], value: object) -> bytes:
    document = json.loads(JOURNAL.to_json())
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "here: is no journal"),
        (b"[]", "is not an object"),
        (JOURNAL.to_json()[:-20], "here: is no journal"),
        (b"\xff\xfe", "here: is no journal"),
        (changed(("format",), 2), "here: format: is not 1"),
        (changed(("more",), 2), r"misses or adds a field .*more"),
        (changed(("is_pristine",), 0), "here: is_pristine: is not of type bool"),
        (changed(("wanted_routers",), 1.5), "here: wanted_routers: is not of type int"),
        (changed(("origin", "vocab_size"), None), r"here: origin\.vocab_size"),
        (changed(("leaving", 0, "name"), 2), r"here: leaving\.name: is not of type str"),
        (changed(("wanted",), True), "here: wanted: is not of type int"),
        (changed(("next_number",), -1), "here: next_number: is below 0"),
        (changed(("model", "num_experts"), "8"), r"here: model\.num_experts: is not of type int"),
        (changed(("placement", "holders"), [["e0"], "e1"]), r"here: placement\.holders"),
        (changed(("jobs", 1, "state"), "asleep"), "holds a job that cannot be read"),
        (changed(("jobs", 1, "config", "steps"), "many"), "steps"),
        (changed(("jobs", 1, "id"), "job-1"), "here: jobs: are not ids of one job each"),
        (changed(("jobs", 1, "id"), "mine"), "here: jobs: are not ids of one job each"),
        (changed(("operations", 0, "state"), "asleep"), "here: operations: cannot be read"),
        (changed(("operations", 0, "id"), 3), "here: operations: are not ids"),
        (changed(("ledger", "entries", 0, "kind"), "storm"), "is no kind of disturbance"),
        (changed(("actors", 0, "pid"), None), r"here: actors\.pid"),
        (changed(("importing",), 1), "here: importing: is not of type str"),
    ],
)
def test_what_cannot_be_is_named(data: bytes, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Journal.from_json(data, "here")


def test_steps_alone_are_no_news() -> None:
    later = (JOBS[0], replace(JOBS[1], step=18, last_event=22), JOBS[2])
    assert replace(JOURNAL, written_s=11.0, jobs=later).essence == JOURNAL.essence
    ended = (JOBS[0], replace(JOBS[1], state=JobState.FAILED), JOBS[2])
    assert replace(JOURNAL, jobs=ended).essence != JOURNAL.essence
    assert replace(JOURNAL, wanted=4).essence != JOURNAL.essence


# The file.


@pytest.fixture(params=["path", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "new" / "folder") if request.param == "path" else f"memory://{tmp_path}"


def test_a_file_is_replaced_and_checkpoints_do_not_see_it(url: str) -> None:
    files = open_files(url, Disk())
    assert files.get("journal.json") is None
    files.put("journal.json", b"one, which is longer")
    files.put("journal.json", b"two")
    assert open_files(url, Disk()).get("journal.json") == b"two"
    assert files.folders() == []
    files.put("other", b"three")
    files.drop("other")
    files.drop("other")
    assert files.get("other") is None
    files.put_aside("journal.json")
    assert files.get("journal.json") is None


class Strike(Disk):
    """Fails at one operation, counted from 0."""

    def __init__(self, at: int) -> None:
        self.left = at

    def before(self, operation: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "no space left")


@pytest.mark.parametrize("at", range(6))
def test_a_failure_at_any_moment_leaves_the_file_of_before_or_the_new_one(tmp_path: Path, at: int) -> None:
    LocalFiles(str(tmp_path), Disk()).put("journal.json", b"old")
    failing = LocalFiles(str(tmp_path), Strike(at))
    if at < 5:  # create, write, fsync, rename, fsync of the folder
        with pytest.raises(OSError, match="no space"):
            failing.put("journal.json", b"new")
    else:
        failing.put("journal.json", b"new")
    assert LocalFiles(str(tmp_path), Disk()).get("journal.json") == (b"old" if at < 4 else b"new")
    LocalFiles(str(tmp_path), Disk()).put("journal.json", b"later")
    assert LocalFiles(str(tmp_path), Disk()).get("journal.json") == b"later"
