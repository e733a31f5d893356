"""What the coordinator's loop hears of or decides once is not lost with something else."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from actors.errors import MoeClusterError
from cluster.config import JobConfig
from cluster.control.decisions import Decision, StartJob, StopJob
from cluster.fabric.control import ControlWorker
from cluster.fabric.lookout import Signs
from cluster.fabric.loops import each
from cluster.fabric.options import WATCH, coordinator_options


class Stage:
    """A coordinator's worker without Ray, and all that it asks. What is first asked for fails."""

    def __init__(self, signs: Signs, decisions: list[Decision]) -> None:
        self.done: list[str] = []
        self.coordinator = SimpleNamespace(step=lambda now: decisions)
        self.desk: Any = SimpleNamespace(
            state=self,
            changes=SimpleNamespace(bury=lambda name, *more: self._do(f"bury {name}")),
            jobs=SimpleNamespace(
                start=lambda job_id, *more: self._do(f"start {job_id}"), stop=lambda job_id: self._do(f"stop {job_id}")
            ),
        )
        crew: Any = SimpleNamespace(look=lambda: signs, cut_off=lambda name: None)
        self.worker = ControlWorker.__new__(ControlWorker)
        self.worker._crew = crew

    @contextmanager
    def changing(self) -> Any:
        yield self.coordinator

    def _do(self, what: str) -> None:
        self.done.append(what)
        if len(self.done) == 1:
            raise MoeClusterError("it cannot be done")


def test_every_death_is_buried() -> None:
    stage = Stage(Signs(dead={"e0": "gone", "e1": "gone"}, frozen={"e2": 5.0}), [])
    stage.worker._look(stage.desk)
    assert stage.done == ["bury e0", "bury e1", "bury e2"]


def test_every_decision_is_carried_out() -> None:
    stage = Stage(Signs(), [StopJob("job-1", "cancelled"), StartJob("job-2", JobConfig())])
    stage.worker._step(stage.desk)
    assert stage.done == ["stop job-1", "start job-2"]


def test_steps_come_in_order_and_an_error_ends_one() -> None:
    done: list[int] = []
    each("it", [lambda: done.append(1), lambda: done.append(1 // 0), lambda: done.append(2)])
    assert done == [1, 2]


def test_watchers_of_jobs_keep_threads_of_their_own() -> None:
    """Each call waits for seconds: a front alone may have more of them than the coordinator has threads."""
    worker: Any = ControlWorker
    assert worker.job_events.__ray_concurrency_group__ == WATCH
    assert WATCH in coordinator_options("node", may_move=False)["concurrency_groups"]
