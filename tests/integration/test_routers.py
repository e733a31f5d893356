"""Over Ray: several routers, no checkpoint. Whoever dies or comes, jobs and streams cannot tell from their numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from actors.errors import MoeClusterError
from cluster.backend import ActorStatus, ClusterStatus, JobEvent, JobState, OperationState, SamplingParams
from cluster.config import BatchConfig, OptimizerConfig
from cluster.errors import Unavailable
from cluster.fabric.options import NAMESPACE
from cluster.service.client import Client
from tests.integration.test_coordinator_death import coordinator
from tests.integration.test_resume import JOB, WAIT_S, config_in, finish, losses, running, watch_to

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

# With the usual eps AdamW makes 1e-8 of what sums in another order differ by where a gradient is all but 0.
BATCH = BatchConfig(sequences=3, sequence_length=32, gradient_accumulation=4)
STEADY = replace(JOB, optimizer=OptimizerConfig(lr=3e-3, eps=1e-4), batch=BATCH)
LASTING = replace(STEADY, steps=100_000, optimizer=OptimizerConfig(lr=1e-3, eps=1e-4))
"""Until it is cancelled: it outlasts what a busy machine takes to start a router."""
BACK_S = 2 * WAIT_S
"""Two processes that import torch start one after the other."""
SAMPLING = SamplingParams(max_tokens=120, temperature=0.8, top_p=0.95, seed=7)
STREAM_S = 240.0
"""Of one with so many tokens, on a machine that does much else."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[Client]:
    # The family's own gate computes in float32, where a product depends on how many tokens are in it.
    values = {"router.actors": 1, "router.max_actors": 3, "checkpoint.every_steps": 0, "model.gate.kind": "top_k"}
    with running(config_in(root, **values)) as client:
        client.export_model("same")
        yield client


def routers(client: Client) -> dict[str, ActorStatus]:
    return ready_routers(client.status())


def ready_routers(status: ClusterStatus) -> dict[str, ActorStatus]:
    return {actor.id: actor for actor in status.actors if actor.role == "router" and actor.state == "ready"}


def wait_for_routers(client: Client, count: int) -> None:
    deadline = time.monotonic() + BACK_S
    while True:
        found: ClusterStatus | Unavailable
        try:
            found = client.status()
            if len(ready_routers(found)) == count and found.ready:
                return
        except Unavailable as error:  # the coordinator is on its way back
            found = error
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def scale(client: Client, count: int) -> None:
    changes = list(client.watch_operation(client.scale_routers(count).id))
    assert changes[-1].state is OperationState.SUCCEEDED, changes[-1]
    wait_for_routers(client, count)


def tokens(client: Client) -> list[int]:
    chunks = client.generate("def main(", SAMPLING, timeout_s=STREAM_S)
    return [token for chunk in chunks for token in chunk.token_ids]


def wait_until_gone(client: Client, router: str) -> None:
    """Its end is known, and it counts no more among those that are ready."""
    deadline = time.monotonic() + BACK_S
    while router in routers(client):
        assert time.monotonic() < deadline, router
        time.sleep(0.1)


def same(events: list[JobEvent], alone: list[JobEvent]) -> None:
    assert losses(events) == pytest.approx(losses(alone), rel=1e-9)
    assert len([event for event in events if event.kind == "step"]) == STEADY.steps, "no step is told twice"


@pytest.fixture(scope="module")
def alone(client: Client) -> list[JobEvent]:
    return finish(client, client.submit_job(STEADY).id)


def test_the_leader_dies_under_a_job_and_streams(client: Client, alone: list[JobEvent]) -> None:
    expected = tokens(client)
    client.import_model("same")
    scale(client, 2)
    leader, other = routers(client)
    pid = routers(client)[leader].pid
    job = client.submit_job(STEADY)
    watch_to(client, job.id, 12)
    os.kill(pid, signal.SIGKILL)
    events = finish(client, job.id)
    same(events, alone)
    assert any(
        f"router {leader} lost" in event.message and "the other routers go on" in event.message for event in events
    )
    wait_for_routers(client, 2)
    left = routers(client)
    assert leader not in left
    assert other in left
    entry = client.ledger().entries[-1]
    assert (entry.kind, entry.subject, entry.updates_lost) == ("router_death", leader, 0)
    # The weights are the same again, and so are the streams, while the leader dies or freezes under them.
    found: dict[int, list[int]] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: tokens(client)})) for n in range(3)]
    for thread in threads:
        thread.start()
    os.kill(left[other].pid, signal.SIGKILL)
    for thread in threads:
        thread.join(STREAM_S)
    assert found == dict.fromkeys(range(3), expected)
    wait_until_gone(client, other)
    wait_for_routers(client, 2)


def test_routers_come_and_go_under_a_job(client: Client) -> None:
    scale(client, 2)
    client.import_model("same")
    expected = client.score("def main(").logprobs
    job = client.submit_job(LASTING)
    watch_to(client, job.id, 3)
    scale(client, 3)
    watch_to(client, job.id, client.get_job(job.id).step + 2)
    scale(client, 1)
    last = client.get_job(job.id).step + 2
    disturbed = steps_to(client, job.id, last)
    client.import_model("same")
    assert client.score("def main(").logprobs == pytest.approx(expected, rel=1e-9)
    assert disturbed == pytest.approx(steps_to(client, client.submit_job(LASTING).id, last), rel=1e-9)


def steps_to(client: Client, job_id: str, last: int) -> dict[int, float]:
    """Losses of these steps of a job, which is cancelled then."""
    told = [event for event in watch_to(client, job_id, last) if event.kind == "step"]
    client.cancel_job(job_id)
    list(client.watch_job(job_id))
    assert [event.step for event in told] == list(range(1, last + 1)), "each step is told once"
    return losses(told)


def test_a_replica_freezes_under_a_job(client: Client, alone: list[JobEvent]) -> None:
    scale(client, 2)
    client.import_model("same")
    replica = list(routers(client).values())[-1]
    job = client.submit_job(STEADY)
    watch_to(client, job.id, 3)
    os.kill(replica.pid, signal.SIGSTOP)
    same(finish(client, job.id), alone)
    wait_until_gone(client, replica.id)
    wait_for_routers(client, 2)
    # Whoever leads saves.
    assert "router-0" not in routers(client)
    assert client.save_checkpoint().version == client.status().version


def test_the_coordinator_and_the_leader_die_at_once(client: Client, alone: list[JobEvent]) -> None:
    scale(client, 1)
    scale(client, 2)
    client.import_model("same")
    version = client.status().version
    leader, victim = next(iter(routers(client).values())), coordinator()
    job = client.submit_job(STEADY)
    watch_to(client, job.id, 12)
    os.kill(leader.pid, signal.SIGKILL)
    victim.kill()
    # A few steps may be told to nobody: they are done, and no other coordinator has heard of them.
    told, expected = losses(list(client.watch_job(job.id))), losses(alone)
    assert told == pytest.approx({step: expected[step] for step in told}, rel=1e-9)
    assert max(told) == STEADY.steps
    assert client.get_job(job.id).state is JobState.SUCCEEDED
    assert client.status().version == version + STEADY.steps, "no step was done twice"
    wait_for_routers(client, 2)
    assert leader.id not in routers(client)
    assert "coordinator_restart" in [entry.kind for entry in client.ledger().entries]


def test_both_die_in_an_import(client: Client, root: Path) -> None:
    """Some expert actors have the new weights then, and the next leader's trunk is the old one: it is done again, and
    nobody is given an answer of both meanwhile."""
    scale(client, 2)
    client.import_model("same")
    expected = client.score("def main(").logprobs
    finish(client, client.submit_job(STEADY).id)
    before = client.score("def main(").logprobs
    *others, last = [actor for actor in client.status().actors if actor.role == "expert"]
    victim, leader = coordinator(), next(iter(routers(client).values()))
    loaded = Loaded(others)
    thread = threading.Thread(target=try_import, args=(client,), daemon=True)
    is_over = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(scores, client, is_over) for _ in range(2)]
        try:
            os.kill(last.pid, signal.SIGSTOP)  # the import waits for it; not for long, or it counts as dead
            thread.start()
            loaded.wait()
            os.kill(leader.pid, signal.SIGKILL)
            victim.kill()
            os.kill(last.pid, signal.SIGCONT)
            thread.join(WAIT_S)
            wait_for_routers(client, 2)
        finally:
            is_over.set()
        answers = [answer for reader in readers for answer in reader.result(BACK_S)]
    assert answers
    assert all(answer in (pytest.approx(before, rel=1e-9), pytest.approx(expected, rel=1e-9)) for answer in answers)
    assert leader.id not in routers(client)
    assert client.score("def main(").logprobs == pytest.approx(expected, rel=1e-9)
    assert json.loads(journal(root).read_text())["importing"] == ""


def test_an_import_that_cannot_end_is_given_up_for_the_last_checkpoint(client: Client, root: Path) -> None:
    """Some expert actors have the new weights when its directory is gone. Who asks meanwhile gets no answer of both."""
    scale(client, 2)
    doomed = Path(client.export_model("doomed").path)
    finish(client, client.submit_job(STEADY).id)
    expected, saved = client.score("def main(").logprobs, client.save_checkpoint()
    *others, last = [actor for actor in client.status().actors if actor.role == "expert"]
    leader = next(iter(routers(client).values()))
    loaded = Loaded(others)
    with ThreadPoolExecutor(2) as pool:
        os.kill(last.pid, signal.SIGSTOP)  # the import waits for it; not for long, or it counts as dead
        importing = pool.submit(client.import_model, "doomed")
        loaded.wait()
        shutil.rmtree(doomed)
        os.kill(leader.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # if it counts as dead, its groups come from the checkpoint as well
            os.kill(last.pid, signal.SIGCONT)
        asked = pool.submit(client.score, "def main(", timeout_s=BACK_S)
        with pytest.raises(MoeClusterError):
            importing.result(BACK_S)
        assert asked.result(BACK_S).logprobs == pytest.approx(expected, rel=1e-9)
    wait_for_routers(client, 2)
    assert leader.id not in routers(client)
    assert client.status().version == saved.version
    finish(client, client.submit_job(STEADY).id)


def scores(client: Client, is_over: threading.Event) -> list[Sequence[float]]:
    found = []
    while not is_over.is_set():
        found.append(client.score("def main(", timeout_s=BACK_S).logprobs)
    return found


def try_import(client: Client) -> None:
    with suppress(MoeClusterError):
        client.import_model("same")


def journal(root: Path) -> Path:
    (file,) = root.rglob("journal*.json")
    return file


class Loaded:
    """Tells when expert actors have the weights of an import that is about to begin."""

    def __init__(self, actors: Sequence[ActorStatus]) -> None:
        names = {actor.id for actor in actors}
        self._handles = [
            ray.get_actor(actor["name"], NAMESPACE)
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if actor["namespace"] == NAMESPACE and actor["name"].split("/")[1] in names
        ]
        assert len(self._handles) == len(names) > 0
        self._before = self._runs()

    def wait(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while any(now == before for now, before in zip(self._runs(), self._before, strict=True)):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _runs(self) -> list[int]:
        """Each load of other weights begins another run."""
        vitals = ray.get([handle.vitals.remote() for handle in self._handles], timeout=WAIT_S)
        return [int(each["run"]) for each in vitals]
