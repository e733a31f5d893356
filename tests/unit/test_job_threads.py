"""A job's thread always tells how the job ended: while a job counts as running, no other one begins."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from actors.errors import PeerLost
from cluster.backend import ActorStatus, Job, JobState
from cluster.config import JobConfig, ModelConfig
from cluster.control.coordinator import Coordinator
from cluster.control.decisions import StartJob
from cluster.control.model import ModelFacts
from cluster.fabric import jobs as edge
from cluster.fabric.guarded import Guarded
from cluster.fabric.jobs import JobThreads
from cluster.placement.placement import ActorSlot, spread

MODEL = ModelFacts("tiny", 1000, num_experts=8, num_moe_layers=2, top_k=2, max_positions=256, vocab_size=260)
SHORT = JobConfig(steps=3)
WAIT_S = 30.0


class Around:
    """What the threads want of checkpoints, recovery, routers and snapshots."""

    def __init__(self, go_back: Callable[[], int | None]) -> None:
        self._go_back = go_back
        self.num_owed = 0

    def is_needed_after(self, error: object) -> bool:
        return True

    def go_back(self, job_id: str, should_stop: object) -> int | None:
        return self._go_back()

    def owe(self) -> None:
        self.num_owed += 1

    def after_job(self) -> None: ...


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: Callable[[], None], go_back: Callable[[], int | None]):
        """`steps` stands for all that a job does with routers and data."""
        monkeypatch.setattr(edge, "run_job", lambda *args, **more: steps())
        monkeypatch.setattr(edge, "load_tokenizer", lambda model: None)
        monkeypatch.setattr(JobThreads, "_documents", lambda *args: None)
        coordinator = Coordinator(MODEL, spread(8, 2, (ActorSlot("e0", "n0"),)))
        for name, role in (("r0", "router"), ("e0", "expert")):
            coordinator.actor_seen(ActorStatus(name, role, "n0", 1, "ready", device="cpu", version=0), 0.0)
        self.state = Guarded(coordinator)
        self.around = around = Around(go_back)
        self.threads = JobThreads(self.state, around, ModelConfig(), around, around, around, around)  # type: ignore[arg-type]

    def run(self) -> Job:
        """One job, until its thread has ended."""
        with self.state.changing() as coordinator:
            job = coordinator.jobs.submit(SHORT, "mine", 1.0)
            assert StartJob(job.id, SHORT) in coordinator.step(1.0)
        self.threads.start(job.id, SHORT, 0)
        for thread in threading.enumerate():
            if thread.name == job.id:
                thread.join(WAIT_S)
                assert not thread.is_alive()
        with self.state.reading() as coordinator:
            return coordinator.jobs.get(job.id)


def fail(error: Exception) -> Any:
    raise error


def test_a_return_that_stumbles_fails_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, lambda: fail(PeerLost("gone", peer="e0")), lambda: fail(OSError("no such device")))
    job = bench.run()
    assert (job.state, job.error) == (JobState.FAILED, "OSError: no such device")
    with bench.state.changing() as coordinator:
        other = coordinator.jobs.submit(SHORT, "another", 2.0)
        assert StartJob(other.id, SHORT) in coordinator.step(2.0)


def test_an_end_that_nobody_believes_fails_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Bench(monkeypatch, lambda: None, lambda: None).run()
    assert job.state is JobState.FAILED
    assert "0 of 3 steps" in job.error


def test_an_end_that_is_told_is_owed_to_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, lambda: fail(PeerLost("gone", peer="e0")), lambda: None)
    assert bench.run().state is JobState.FAILED
    assert bench.around.num_owed == 1


def test_nothing_is_reported_while_the_cluster_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next start resumes it."""
    bench = Bench(monkeypatch, lambda: stop(), lambda: None)

    def stop() -> None:
        bench.threads.stop_all()
        raise OSError("Ray is going away")

    assert bench.run().state is JobState.RUNNING
    assert bench.around.num_owed == 0
