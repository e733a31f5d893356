"""A whole service over Ray, on simulated nodes of this machine, asked over gRPC."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch

from actors.errors import InvalidInput, MoeClusterError
from actors.moe.settings import BalanceSettings
from cluster.backend import JobState, Prompt, SamplingParams
from cluster.config import BatchConfig, ClusterConfig, DataConfig, EvalConfig, JobConfig, OptimizerConfig
from cluster.configfile import find_config, load_cluster
from cluster.errors import AlreadyExists, FailedPrecondition, NotFound, PortInUse
from cluster.fabric.launch import launched
from cluster.serve import Service, served
from cluster.service.client import Client
from tests.families import plain

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

WAIT_S = 60.0


def config_in(root: Path, **overrides: object) -> ClusterConfig:
    values = {
        "model": "tiny",
        "experts.group_size": 2,
        "ray.start_timeout_s": 240.0,
        "front.port": 0,
        "storage.root": str(root),
        "checkpoint.every_steps": 0,
        **overrides,
    }
    return load_cluster(find_config("local_cpu"), values)


def job_of(steps: int, **changes: object) -> JobConfig:
    job = JobConfig(
        steps=steps,
        batch=BatchConfig(sequences=4, sequence_length=64),
        optimizer=OptimizerConfig(lr=3e-3),
        data=DataConfig(heldout_every=20),
        eval=EvalConfig(every_steps=10, batches=2),
    )
    return replace(job, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def service(root: Path) -> Iterator[Service]:
    with served(config_in(root)) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.target, timeout_s=WAIT_S) as client:
        yield client


def finish(client: Client, job_id: str) -> list[tuple[str, int]]:
    return [(event.kind, event.step) for event in client.watch_job(job_id)]


def test_status_tells_who_owns_what(client: Client) -> None:
    status = client.status()
    assert status.ready
    assert set(status.nodes) == {"head", "node-1", "node-2"}
    experts = [actor for actor in status.actors if actor.role == "expert"]
    assert len({actor.node for actor in experts}) == 2
    assert sorted(g for actor in experts for g in actor.groups) == [0, 1, 2, 3]
    assert all(psutil.pid_exists(actor.pid) and actor.memory_bytes > 0 for actor in status.actors)
    assert status.num_experts == 8


def test_a_job_may_leave_its_experts_behind(client: Client) -> None:
    late = replace(job_of(8).optimizer, staleness=2)
    events = list(client.watch_job(client.submit_job(job_of(8, optimizer=late)).id))
    assert events[-1].state is JobState.SUCCEEDED
    lags = [event.metrics["staleness_max"] for event in events if event.kind == "step"]
    assert len(lags) == 8
    assert all(0 <= lag <= 2 for lag in lags)
    events = list(client.watch_job(client.submit_job(job_of(2)).id))
    assert [event.metrics["staleness_max"] for event in events if event.kind == "step"] == [0, 0]
    deadline = time.monotonic() + WAIT_S
    while any(actor.version != client.status().version for actor in client.status().actors):
        assert time.monotonic() < deadline, "every update must be in the weights at last"
        time.sleep(0.1)
    with pytest.raises(InvalidInput, match=r"optimizer\.staleness.*65"):
        client.submit_job(job_of(2, optimizer=replace(late, staleness=65)))


def test_a_job_learns_real_text_while_text_is_generated(client: Client) -> None:
    before = client.status().version
    job = client.submit_job(job_of(30))
    versions: list[int] = []
    reader = threading.Thread(
        target=lambda: versions.extend(c.version for c in client.generate("import ", SamplingParams(max_tokens=100)))
    )
    reader.start()
    events = list(client.watch_job(job.id))
    reader.join(WAIT_S)
    assert client.get_job(job.id).state is JobState.SUCCEEDED
    heldout = [e.metrics["heldout_loss"] for e in events if e.kind == "eval"]
    assert heldout[-1] < heldout[0] - 1
    assert [e.number for e in events] == list(range(1, len(events) + 1))
    assert len(versions) == 100
    assert versions == sorted(versions), "a stream follows the newest version"
    deadline = time.monotonic() + WAIT_S
    while any(actor.version != before + 30 for actor in client.status().actors):
        assert time.monotonic() < deadline, client.status()
        time.sleep(0.1)
    status = client.status()
    assert status.version == before + 30
    assert sum(map(sum, status.load_LE)) > 0
    assert client.load().load_LE == status.load_LE
    assert set(client.load().actors) == set(status.owners.values())


def test_groups_move_by_load_while_a_job_trains(client: Client) -> None:
    job = client.submit_job(job_of(40, balance=BalanceSettings(bias_speed=0.001)))
    for event in client.watch_job(job.id):
        if event.step >= 5:
            break
    before = client.status()
    dry = client.rebalance(dry_run=True)
    assert not dry.done
    assert client.status().placement_epoch == before.placement_epoch
    done = client.rebalance()
    assert done.balance_after >= done.balance_before
    after = client.status()
    # Copies travel together with moves; a move alone takes an epoch of its own.
    assert bool(done.moves) <= after.placement_epoch - before.placement_epoch <= len(done.moves)
    owners = dict(before.owners)
    for move in done.moves:
        assert owners[move.group] == move.source
        if move.kind == "move":
            owners[move.group] = move.target
        else:
            assert move.target in after.copies[move.group]
    assert dict(after.owners) == owners
    assert done.done == bool(done.moves)
    finish(client, job.id)
    assert client.get_job(job.id).state is JobState.SUCCEEDED
    assert sum(len(c.token_ids) for c in client.generate("import ", SamplingParams(max_tokens=4))) == 4


def test_greedy_and_seeded_streams_repeat(client: Client) -> None:
    for params in (SamplingParams(max_tokens=20), SamplingParams(max_tokens=20, temperature=1.0, seed=5)):
        texts = {"".join(c.text for c in client.generate("class A", params)) for _ in range(2)}
        assert len(texts) == 1


def test_two_streams_do_not_disturb_each_other(client: Client) -> None:
    params = SamplingParams(max_tokens=30)
    alone = "".join(c.text for c in client.generate("def f", params))
    together: list[str] = []

    def read() -> None:
        together.append("".join(c.text for c in client.generate("def f", params)))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert together == [alone] * 3


def test_scores_and_embeddings_are_those_of_the_exported_model(client: Client) -> None:
    directory = client.export_model("out/model")
    model = plain(Path(directory.path))
    ids = list(b"for x in y:")
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    expected = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(client.score("for x in y:").logprobs), expected, atol=1e-4, rtol=1e-4)
    hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(torch.tensor(client.embed("for x in y:").embedding), hidden, atol=1e-4, rtol=1e-4)


def test_an_exported_model_comes_back(client: Client) -> None:
    client.export_model("before")
    before = client.score("return self").logprobs
    job = client.submit_job(job_of(3))
    finish(client, job.id)
    assert client.score("return self").logprobs != before
    client.import_model("before")
    np.testing.assert_allclose(client.score("return self").logprobs, before, rtol=1e-5)


def test_a_cancelled_job_stops_and_the_next_one_runs(client: Client) -> None:
    long = client.submit_job(job_of(100_000))
    waiting = client.submit_job(job_of(2))
    for event in client.watch_job(long.id):
        if event.kind == "step":
            break
    with pytest.raises(FailedPrecondition, match="imported"):
        client.import_model("before")
    client.cancel_job(long.id)
    finish(client, long.id)
    assert client.get_job(long.id).state is JobState.CANCELLED
    finish(client, waiting.id)
    assert client.get_job(waiting.id).state is JobState.SUCCEEDED
    with pytest.raises(FailedPrecondition, match="cancelled"):
        client.cancel_job(long.id)


def test_the_same_request_id_is_the_same_job(client: Client) -> None:
    first = client.submit_job(job_of(1), request_id="once")
    assert client.submit_job(job_of(1), request_id="once").id == first.id
    with pytest.raises(AlreadyExists):
        client.submit_job(job_of(2), request_id="once")
    finish(client, first.id)


def test_a_loss_that_is_not_finite_fails_the_job_and_keeps_the_last_good_version(client: Client) -> None:
    client.export_model("good")
    # With weight decay each update then multiplies the weights by -9, until float32 cannot hold them.
    job = client.submit_job(job_of(200, optimizer=OptimizerConfig(lr=100.0, clip_norm=0.0)))
    finish(client, job.id)
    job = client.get_job(job.id)
    assert job.state is JobState.FAILED
    assert f"step {job.step + 1}" in job.error
    assert client.status().ready
    client.import_model("good")
    assert np.isfinite(client.score("abc").logprobs).all()


def test_a_reader_that_goes_away_ends_its_stream(client: Client) -> None:
    stream = client.generate("x", SamplingParams(max_tokens=200))
    next(iter(stream))
    stream.close()
    assert "".join(c.text for c in client.generate("x", SamplingParams(max_tokens=2))) is not None
    assert client.status().ready


BAD_REQUESTS = {
    "token outside the vocabulary": (lambda c: c.score(Prompt(token_ids=(1, 260))), InvalidInput, "vocabulary"),
    "prompt beyond the model": (lambda c: c.score("x" * 300), InvalidInput, "longer than the model"),
    "no room to generate": (
        lambda c: list(c.generate("x" * 256, SamplingParams(max_tokens=1))),
        InvalidInput,
        "no room|longer",
    ),
    "too long a sequence to train": (
        lambda c: c.submit_job(job_of(1, batch=BatchConfig(sequence_length=4096))),
        InvalidInput,
        "sequence_length",
    ),
    "export outside the root": (lambda c: c.export_model("../elsewhere"), InvalidInput, "storage root"),
    "import of nothing": (lambda c: c.import_model("nowhere"), InvalidInput, "config.json"),
    "unknown job": (lambda c: c.get_job("job-999"), NotFound, "job-999"),
}


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_bad_requests_are_named_and_do_no_harm(client: Client, what: str) -> None:
    request, error, text = BAD_REQUESTS[what]
    with pytest.raises(error, match=text):
        request(client)
    assert client.status().ready


def test_a_job_without_data_fails_with_the_reason(client: Client) -> None:
    job = client.submit_job(job_of(1, data=DataConfig(source="path:/nowhere/*.txt")))
    finish(client, job.id)
    assert "/nowhere" in client.get_job(job.id).error
    assert client.status().ready


def test_an_import_of_another_architecture_is_refused_before_anything_changes(client: Client, root: Path) -> None:
    from tests.families import save

    save("mixtral", root / "other")
    before = client.score("abc").logprobs
    with pytest.raises(InvalidInput, match="MixtralForCausalLM"):
        client.import_model("other")
    assert client.score("abc").logprobs == before


def test_a_taken_port_is_named_at_once(service: Service, root: Path) -> None:
    port = int(service.target.rsplit(":", 1)[1])
    started = time.monotonic()
    with pytest.raises(PortInUse, match=str(port)), served(config_in(root, **{"front.port": port})):
        pass
    assert time.monotonic() - started < 5


def test_a_second_cluster_in_one_process_is_refused(service: Service, root: Path) -> None:
    assert ray.is_initialized()
    with pytest.raises(FailedPrecondition, match="connected to a Ray cluster already"), launched(config_in(root)):
        pass


def test_a_dead_expert_actor_fails_the_job_by_name_and_the_front_lives_on(client: Client) -> None:
    """Runs last in this module: nothing takes the place of the dead actor here."""
    job = client.submit_job(job_of(100_000))
    for event in client.watch_job(job.id):
        if event.kind == "step":
            break
    victim = next(actor for actor in client.status().actors if actor.role == "expert")
    os.kill(victim.pid, signal.SIGKILL)
    finish(client, job.id)
    job = client.get_job(job.id)
    assert job.state is JobState.FAILED
    assert victim.id in job.error
    deadline = time.monotonic() + WAIT_S
    while client.status().ready and time.monotonic() < deadline:
        time.sleep(0.1)
    status = client.status()
    assert not status.ready
    assert "no actor holds" in status.message
    with pytest.raises(MoeClusterError, match="did not recover within this call's deadline"):
        client.score("".join(map(chr, range(32, 127))), timeout_s=15.0)  # somebody asks for what is gone
