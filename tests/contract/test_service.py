"""Every call of the front against a backend in memory, through the client."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from contextlib import closing

import pytest

from actors.errors import CheckpointError, InvalidInput, LinkTimeout, PeerLost, RemoteError, StepAborted, VersionGone
from actors.values import Growth, Placement, VersionChoice
from cluster.backend import GenerateChunk, GroupMove, Job, JobState, OperationState, Prompt, SamplingParams
from cluster.config import FrontConfig, JobConfig, OptimizerConfig
from cluster.control.ledger import Summary
from cluster.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    StorageFull,
    Unavailable,
)
from cluster.service.client import MODEL_TIMEOUT_S, Client
from tests.fakes.backend import GROUP_BYTES, PREPARE_S, STALL_S, MemoryBackend
from tests.fakes.front import run, running_front, until

QUICK = JobConfig(steps=3)
WAIT_S = 30.0


@pytest.fixture
def backend():
    return MemoryBackend()


@pytest.fixture
def client(backend):
    with running_front(backend) as front, Client(front.target, timeout_s=10.0) as client:
        yield client


def finished(client: Client, config: JobConfig = QUICK, **kwargs) -> Job:
    job = client.submit_job(config, **kwargs)
    list(client.watch_job(job.id))
    return client.get_job(job.id)


class TestTraining:
    def test_a_job_runs_and_its_config_comes_back(self, client):
        config = JobConfig(steps=4, optimizer=OptimizerConfig(lr=0.25, clip_norm=0.0))
        job = finished(client, config, request_id="first")
        assert (job.state, job.step, job.request_id, job.config) == (JobState.SUCCEEDED, 4, "first", config)
        assert job.created_s <= job.started_s <= job.ended_s

    def test_submit_is_idempotent_by_request_id(self, client):
        first = client.submit_job(QUICK, request_id="same")
        assert client.submit_job(QUICK, request_id="same").id == first.id
        assert client.submit_job(QUICK, request_id="other").id != first.id
        assert len(client.list_jobs()) == 2

    def test_a_request_id_with_another_config_is_refused(self, client):
        client.submit_job(QUICK, request_id="same")
        with pytest.raises(AlreadyExists, match="same"):
            client.submit_job(JobConfig(steps=4), request_id="same")

    def test_jobs_are_listed_newest_first_in_pages(self, client):
        ids = [client.submit_job(QUICK).id for _ in range(7)]
        assert [job.id for job in client.list_jobs(page_size=3)] == ids[::-1]
        assert [job.id for job in client.list_jobs(page_size=3, limit=4)] == ids[::-1][:4]

    def test_unknown_jobs(self, client):
        for call in (client.get_job, client.cancel_job, lambda job_id: list(client.watch_job(job_id))):
            with pytest.raises(NotFound, match="job-99"):
                call("job-99")

    def test_cancel_ends_a_running_job_after_its_step(self, backend, client):
        backend.step_s = 0.01
        job = client.submit_job(JobConfig(steps=10_000))
        watch = client.watch_job(job.id)
        next(event for event in watch if event.step == 2)
        assert client.cancel_job(job.id).state is JobState.CANCELLING
        assert list(watch)[-1].state is JobState.CANCELLED
        assert 2 <= client.get_job(job.id).step < 10_000

    def test_cancel_of_a_finished_job_is_refused(self, client):
        job = finished(client)
        with pytest.raises(FailedPrecondition, match="succeeded"):
            client.cancel_job(job.id)
        assert client.get_job(job.id) == job


class TestWatch:
    def test_events_are_numbered_without_gaps_and_end_with_the_job(self, client):
        job = client.submit_job(QUICK)
        events = list(client.watch_job(job.id))
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert [event.step for event in events if event.kind == "step"] == [1, 2, 3]
        assert events[-1].state is JobState.SUCCEEDED
        assert events[3].metrics == {"loss": 2.5, "tokens_per_s": 1000.0}

    def test_it_starts_after_the_given_event(self, client):
        job = finished(client)
        assert [event.number for event in client.watch_job(job.id, after=4)] == list(range(5, job.last_event + 1))
        assert list(client.watch_job(job.id, after=job.last_event)) == []

    def test_an_event_that_does_not_exist_yet_is_refused(self, client):
        job = finished(client)
        with pytest.raises(InvalidInput, match="after_event") as caught:
            list(client.watch_job(job.id, after=job.last_event + 1))
        assert caught.value.field == "after_event"

    def test_more_events_than_one_fetch_gives(self, client):
        job = client.submit_job(JobConfig(steps=1000))
        assert sum(event.kind == "step" for event in client.watch_job(job.id)) == 1000

    def test_it_outlasts_the_deadline_of_one_stream(self, backend, client, monkeypatch):
        monkeypatch.setattr("cluster.service.client.WATCH_STREAM_S", 0.1)
        backend.step_s = 0.01
        job = client.submit_job(JobConfig(steps=30))
        numbers = [event.number for event in client.watch_job(job.id)]
        assert numbers == list(range(1, client.get_job(job.id).last_event + 1))

    def test_it_survives_a_front_that_is_replaced(self):
        backend = MemoryBackend(step_s=0.005)
        with running_front(backend) as front, Client(front.target) as client:
            job = client.submit_job(JobConfig(steps=100))
            watch = client.watch_job(job.id)
            numbers = [event.number for event in itertools.islice(watch, 5)]
            run(front.stop(grace_s=0.0))
            with running_front(backend, FrontConfig(port=front.port)):
                numbers += [event.number for event in watch]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) > 100

    def test_it_gives_up_when_no_front_comes_back(self):
        backend = MemoryBackend(step_s=0.01)
        with running_front(backend) as front, Client(front.target, max_retries=1) as client:
            watch = client.watch_job(client.submit_job(JobConfig(steps=10_000)).id)
            next(watch)
            run(front.stop(grace_s=0.0))
            with pytest.raises(Unavailable, match="moe-cluster up"):
                list(watch)


class TestSubmitRetries:
    def test_a_lost_answer_does_not_make_a_second_job(self):
        class LosesFirstAnswer(MemoryBackend):
            async def submit_job(self, config, *, request_id, timeout_s):
                job = await super().submit_job(config, request_id=request_id, timeout_s=timeout_s)
                if not self.failures.get("answered"):
                    self.failures["answered"] = [Unavailable("once")]
                    raise Unavailable("the coordinator restarts")
                return job

        with running_front(LosesFirstAnswer()) as front, Client(front.target) as client:
            job = client.submit_job(QUICK)
            assert [found.id for found in client.list_jobs()] == [job.id]

    def test_other_errors_are_not_retried(self, backend, client):
        backend.failures["submit_job"] = [FailedPrecondition("not now")]
        with pytest.raises(FailedPrecondition, match="not now"):
            client.submit_job(QUICK)

    def test_no_front(self):
        with Client("127.0.0.1:1", max_retries=1) as client, pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
            client.submit_job(QUICK)


class TestInference:
    def test_generate_streams_pieces(self, client):
        chunks = list(client.generate("ab", SamplingParams(max_tokens=5)))
        assert "".join(chunk.text for chunk in chunks) == "ababa"
        assert [chunk.finish_reason for chunk in chunks] == ["", "", "", "", "length"]
        assert chunks[-1].prompt_tokens == 2

    def test_generate_takes_token_ids(self, client):
        chunks = list(client.generate(Prompt(token_ids=(72, 105)), SamplingParams(max_tokens=2)))
        assert [chunk.token_ids for chunk in chunks] == [(72,), (105,)]

    def test_a_prompt_the_model_refuses(self, client):
        with pytest.raises(InvalidInput, match="vocabulary") as caught:
            list(client.generate(Prompt(token_ids=(1, 999))))
        assert (caught.value.field, caught.value.remedy) == ("prompt.token_ids", "give ids below 256")

    def test_score(self, client):
        result = client.score("abc")
        assert result.token_ids == (97, 98, 99)
        assert result.logprobs == (-0.1, -0.2)

    def test_embed(self, client):
        assert client.embed("abc").embedding == (0.5, -0.25)

    def test_a_client_that_leaves_ends_the_generation(self, backend, client):
        backend.token_s = 0.005
        chunks = client.generate("ab", SamplingParams(max_tokens=100_000))
        next(chunks)
        chunks.close()
        assert backend.generation_closed.wait(WAIT_S)

    def test_a_client_that_never_reads_ends_the_generation_by_leaving(self, backend, client):
        """The stream is stuck in a full send window then, not in the backend."""
        chunks = client.generate("ab", SamplingParams(max_tokens=1_000_000))
        next(chunks)
        assert not backend.generation_closed.wait(0.3)
        chunks.close()
        assert backend.generation_closed.wait(WAIT_S)

    def test_the_backends_iterator_is_closed_and_not_left_to_the_garbage_collector(self):
        class Endless:
            def __init__(self):
                self.closed = threading.Event()

            def __aiter__(self):
                return self

            async def __anext__(self):
                await asyncio.sleep(0.005)
                return GenerateChunk("a", (97,), 0)

            async def aclose(self):
                self.closed.set()

        class Backend(MemoryBackend):
            stream = Endless()

            def generate(self, prompt, params, choice, *, timeout_s):
                return self.stream

        backend = Backend()
        with running_front(backend) as front, Client(front.target) as client:
            chunks = client.generate("a")
            next(chunks)
            assert not backend.stream.closed.is_set()
            chunks.close()
            assert backend.stream.closed.wait(WAIT_S)


class TestCluster:
    def test_status_crosses_whole(self, backend, client):
        backend.placement = Placement(1, (("expert-0", "expert-1"), ("expert-1",)), 2)
        status = client.status()
        assert status == run(backend.status(timeout_s=1.0))
        assert (status.owners, status.copies) == ({0: "expert-0", 1: "expert-1"}, {0: ("expert-1",)})

    def test_export_and_import(self, client):
        assert client.export_model("out").path == "/storage/out"
        assert client.import_model("out").model == "memory"

    def test_import_of_a_missing_directory(self, client):
        with pytest.raises(CheckpointError, match="missing-model") as caught:
            client.import_model("missing-model")
        assert caught.value.remedy == "export one first"


class TestLoad:
    def test_before_the_first_step_it_is_empty(self, client):
        report = client.load()
        assert (report.version, report.window_steps, report.load_LE, report.history) == (0, 0, (), ())

    def test_it_crosses_whole(self, backend, client):
        finished(client)
        report = client.load()
        assert report == run(backend.load_report(timeout_s=1.0))
        assert report.load_LE == ((20, 40, 60, 80), (0, 100, 100, 0))
        assert [step.version for step in report.history] == [2, 3]
        assert report.nodes == {"node-1": 400}

    def test_a_watch_shows_steps_as_they_are_committed(self, client):
        with closing(client.watch_load(0.2)) as reports:
            assert next(reports).version == 0
            finished(client)
            assert next(report for report in itertools.islice(reports, 20) if report.version == 3).window_steps == 2

    def test_its_reports_come_at_the_interval(self, client):
        client.status()  # connects
        with closing(client.watch_load(0.3)) as reports:
            started = time.monotonic()
            next(reports)
            assert len(list(itertools.islice(reports, 2))) == 2
            assert time.monotonic() - started > 0.5

    def test_leaving_ends_it_in_the_backend_too(self, backend, client):
        reports = client.watch_load(0.2)
        next(reports)
        backend.delays_s["load_report"] = 60.0
        assert backend.delayed.wait(WAIT_S), "the next report is being waited for"
        assert not backend.cancelled.is_set()
        reports.close()
        assert backend.cancelled.wait(WAIT_S)

    def test_it_outlasts_the_deadline_of_one_stream(self, client, monkeypatch):
        monkeypatch.setattr("cluster.service.client.WATCH_STREAM_S", 1.5)
        with closing(client.watch_load(0.5)) as reports:
            assert len(list(itertools.islice(reports, 5))) == 5

    def test_a_cluster_that_is_silent_is_not_waited_for_without_end(self, backend, client, monkeypatch):
        monkeypatch.setattr("cluster.service.client.WATCH_STREAM_S", 0.2)
        backend.delays_s["load_report"] = 60.0
        with pytest.raises(LinkTimeout):
            next(client.watch_load())

    def test_one_report_has_a_deadline_of_its_own(self, backend, client):
        with closing(client.watch_load()) as reports:
            next(reports)
        assert 0 < backend.timeouts_s["load_report"] <= 10.0

    def test_it_survives_a_front_that_is_replaced(self):
        backend = MemoryBackend()
        with (
            running_front(backend) as front,
            Client(front.target) as client,
            closing(client.watch_load(0.2)) as reports,
        ):
            next(reports)
            run(front.stop(grace_s=0.0))
            with running_front(backend, FrontConfig(port=front.port)):
                finished(client)
                # Reports of the first front may still be unread.
                assert next(report for report in itertools.islice(reports, 20) if report.version == 3)

    @pytest.mark.parametrize("interval_s", [0.1, 0.0, math.nan, 61.0])
    def test_the_interval_is_checked_before_it_is_sent(self, client, interval_s):
        with pytest.raises(InvalidInput, match="interval_s"):
            client.watch_load(interval_s)


class TestRebalance:
    @pytest.fixture
    def uneven(self, backend, client):
        """Steps are committed in which expert-1 gets three times the load of expert-0."""
        backend.placement = Placement(1, (("expert-0",), ("expert-1",), ("expert-1",), ("expert-0",)), 1)
        finished(client)

    def test_the_plan_crosses_whole_and_a_dry_run_changes_nothing(self, backend, client, uneven):
        before = client.status()
        plan = client.rebalance(dry_run=True)
        assert plan == run(backend.rebalance(dry_run=True, timeout_s=1.0))
        assert plan.moves == (
            GroupMove(1, "expert-1", "expert-0", GROUP_BYTES, "move"),
            GroupMove(0, "expert-0", "expert-1", GROUP_BYTES, "move"),
        )
        assert (plan.balance_before, plan.balance_after) == (pytest.approx(100 / 150), pytest.approx(100 / 110))
        assert (plan.placement_epoch, plan.done, plan.message, plan.stall_s) == (1, False, "", 0.0)
        assert client.status() == before

    def test_it_carries_out_what_the_dry_run_promised(self, client, uneven):
        plan = client.rebalance(dry_run=True)
        done = client.rebalance()
        assert (done.moves, done.balance_after) == (plan.moves, plan.balance_after)
        assert (done.done, done.placement_epoch, done.stall_s) == (True, 2, STALL_S)
        after = client.status()
        assert after.owners == {0: "expert-1", 1: "expert-0", 2: "expert-1", 3: "expert-0"}
        assert after.placement_epoch == 2

    def test_an_even_cluster_says_why_nothing_is_moved(self, client, uneven):
        client.rebalance()
        again = client.rebalance()
        assert (again.moves, again.done, again.placement_epoch) == ((), False, 2)
        assert again.balance_after == again.balance_before
        assert again.message

    def test_what_cannot_be_had_is_said(self, backend, client, uneven):
        backend.unmet = ("redundancy 2 of group 1: the expert actors are on 1 node", "another")
        assert client.rebalance(dry_run=True).unmet == backend.unmet

    def test_it_is_refused_before_any_load_and_while_another_runs(self, backend, client):
        with pytest.raises(FailedPrecondition, match="no training step"):
            client.rebalance(dry_run=True)
        backend.failures["rebalance"] = [FailedPrecondition("another rebalance runs")]
        with pytest.raises(FailedPrecondition, match="another rebalance runs"):
            client.rebalance()

    def test_it_is_given_as_long_as_a_model_unless_said_otherwise(self, backend, client, uneven):
        client.rebalance(dry_run=True)
        # gRPC rounds long deadlines up, to three digits
        assert backend.timeouts_s["rebalance"] == pytest.approx(MODEL_TIMEOUT_S, rel=0.01)
        client.rebalance(dry_run=True, timeout_s=40.0)
        assert 20.0 < backend.timeouts_s["rebalance"] < 41.0


@pytest.fixture
def quick_looks(monkeypatch):
    """Watches of operations look at them more often than is good for a cluster."""
    monkeypatch.setattr("cluster.service.cluster.LOOK_S", 0.01)


@pytest.mark.usefixtures("quick_looks")
class TestScale:
    def test_it_starts_at_once_and_is_watched_to_its_end(self, client):
        started = client.scale(2, request_id="first")
        assert (started.state, started.kind, started.target) == (OperationState.RUNNING, "scale_experts", 2)
        assert (started.request_id, started.ended_s, started.progress) == ("first", None, 0.0)
        changes = list(client.watch_operation(started.id))
        assert [change.progress for change in changes] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert changes[1].message == "prepared 50% of the groups"
        done = changes[-1]
        assert (done.state, done.prepare_s, done.stall_s) == (OperationState.SUCCEEDED, PREPARE_S, STALL_S)
        assert done.created_s <= done.ended_s
        assert done == client.operation(started.id)
        assert client.status().owners == {0: "expert-0", 1: "expert-1", 2: "expert-0", 3: "expert-1"}

    def test_it_is_idempotent_by_request_id(self, client):
        first = client.scale(2, request_id="same")
        assert client.scale(2, request_id="same").id == first.id
        assert [operation.id for operation in client.operations()] == [first.id]
        with pytest.raises(AlreadyExists, match="same"):
            client.scale(3, request_id="same")

    def test_a_lost_answer_does_not_start_a_second_one(self):
        class LosesFirstAnswer(MemoryBackend):
            async def scale(self, actors, *, request_id, timeout_s):
                operation = await super().scale(actors, request_id=request_id, timeout_s=timeout_s)
                if self.failures.setdefault("answered", [Unavailable("the coordinator restarts")]):
                    raise self.failures["answered"].pop()
                return operation

        with running_front(LosesFirstAnswer()) as front, Client(front.target) as client:
            operation = client.scale(2)
            assert [found.id for found in client.operations()] == [operation.id]

    def test_one_at_a_time_and_the_refusal_names_the_other(self, backend, client):
        backend.is_stuck = True
        running = client.scale(2)
        with pytest.raises(FailedPrecondition, match=running.id):
            client.scale(3)

    def test_operations_are_listed_newest_first_and_cross_whole(self, backend, client):
        assert client.operations() == []
        for actors in (2, 3):
            list(client.watch_operation(client.scale(actors).id))
        found = client.operations()
        assert [operation.target for operation in found] == [3, 2]
        assert found == run(backend.operations(timeout_s=1.0))

    def test_cancel_ends_it(self, backend, client):
        backend.is_stuck = True
        operation = client.scale(2)
        with closing(client.watch_operation(operation.id)) as changes:
            assert next(changes).state is OperationState.RUNNING
            assert client.cancel_operation(operation.id).state is OperationState.CANCELLING
            assert client.cancel_operation(operation.id).state is OperationState.CANCELLING
            assert next(changes).state is OperationState.CANCELLING
            backend.is_stuck = False
            assert [change.state for change in changes] == [OperationState.CANCELLED]
        with pytest.raises(FailedPrecondition, match="is cancelled"):
            client.cancel_operation(operation.id)

    def test_a_failure_is_an_end_with_its_reason(self, client):
        operation = client.scale(5)
        failed = list(client.watch_operation(operation.id))[-1]
        assert (failed.state, failed.error) == (OperationState.FAILED, "4 expert groups are too few for 5 actors")

    def test_unknown_operations(self, client):
        for call in (client.operation, client.cancel_operation, lambda unknown: list(client.watch_operation(unknown))):
            with pytest.raises(NotFound, match="operation-99"):
                call("operation-99")

    @pytest.mark.parametrize(("actors", "request_id"), [(0, "r"), (2**31, "r"), (2, ""), (2, "x" * 129)])
    def test_it_is_checked_before_it_is_sent(self, backend, client, actors, request_id):
        with pytest.raises(InvalidInput, match="actors" if request_id == "r" else "request_id"):
            client.scale(actors, request_id=request_id)
        assert "scale" not in backend.timeouts_s

    def test_a_refusal_of_the_cluster_keeps_the_field_to_blame(self, backend, client):
        backend.failures["scale"] = [InvalidInput("is above 8", field="actors", value=9, remedy="use 8 or fewer")]
        with pytest.raises(InvalidInput, match="above 8") as caught:
            client.scale(9)
        assert (caught.value.field, caught.value.remedy) == ("actors", "use 8 or fewer")

    def test_what_is_left_of_the_deadline_is_passed_on(self, backend, client):
        client.scale(2, timeout_s=40.0)
        assert 20.0 < backend.timeouts_s["scale"] < 41.0


class TestGrow:
    def test_it_starts_at_once_and_is_idempotent_by_request_id(self, backend, client):
        growth = Growth(16, "fresh", 0.5, 3, 20)
        started = client.grow(growth, request_id="same", timeout_s=40.0)
        assert 20.0 < backend.timeouts_s["grow"] < 41.0
        assert (started.state, started.kind, started.target) == (OperationState.RUNNING, "grow_model", 16)
        assert client.grow(growth, request_id="same").id == started.id
        assert backend.growths[0] == growth
        with pytest.raises(AlreadyExists, match="same"):
            client.grow(Growth(32), request_id="same")

    def test_one_at_a_time_whatever_the_kind(self, backend, client):
        backend.is_stuck = True
        running = client.scale(2)
        with pytest.raises(FailedPrecondition, match=running.id):
            client.grow(Growth(16))

    @pytest.mark.parametrize(
        ("growth", "field"),
        [
            (Growth(0), "num_experts"),
            (Growth(16, "twice"), "mode"),
            (Growth(16, perturbation=1.0), "perturbation"),
            (Growth(16, seed=-1), "seed"),
            (Growth(16, open_steps=0), "open_steps"),
        ],
    )
    def test_it_is_checked_before_it_is_sent(self, backend, client, growth, field):
        with pytest.raises(InvalidInput) as caught:
            client.grow(growth)
        assert caught.value.field == field
        assert not backend.growths


@pytest.mark.usefixtures("quick_looks")
class TestDrain:
    def test_it_goes_on_by_itself_to_its_end(self, backend, client):
        operation = client.drain("node-1", 20.0)
        assert (operation.kind, operation.node, operation.target) == ("drain_node", "node-1", 0)
        *_, ended = client.watch_operation(operation.id)
        assert ended.state is OperationState.SUCCEEDED
        assert client.operations() == run(backend.operations(timeout_s=1.0))
        assert backend.timeouts_s["drain.deadline"] == 20.0
        (entry,) = client.ledger().entries
        assert (entry.kind, entry.subject) == ("drain", "node-1")

    def test_it_is_idempotent_by_request_id(self, client):
        first = client.drain("node-1", request_id="same")
        assert client.drain("node-1", 5.0, request_id="same").id == first.id
        with pytest.raises(AlreadyExists, match="drain_node node-1"):
            client.drain("node-0", request_id="same")
        with pytest.raises(AlreadyExists, match="drain_node node-1"):
            client.scale(2, request_id="same")

    def test_one_at_a_time_and_the_refusal_names_the_other(self, backend, client):
        backend.is_stuck = True
        client.drain("node-1")
        with pytest.raises(FailedPrecondition, match="drain_node node-1"):
            client.scale(3)

    def test_an_unknown_node_is_named_with_those_there_are(self, client):
        with pytest.raises(InvalidInput, match=r"node-7.*node-0.*node-1") as caught:
            client.drain("node-7")
        assert caught.value.field == "node"

    @pytest.mark.parametrize(
        ("node", "deadline_s", "request_id", "field"),
        [
            ("", 1.0, "r", "node"),
            ("n" * 129, 1.0, "r", "node"),
            ("node-1", 0.0, "r", "deadline_s"),
            ("node-1", 86_401.0, "r", "deadline_s"),
            ("node-1", float("nan"), "r", "deadline_s"),
            ("node-1", 1.0, "", "request_id"),
        ],
    )
    def test_it_is_checked_before_it_is_sent(self, backend, client, node, deadline_s, request_id, field):
        with pytest.raises(InvalidInput) as caught:
            client.drain(node, deadline_s, request_id=request_id)
        assert caught.value.field == field
        assert "drain" not in backend.timeouts_s


@pytest.mark.usefixtures("quick_looks")
class TestWatchOperation:
    def test_what_has_ended_is_shown_once(self, client):
        operation = client.scale(2)
        list(client.watch_operation(operation.id))
        assert list(client.watch_operation(operation.id)) == [client.operation(operation.id)]

    def test_it_is_silent_while_nothing_changes_and_outlasts_the_deadline_of_one_stream(self, backend, monkeypatch):
        """Two streams in which nothing changes, and one that is as long as it takes."""
        monkeypatch.setattr("cluster.service.client.WATCH_STREAM_S", 2.0)
        backend.is_stuck = True
        with running_front(backend) as front, Client(front.target) as client:
            watch, deadlines_s = client._cluster.WatchOperation, []

            def open_stream(request, timeout):
                deadlines_s.append(timeout)
                if len(deadlines_s) <= 2:
                    return watch(request, timeout=timeout)
                until(lambda: not front._interceptor._watches)  # what they still looked at would be shown to nobody
                backend.is_stuck = False
                return watch(request, timeout=WAIT_S)

            monkeypatch.setattr(client._cluster, "WatchOperation", open_stream)
            changes = list(client.watch_operation(client.scale(2).id))
        assert [change.progress for change in changes] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
        assert deadlines_s == [2.0, 2.0, 2.0]

    def test_one_look_has_a_deadline_of_its_own(self, backend, client):
        list(client.watch_operation(client.scale(2).id))
        assert 0 < backend.timeouts_s["operation"] <= 10.0

    def test_leaving_ends_it_in_the_backend_too(self, backend, client):
        backend.is_stuck = True
        changes = client.watch_operation(client.scale(2).id)
        next(changes)
        backend.delays_s["operation"] = 60.0
        assert backend.delayed.wait(WAIT_S), "the next look is being waited for"
        assert not backend.cancelled.is_set()
        changes.close()
        assert backend.cancelled.wait(WAIT_S)

    def test_it_survives_a_front_that_is_replaced(self):
        backend = MemoryBackend()
        backend.is_stuck = True
        with running_front(backend) as front, Client(front.target) as client:
            changes = client.watch_operation(client.scale(2).id)
            assert next(changes).progress == 0.0
            run(front.stop(grace_s=0.0))
            with running_front(backend, FrontConfig(port=front.port)):
                backend.is_stuck = False
                assert [change.progress for change in changes] == [0.25, 0.5, 0.75, 1.0, 1.0]


class TestLedger:
    @pytest.fixture
    def disturbed(self, backend):
        backend.costs.close(backend.costs.open("actor_death", "expert-0", 100.0, detected_s=100.5), 103.0)
        backend.costs.close(backend.costs.open("actor_death", "expert-1", 110.0, detected_s=110.1), 111.0)
        backend.costs.open("node_death", "node-1", 120.0, detected_s=121.0, message="no answer")
        backend.costs.add(3, stall_s=0.25, steps_replayed=2, tokens_recomputed=4096, requests_delayed=1)

    def test_before_anything_happened_it_is_empty(self, client):
        report = client.ledger()
        assert (report.entries, report.summary) == ((), {})

    def test_entries_cross_whole_and_are_summed_up_by_kind(self, backend, client, disturbed):
        report = client.ledger()
        assert report.entries == run(backend.ledger(0, timeout_s=1.0))
        assert report.entries[2].recovered_s is None
        assert report.summary == {"actor_death": Summary(2, 0, 2.0, 3.0), "node_death": Summary(1, 1, None, None)}

    def test_it_begins_after_the_given_entry(self, client, disturbed):
        report = client.ledger(after=2)
        assert [entry.number for entry in report.entries] == [3]
        assert report.summary == {"node_death": Summary(1, 1, None, None)}
        assert client.ledger(after=3).entries == ()

    def test_a_change_of_size_is_in_it(self, client, quick_looks):
        list(client.watch_operation(client.scale(2).id))
        (entry,) = client.ledger().entries
        assert (entry.kind, entry.subject, entry.stall_s) == ("scale_up", "2 experts", STALL_S)
        assert entry.detection_s is None

    def test_the_number_is_checked_before_it_is_sent(self, client):
        with pytest.raises(InvalidInput, match="after_entry"):
            client.ledger(after=-1)


class TestCheckpoints:
    def test_before_one_is_written_there_is_none(self, client):
        assert client.checkpoints() == []

    def test_they_cross_whole_newest_first(self, backend, client):
        first = client.save_checkpoint()
        finished(client)
        second = client.save_checkpoint()
        assert (first.version, second.version) == (0, 3)
        assert client.checkpoints() == backend.saved == [second, first]

    def test_no_room_is_told_as_such(self, backend, client):
        backend.failures["save_checkpoint"] = [StorageFull("no room for a checkpoint")]
        with pytest.raises(StorageFull, match="no room"):
            client.save_checkpoint()

    def test_writing_is_given_as_long_as_a_model_is(self, backend, client):
        client.save_checkpoint()
        assert backend.timeouts_s["save_checkpoint"] == pytest.approx(MODEL_TIMEOUT_S, rel=0.01)


class TestPins:
    def test_a_pinned_version_answers_while_the_newest_goes_on(self, backend, client):
        pin = client.pin_version("prod", 60.0)
        assert (pin.name, pin.version, pin.expires_s - pin.created_s) == ("prod", 0, 60.0)
        finished(client)
        assert client.status().pins == (pin,)
        for choice, version in ((VersionChoice(), 3), (VersionChoice(pinned=0), 0), (VersionChoice(pin="prod"), 0)):
            assert client.score("abc", choice).version == version
            assert client.embed("abc", choice).version == version
            assert {c.version for c in client.generate("ab", SamplingParams(max_tokens=2), choice)} == {version}

    def test_one_that_is_gone_says_which_are_there(self, client):
        client.pin_version("prod")
        client.unpin_version("prod")
        client.pin_version("test")
        for choice in (VersionChoice(pinned=7), VersionChoice(pin="prod")):
            with pytest.raises(VersionGone, match="there are test"):
                client.score("abc", choice)
            with pytest.raises(VersionGone, match="there are test"):
                list(client.generate("ab", choice=choice))

    def test_too_many_and_unknown_ones(self, client):
        for name in ("a", "b"):
            client.pin_version(name)
        with pytest.raises(FailedPrecondition, match=r"router\.max_pins"):
            client.pin_version("c")
        with pytest.raises(NotFound):
            client.unpin_version("c")
        with pytest.raises(InvalidInput, match="name"):
            client.pin_version("not a name")

    def test_a_name_keeps_its_version(self, client):
        first = client.pin_version()
        assert client.pin_version() == first
        client.pin_version("prod")
        finished(client)
        with pytest.raises(AlreadyExists, match="prod keeps version 0"):
            client.pin_version("prod")


class TestDeadlines:
    def test_a_late_call_ends_in_time_and_in_the_backend_too(self, backend, client):
        client.status()  # connects
        backend.delays_s["score"] = 60.0
        with pytest.raises(LinkTimeout, match=r"127\.0\.0\.1"):
            client.score("abc", timeout_s=2.0)
        assert backend.cancelled.wait(WAIT_S)

    def test_what_is_left_is_passed_on(self, backend, client):
        client.score("abc", timeout_s=40.0)
        assert 20.0 < backend.timeouts_s["score"] < 41.0  # deadlines cross the wire on another clock


class TestFailures:
    @pytest.mark.parametrize(
        ("raised", "seen"),
        [
            (NotFound("no model"), NotFound),
            (ResourceExhausted("16 streams"), ResourceExhausted),
            (Unavailable("restarting"), Unavailable),
            (StepAborted("again"), StepAborted),
            (PeerLost("gone", peer="expert-3"), Unavailable),
            (RuntimeError("bug"), RemoteError),
        ],
        ids=lambda value: getattr(value, "__name__", type(value).__name__),
    )
    def test_errors_of_the_backend(self, backend, client, raised, seen):
        backend.failures["score"] = [raised]
        with pytest.raises(seen) as caught:
            client.score("abc")
        assert type(caught.value) is seen
        assert client.score("abc").token_ids

    def test_what_is_inside_stays_inside(self, backend, client, caplog):
        backend.failures["score"] = [RuntimeError("/secret/path"), PeerLost("gone", peer="10.0.0.7:999")]
        for _ in range(2):
            with pytest.raises((RemoteError, Unavailable)) as caught:
                client.score("abc")
            assert "secret" not in str(caught.value)
            assert "10.0.0.7" not in str(caught.value)
        assert "RuntimeError: /secret/path" in caplog.text
        assert "10.0.0.7" in caplog.text

    def test_a_long_text_with_bytes_that_are_no_text_still_arrives(self, backend, client):
        backend.failures["score"] = [FailedPrecondition("\udce4" + "漢字" * 20_000)]
        with pytest.raises(FailedPrecondition, match="漢字"):
            client.score("abc")

    @pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
    def test_the_client_checks_before_it_sends(self, client, value):
        with pytest.raises(InvalidInput, match="temperature"):
            client.generate("a", SamplingParams(temperature=value))
        with pytest.raises(InvalidInput, match=r"optimizer\.lr"):
            client.submit_job(JobConfig(optimizer=OptimizerConfig(lr=value)))
        with pytest.raises(InvalidInput, match="request_id"):
            client.submit_job(QUICK, request_id="x" * 129)
