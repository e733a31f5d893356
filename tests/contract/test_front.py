"""What the front promises about the wire: limits, malformed bytes, health, reflection, starting and ending."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.errors import InvalidInput
from cluster.backend import JobState, SamplingParams
from cluster.config import FrontConfig, JobConfig
from cluster.errors import PortInUse, ResourceExhausted
from cluster.service import interceptors
from cluster.service.client import Client
from cluster.service.server import ALIVE, MAX_METADATA_BYTES, SERVICES, Front
from protos.moecluster.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from tests.fakes.backend import MemoryBackend
from tests.fakes.front import WAIT_S, run, running_front, until

Code = grpc.StatusCode
METHODS = [
    (f"/{service.full_name}/{method.name}", method)
    for module in (cluster_pb2, inference_pb2, training_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
BY_NAME = pytest.mark.parametrize(("path", "method"), METHODS, ids=[path for path, _ in METHODS])
ENDLESS = "/moecluster.v1.ClusterService/WatchLoad"
GARBAGE = b"\x0a\xff\xff\xff"


@pytest.fixture(scope="module")
def backend():
    return MemoryBackend()


@pytest.fixture(scope="module")
def front(backend):
    with running_front(backend) as front:
        yield front


@pytest.fixture(scope="module")
def channel(front):
    with grpc.insecure_channel(front.target) as channel:
        yield channel


def send_bytes(channel, path, method, data, timeout_s=WAIT_S) -> grpc.StatusCode:
    """Sends `data` as it is; the status that came back."""
    try:
        if method.server_streaming:
            responses = channel.unary_stream(path)(data, timeout=timeout_s)
            list(itertools.islice(responses, 1 if path == ENDLESS else None))
            responses.cancel()
        else:
            channel.unary_unary(path)(data, timeout=timeout_s)
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def details(error: grpc.RpcError) -> dict[str, object]:
    found = {}
    for packed in rpc_status.from_call(error).details:
        for cls in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.BadRequest,
            error_details_pb2.RetryInfo,
            error_details_pb2.RequestInfo,
        ):
            if packed.Is(cls.DESCRIPTOR):
                found[cls.__name__] = cls.FromString(packed.value)
    return found


class TestBytes:
    def test_every_method_is_listed(self):
        assert len(METHODS) == 27

    @BY_NAME
    def test_what_is_no_message_is_the_callers_mistake(self, channel, path, method):
        assert send_bytes(channel, path, method, GARBAGE) is Code.INVALID_ARGUMENT

    @BY_NAME
    @settings(
        max_examples=40,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(data=st.binary(max_size=64))
    def test_no_bytes_make_the_front_fail(self, channel, path, method, data):
        assert send_bytes(channel, path, method, data) not in (Code.UNKNOWN, Code.INTERNAL, Code.UNAVAILABLE)

    @pytest.mark.parametrize(
        "path", ["/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
    )
    def test_health_and_reflection_too(self, channel, path):
        call = channel.stream_stream(path)(iter([GARBAGE]), timeout=WAIT_S)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is Code.INVALID_ARGUMENT

    def test_a_method_that_does_not_exist(self, channel):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/moecluster.v1.TrainingService/Nothing")(b"", timeout=WAIT_S)
        assert caught.value.code() is Code.UNIMPLEMENTED


class TestRefusals:
    """Messages that are well-formed and wrong. Raw stubs, so that the front is what refuses."""

    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (inference_pb2.GenerateRequest(), "prompt"),
            (inference_pb2.GenerateRequest(prompt={"text": ""}), "prompt.text"),
            (inference_pb2.GenerateRequest(prompt={"token_ids": {}}), "number of prompt.token_ids"),
            (inference_pb2.GenerateRequest(prompt={"token_ids": {"ids": [1, -1]}}), "prompt.token_ids[1]"),
            (
                inference_pb2.GenerateRequest(prompt={"text": "a"}, params={"temperature": float("nan")}),
                "params.temperature",
            ),
            (inference_pb2.GenerateRequest(prompt={"text": "a"}, params={"top_p": 0.0}), "params.top_p"),
            (inference_pb2.GenerateRequest(prompt={"text": "a"}, params={"max_tokens": 0}), "params.max_tokens"),
            (inference_pb2.GenerateRequest(prompt={"text": "a"}, params={"seed": -1}), "params.seed"),
            (inference_pb2.GenerateRequest(prompt={"text": "a"}, params={"stop": [""]}), "params.stop[0]"),
            (inference_pb2.GenerateRequest(prompt={"text": "a"}, params={"stop": ["x"] * 17}), "params.stop"),
        ],
    )
    def test_generate(self, channel, request_, field):
        with pytest.raises(grpc.RpcError) as caught:
            list(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request_, timeout=WAIT_S))
        self.check(caught.value, field)

    @pytest.mark.parametrize(
        ("config", "field"),
        [
            ({"steps": -1}, "config.steps"),
            ({"steps": 2**62}, "config.steps"),
            ({"batch": {"sequences": 0}}, "config.batch.sequences"),
            ({"batch": {"sequences": 2**20, "sequence_length": 2**20}}, "config.batch"),
            ({"optimizer": {"lr": float("inf")}}, "config.optimizer.lr"),
            ({"optimizer": {"beta2": 1.0}}, "config.optimizer.beta2"),
            ({"optimizer": {"name": 77}}, "config.optimizer.name"),
            ({"steps": 5, "schedule": {"warmup_steps": 6}}, "config.schedule.warmup_steps"),
            ({"data": {"source": ""}}, "config.data.source"),
            ({"data": {"source": "path:\0"}}, "config.data.source"),
        ],
    )
    def test_submit(self, channel, config, field):
        request = training_pb2.SubmitJobRequest(request_id="a", config=config)
        with pytest.raises(grpc.RpcError) as caught:
            training_pb2_grpc.TrainingServiceStub(channel).SubmitJob(request, timeout=WAIT_S)
        self.check(caught.value, field)

    @pytest.mark.parametrize("request_id", ["", "x" * 129, "a b", "a\n"])
    def test_request_ids(self, channel, request_id):
        request = training_pb2.SubmitJobRequest(request_id=request_id)
        with pytest.raises(grpc.RpcError) as caught:
            training_pb2_grpc.TrainingServiceStub(channel).SubmitJob(request, timeout=WAIT_S)
        self.check(caught.value, "request_id")

    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (training_pb2.ListJobsRequest(page_size=-1), "page_size"),
            (training_pb2.ListJobsRequest(page_size=1001), "page_size"),
            (training_pb2.ListJobsRequest(page_token="made up"), "page_token"),
        ],
    )
    def test_pages(self, channel, request_, field):
        with pytest.raises(grpc.RpcError) as caught:
            training_pb2_grpc.TrainingServiceStub(channel).ListJobs(request_, timeout=WAIT_S)
        self.check(caught.value, field)

    @pytest.mark.parametrize("interval_s", [0.0, 0.1, -1.0, 61.0, float("nan")])
    def test_watch_load(self, channel, interval_s):
        request = cluster_pb2.WatchLoadRequest(interval_s=interval_s)
        with pytest.raises(grpc.RpcError) as caught:
            next(cluster_pb2_grpc.ClusterServiceStub(channel).WatchLoad(request, timeout=WAIT_S))
        self.check(caught.value, "interval_s")

    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (cluster_pb2.ScaleExpertsRequest(request_id="a"), "actors"),
            (cluster_pb2.ScaleExpertsRequest(request_id="a", actors=-1), "actors"),
            (cluster_pb2.ScaleExpertsRequest(actors=1), "request_id"),
            (cluster_pb2.ScaleExpertsRequest(actors=1, request_id="a b"), "request_id"),
            (cluster_pb2.DrainNodeRequest(request_id="a"), "node"),
            (cluster_pb2.DrainNodeRequest(request_id="a", node="n", deadline_s=-1.0), "deadline_s"),
            (cluster_pb2.DrainNodeRequest(node="n"), "request_id"),
            (cluster_pb2.GrowModelRequest(request_id="a"), "num_experts"),
            (cluster_pb2.GrowModelRequest(num_experts=8), "request_id"),
            (cluster_pb2.GrowModelRequest(num_experts=8, request_id="a", perturbation=float("nan")), "perturbation"),
            (cluster_pb2.GrowModelRequest(num_experts=8, request_id="a", mode=7), "mode"),  # type: ignore[arg-type]
            (cluster_pb2.GetOperationRequest(), "operation_id"),
            (cluster_pb2.CancelOperationRequest(operation_id="a\n"), "operation_id"),
            (cluster_pb2.GetLedgerRequest(after_entry=-1), "after_entry"),
        ],
    )
    def test_operations_and_ledger(self, channel, request_, field):
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            getattr(stub, type(request_).__name__.removesuffix("Request"))(request_, timeout=WAIT_S)
        self.check(caught.value, field)

    def test_watch_operation(self, channel):
        request = cluster_pb2.WatchOperationRequest(operation_id="")
        with pytest.raises(grpc.RpcError) as caught:
            next(cluster_pb2_grpc.ClusterServiceStub(channel).WatchOperation(request, timeout=WAIT_S))
        self.check(caught.value, "operation_id")

    @staticmethod
    def check(error: grpc.RpcError, field: str) -> None:
        assert error.code() is Code.INVALID_ARGUMENT
        found = details(error)
        assert found["ErrorInfo"].reason in ("INVALID_INPUT", "CONFIG_ERROR")
        assert found["BadRequest"].field_violations[0].field == field
        assert found["RequestInfo"].request_id


class TestLimits:
    def test_messages_up_to_the_limit_and_not_beyond(self):
        config = FrontConfig(port=0, max_receive_bytes=64 << 10)
        with running_front(MemoryBackend(), config) as front, grpc.insecure_channel(front.target) as channel:
            score = inference_pb2_grpc.InferenceServiceStub(channel).Score
            request = inference_pb2.ScoreRequest(prompt={"text": "a" * (config.max_receive_bytes - 8)})
            assert request.ByteSize() == config.max_receive_bytes
            assert len(score(request, timeout=WAIT_S).token_ids) == len(request.prompt.text)
            request.prompt.text += "a"
            with pytest.raises(grpc.RpcError) as caught:
                score(request, timeout=WAIT_S)
            assert caught.value.code() is Code.RESOURCE_EXHAUSTED
            assert score(inference_pb2.ScoreRequest(prompt={"text": "a"}), timeout=WAIT_S).token_ids == [97]

    def test_metadata_beyond_the_limit(self, channel):
        score = inference_pb2_grpc.InferenceServiceStub(channel).Score
        request = inference_pb2.ScoreRequest(prompt={"text": "a"})
        with pytest.raises(grpc.RpcError) as caught:
            score(request, timeout=WAIT_S, metadata=[("x-large", "a" * MAX_METADATA_BYTES)])
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        assert score(request, timeout=WAIT_S).token_ids == [97]

    def test_the_stated_limit(self):
        assert FrontConfig().max_receive_bytes == 16 * 1024 * 1024

    def test_calls_beyond_the_limit_are_refused_and_health_still_answers(self):
        backend = MemoryBackend(token_s=0.01)
        config = FrontConfig(port=0, max_concurrent_rpcs=1)
        with running_front(backend, config) as front, Client(front.target) as client:
            client.wait_ready(WAIT_S)
            chunks = client.generate("a", SamplingParams(max_tokens=100_000))
            next(chunks)
            with pytest.raises(ResourceExhausted, match="1 calls"):
                client.status()
            client.wait_ready(WAIT_S)
            chunks.close()
            assert backend.generation_closed.wait(WAIT_S)
            assert client.score("a").token_ids

    def test_a_call_without_deadline_gets_one(self, backend, channel):
        inference_pb2_grpc.InferenceServiceStub(channel).Score(inference_pb2.ScoreRequest(prompt={"text": "a"}))
        assert interceptors.DEFAULT_DEADLINE_S / 2 < backend.timeouts_s["score"] <= interceptors.DEFAULT_DEADLINE_S

    def test_the_deadline_it_gets_is_kept(self, monkeypatch):
        path = "/moecluster.v1.InferenceService/Score"
        monkeypatch.setitem(interceptors.DEFAULT_DEADLINES_S, path, 0.1)
        backend = MemoryBackend()
        backend.delays_s["score"] = 60.0
        with running_front(backend) as front, grpc.insecure_channel(front.target) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                inference_pb2_grpc.InferenceServiceStub(channel).Score(inference_pb2.ScoreRequest(prompt={"text": "a"}))
            assert caught.value.code() is Code.DEADLINE_EXCEEDED
            assert details(caught.value)["ErrorInfo"].reason == "DEADLINE_EXCEEDED"
            assert backend.cancelled.wait(WAIT_S)


class TestRequestId:
    @pytest.mark.parametrize(("sent", "kept"), [("trace-1", True), ("two words", False), ("x" * 129, False)])
    def test_it_is_the_callers_if_it_is_fit_for_a_log_line(self, channel, sent, kept):
        score = inference_pb2_grpc.InferenceServiceStub(channel).Score
        request = inference_pb2.ScoreRequest(prompt={"text": "a"})
        _, call = score.with_call(request, timeout=WAIT_S, metadata=[("x-request-id", sent)])
        answered = dict(call.trailing_metadata())["x-request-id"]
        assert (answered == sent) is kept
        assert kept or uuid.UUID(answered)

    def test_errors_and_the_log_carry_it(self, channel, caplog):
        caplog.set_level("INFO", logger="cluster.service.interceptors")
        request = training_pb2.GetJobRequest(job_id="nobody")
        with pytest.raises(grpc.RpcError) as caught:
            training_pb2_grpc.TrainingServiceStub(channel).GetJob(
                request, timeout=WAIT_S, metadata=[("x-request-id", "trace-2")]
            )
        assert caught.value.code() is Code.NOT_FOUND
        assert details(caught.value)["RequestInfo"].request_id == "trace-2"
        # The line is written after the answer is sent.
        until(lambda: "/moecluster.v1.TrainingService/GetJob NOT_FOUND" in caplog.text)
        assert "trace-2" in caplog.text


class TestHealth:
    def test_it_follows_the_backend(self):
        backend = MemoryBackend(ready=False)
        with running_front(backend) as front, grpc.insecure_channel(front.target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", *SERVICES):
                assert self.check(health, service) == health_pb2.HealthCheckResponse.NOT_SERVING
            assert self.check(health, ALIVE) == health_pb2.HealthCheckResponse.SERVING
            statuses = health.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]), timeout=WAIT_S)
            assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
            backend.ready = True
            assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
            backend.failures["status"] = [RuntimeError("broken")] * 3
            assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING

    def test_services_that_do_not_exist(self, channel):
        with pytest.raises(grpc.RpcError) as caught:
            self.check(health_pb2_grpc.HealthStub(channel), "nothing")
        assert caught.value.code() is Code.NOT_FOUND

    def test_stopping_says_so_first_and_lets_running_calls_end(self):
        backend = MemoryBackend(token_s=0.005)
        with running_front(backend) as front, Client(front.target) as client, ThreadPoolExecutor(1) as pool:
            client.wait_ready(WAIT_S)
            with grpc.insecure_channel(front.target) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                statuses = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
                assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
                chunks = client.generate("ab", SamplingParams(max_tokens=100))
                next(chunks)
                stopped = pool.submit(run, front.stop(grace_s=WAIT_S))
                assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
                statuses.cancel()
                assert len(list(chunks)) == 99
                stopped.result(WAIT_S)

    def test_a_watcher_that_leaves_does_not_silence_the_others(self):
        with (
            running_front(MemoryBackend()) as front,
            grpc.insecure_channel(front.target) as channel,
            ThreadPoolExecutor(1) as pool,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            watches = [health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S) for _ in range(3)]
            for statuses in watches:
                while next(statuses).status != health_pb2.HealthCheckResponse.SERVING:
                    pass
            watches[0].cancel()
            deadline = time.monotonic() + WAIT_S
            while front._health._watching[""] > 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert front._health._watching[""] == 2
            stopped = pool.submit(run, front.stop(grace_s=WAIT_S))
            assert [next(statuses).status for statuses in watches[1:]] == [
                health_pb2.HealthCheckResponse.NOT_SERVING
            ] * 2
            for statuses in watches[1:]:
                statuses.cancel()
            assert stopped.result(WAIT_S) is None

    def test_a_watch_does_not_hold_up_stopping(self):
        backend = MemoryBackend(step_s=60.0)
        with running_front(backend) as front, grpc.insecure_channel(front.target) as channel:
            with Client(front.target) as client:
                job = client.submit_job(JobConfig(steps=2))
            stub = training_pb2_grpc.TrainingServiceStub(channel)
            events = stub.WatchJob(training_pb2.WatchJobRequest(job_id=job.id), timeout=30.0)
            while next(events).event.state != training_pb2.JOB_STATE_RUNNING:
                pass
            run(front.stop(grace_s=30.0))
            with pytest.raises(grpc.RpcError) as caught:
                next(events)
            assert caught.value.code() is Code.UNAVAILABLE
            assert details(caught.value)["RetryInfo"].retry_delay.ToMilliseconds() > 0
            assert run(backend.get_job(job.id, timeout_s=1.0)).state is JobState.RUNNING

    def test_nor_does_a_watch_of_an_operation(self):
        backend = MemoryBackend()
        backend.is_stuck = True
        with running_front(backend) as front, grpc.insecure_channel(front.target) as channel:
            with Client(front.target) as client:
                operation = client.scale(2)
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)
            changes = stub.WatchOperation(cluster_pb2.WatchOperationRequest(operation_id=operation.id), timeout=30.0)
            assert next(changes).operation.state == cluster_pb2.OPERATION_STATE_RUNNING
            run(front.stop(grace_s=30.0))
            with pytest.raises(grpc.RpcError) as caught:
                next(changes)
            assert caught.value.code() is Code.UNAVAILABLE
            assert not run(backend.operation(operation.id, timeout_s=1.0)).state.is_final

    def test_no_status_before_the_message_that_is_being_sent(self):
        order = []

        class Context:
            async def write(self, response):
                order.append("begun")
                await asyncio.sleep(0.05)
                order.append("written")

        async def behaviour(request, context):
            yield "message"

        async def ended_in_the_middle():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await interceptors._stream(behaviour, "request", Context())
            order.append("status")

        run(ended_in_the_middle())
        assert order == ["begun", "written", "status"]

    def test_nor_does_a_watch_of_the_load(self):
        with running_front(MemoryBackend()) as front, grpc.insecure_channel(front.target) as channel:
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)
            reports = stub.WatchLoad(cluster_pb2.WatchLoadRequest(interval_s=60.0), timeout=30.0)
            next(reports)
            run(front.stop(grace_s=30.0))
            with pytest.raises(grpc.RpcError) as caught:
                next(reports)
            assert caught.value.code() is Code.UNAVAILABLE

    @staticmethod
    def check(health, service: str) -> int:
        return health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S).status


class TestListening:
    def test_reflection_names_every_service(self, channel):
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert names == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        assert len(SERVICES) == 3

    def test_a_taken_port(self, front):
        with pytest.raises(PortInUse, match=rf"{front.port} is taken.*front\.port"):
            run(Front(MemoryBackend(), FrontConfig(port=front.port)).start())

    def test_an_address_of_another_machine(self):
        with pytest.raises(InvalidInput, match=r"192\.0\.2\.1"):
            run(Front(MemoryBackend(), FrontConfig(host="192.0.2.1", port=0)).start())

    def test_wait_returns_after_stop_and_stop_may_be_repeated(self):
        with running_front(MemoryBackend()) as front, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(run, front.wait())
            assert not waiting.done()
            run(front.stop(grace_s=0.0))
            waiting.result(WAIT_S)
            run(front.stop(grace_s=0.0))
