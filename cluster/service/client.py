"""A small synchronous client: plain values in and out, a deadline on every call, errors of our own tree."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator
from contextlib import closing
from types import TracebackType
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from actors.errors import LinkTimeout
from actors.values import Growth
from cluster.backend import (
    Checkpoint,
    ClusterStatus,
    EmbedResult,
    GenerateChunk,
    Job,
    JobEvent,
    LedgerReport,
    LoadReport,
    ModelDirectory,
    Operation,
    Prompt,
    Rebalance,
    SamplingParams,
    ScoreResult,
)
from cluster.config import JobConfig
from cluster.service import errors
from cluster.service.access import Access, open_channel
from cluster.service.codec import checkpoints, checks, config, jobs, ledger, loads, moves, operations, status, text
from protos.moecluster.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

Answer = TypeVar("Answer")

WATCH_STREAM_S = 600.0
"""Deadline of one stream of a watch; a watch that lasts longer goes on in the next."""
MODEL_TIMEOUT_S = 1800.0
MAX_DELAY_S = 2.0
_TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_metadata_size", 64 << 10),
    # A cluster is reached directly; proxies named in the environment are for the web.
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # also the time that an attempt to connect is given
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


class Client:
    """Talks to the front at `target` (host:port). `timeout_s` holds for every call that is given none of its own.
    `access`: for a front with TLS or tokens; `InvalidInput` if a file of it cannot be used.

    Only calls that may be repeated are: `submit_job`, `scale`, `scale_routers`, `drain` and `grow`, thanks to their
    request ids, `watch_job`, which resumes after the last event it saw, `watch_load` and `watch_operation`. All give up
    after `max_retries` failures in a row.
    """

    def __init__(
        self, target: str, *, timeout_s: float = 30.0, max_retries: int = 5, access: Access | None = None
    ) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._channel = open_channel(target, access or Access(), _OPTIONS)
        self._training = training_pb2_grpc.TrainingServiceStub(self._channel)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    # Training

    def submit_job(self, job: JobConfig, *, request_id: str | None = None, timeout_s: float | None = None) -> Job:
        """`request_id` (default: a fresh one) names the job for good: the same id and config give the same job."""
        request_id = request_id if request_id is not None else str(uuid.uuid4())
        checks.identifier("request_id", request_id)
        config.check_job_config(job)
        request = training_pb2.SubmitJobRequest(request_id=request_id, config=config.job_config_to_message(job))
        deadline_s = time.monotonic() + self._or_default(timeout_s)

        def submit() -> Job:
            left_s = max(0.0, deadline_s - time.monotonic())
            return jobs.job_from_message(self._training.SubmitJob(request, timeout=left_s).job)

        return self._repeated(submit, deadline_s)

    def get_job(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        request = training_pb2.GetJobRequest(job_id=job_id)
        return jobs.job_from_message(self._unary(self._training.GetJob, request, timeout_s).job)

    def list_jobs(
        self, *, limit: int | None = None, page_size: int = jobs.DEFAULT_PAGE_SIZE, timeout_s: float | None = None
    ) -> list[Job]:
        """Newest first, at most `limit`; fetched page by page."""
        found: list[Job] = []
        token = ""
        while True:
            size = page_size if limit is None else min(page_size, limit - len(found))
            request = training_pb2.ListJobsRequest(page_size=size, page_token=token)
            response = self._unary(self._training.ListJobs, request, timeout_s)
            found.extend(map(jobs.job_from_message, response.jobs))
            token = response.next_page_token
            if not token or (limit is not None and len(found) >= limit):
                return found

    def cancel_job(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        request = training_pb2.CancelJobRequest(job_id=job_id)
        return jobs.job_from_message(self._unary(self._training.CancelJob, request, timeout_s).job)

    def watch_job(self, job_id: str, *, after: int = 0) -> Generator[JobEvent, None, None]:
        """Events above `after`, each once, until the job is final; survives fronts that come and go."""
        jobs.check_after_event(after)

        def resume() -> Any:
            request = training_pb2.WatchJobRequest(job_id=job_id, after_event=after)
            return self._training.WatchJob(request, timeout=WATCH_STREAM_S)

        with closing(self._watched(resume, may_be_silent=True)) as responses:
            for response in responses:
                event = jobs.event_from_message(response.event)
                after = event.number
                yield event

    # Inference

    def generate(
        self, prompt: Prompt | str, params: SamplingParams | None = None, *, timeout_s: float | None = None
    ) -> Generator[GenerateChunk, None, None]:
        """Starts at the first `next`; closing the iterator ends the generation. `timeout_s` holds for all of it."""
        request = inference_pb2.GenerateRequest(
            prompt=text.prompt_to_message(_prompt(prompt)), params=text.params_to_message(params or SamplingParams())
        )
        return self._chunks(request, self._or_default(timeout_s))

    def score(self, prompt: Prompt | str, *, timeout_s: float | None = None) -> ScoreResult:
        request = inference_pb2.ScoreRequest(prompt=text.prompt_to_message(_prompt(prompt)))
        return text.score_from_message(self._unary(self._inference.Score, request, timeout_s))

    def embed(self, prompt: Prompt | str, *, timeout_s: float | None = None) -> EmbedResult:
        request = inference_pb2.EmbedRequest(prompt=text.prompt_to_message(_prompt(prompt)))
        return text.embed_from_message(self._unary(self._inference.Embed, request, timeout_s))

    # Cluster

    def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        response = self._unary(self._cluster.GetStatus, cluster_pb2.GetStatusRequest(), timeout_s)
        return status.status_from_message(response.status)

    def load(self, *, timeout_s: float | None = None) -> LoadReport:
        response = self._unary(self._cluster.GetLoad, cluster_pb2.GetLoadRequest(), timeout_s)
        return loads.report_from_message(response.report)

    def watch_load(self, interval_s: float = loads.DEFAULT_INTERVAL_S) -> Generator[LoadReport, None, None]:
        """A report at once and every `interval_s`, without end; survives fronts that come and go."""
        return self._reports(loads.interval_to_message(interval_s))

    def rebalance(self, *, dry_run: bool = False, timeout_s: float | None = None) -> Rebalance:
        """As groups may travel, it is given as long as a model is unless `timeout_s` says otherwise."""
        request = cluster_pb2.RebalanceRequest(dry_run=dry_run)
        limit_s = MODEL_TIMEOUT_S if timeout_s is None else timeout_s
        return moves.rebalance_from_message(self._unary(self._cluster.Rebalance, request, limit_s))

    def scale(self, actors: int, *, request_id: str | None = None, timeout_s: float | None = None) -> Operation:
        """Starts it: see `watch_operation`. The same `request_id` (default: a fresh one) and number of expert actors
        give the same operation."""
        request_id = request_id if request_id is not None else str(uuid.uuid4())
        operations.check_scale(actors, request_id)
        request = cluster_pb2.ScaleExpertsRequest(actors=actors, request_id=request_id)
        return self._started(self._cluster.ScaleExperts, request, timeout_s)

    def drain(
        self,
        node: str,
        deadline_s: float = operations.DEFAULT_DEADLINE_S,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Operation:
        """Starts it: see `watch_operation`. The node is to be empty within `deadline_s`, `timeout_s` is that of the
        call. The same `request_id` (default: a fresh one) and node give the same operation."""
        request_id = request_id if request_id is not None else str(uuid.uuid4())
        request = operations.drain_to_message(node, deadline_s, request_id)
        return self._started(self._cluster.DrainNode, request, timeout_s)

    def grow(self, growth: Growth, *, request_id: str | None = None, timeout_s: float | None = None) -> Operation:
        """Starts it: see `watch_operation`. The same `request_id` (default: a fresh one) and number of experts give the
        same operation."""
        request = operations.growth_to_message(growth, request_id if request_id is not None else str(uuid.uuid4()))
        return self._started(self._cluster.GrowModel, request, timeout_s)

    def scale_routers(
        self, routers: int, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> Operation:
        """As `scale`."""
        request_id = request_id if request_id is not None else str(uuid.uuid4())
        operations.check_scale(routers, request_id, "routers")
        request = cluster_pb2.ScaleRoutersRequest(routers=routers, request_id=request_id)
        return self._started(self._cluster.ScaleRouters, request, timeout_s)

    def operation(self, operation_id: str, *, timeout_s: float | None = None) -> Operation:
        request = cluster_pb2.GetOperationRequest(operation_id=operation_id)
        return operations.operation_from_message(self._unary(self._cluster.GetOperation, request, timeout_s).operation)

    def operations(self, *, timeout_s: float | None = None) -> list[Operation]:
        """Newest first."""
        response = self._unary(self._cluster.ListOperations, cluster_pb2.ListOperationsRequest(), timeout_s)
        return list(map(operations.operation_from_message, response.operations))

    def cancel_operation(self, operation_id: str, *, timeout_s: float | None = None) -> Operation:
        request = cluster_pb2.CancelOperationRequest(operation_id=operation_id)
        response = self._unary(self._cluster.CancelOperation, request, timeout_s)
        return operations.operation_from_message(response.operation)

    def watch_operation(self, operation_id: str) -> Generator[Operation, None, None]:
        """As it is now, and whenever it changed, until it is final; survives fronts that come and go."""
        request = cluster_pb2.WatchOperationRequest(operation_id=operation_id)
        last: Operation | None = None
        streams = self._watched(
            lambda: self._cluster.WatchOperation(request, timeout=WATCH_STREAM_S), may_be_silent=False
        )
        with closing(streams) as responses:
            for response in responses:
                operation = operations.operation_from_message(response.operation)
                if operation != last:  # each stream begins with the operation as it is
                    yield operation
                last = operation

    def ledger(self, after: int = 0, *, timeout_s: float | None = None) -> LedgerReport:
        """Entries with a number above `after`; one that was given out before may have changed since."""
        ledger.check_after_entry(after)
        request = cluster_pb2.GetLedgerRequest(after_entry=after)
        return ledger.report_from_message(self._unary(self._cluster.GetLedger, request, timeout_s))

    def save_checkpoint(self, *, timeout_s: float = MODEL_TIMEOUT_S) -> Checkpoint:
        """Returns when it is written."""
        response = self._unary(self._cluster.SaveCheckpoint, cluster_pb2.SaveCheckpointRequest(), timeout_s)
        return checkpoints.checkpoint_from_message(response.checkpoint)

    def checkpoints(self, *, timeout_s: float | None = None) -> list[Checkpoint]:
        """Those that are kept, newest first."""
        response = self._unary(self._cluster.ListCheckpoints, cluster_pb2.ListCheckpointsRequest(), timeout_s)
        return list(map(checkpoints.checkpoint_from_message, response.checkpoints))

    def export_model(self, path: str, *, timeout_s: float = MODEL_TIMEOUT_S) -> ModelDirectory:
        request = cluster_pb2.ExportModelRequest(path=path)
        return status.directory_from_message(self._unary(self._cluster.ExportModel, request, timeout_s))

    def import_model(self, path: str, *, timeout_s: float = MODEL_TIMEOUT_S) -> ClusterStatus:
        request = cluster_pb2.ImportModelRequest(path=path)
        return status.status_from_message(self._unary(self._cluster.ImportModel, request, timeout_s).status)

    def wait_ready(self, timeout_s: float) -> None:
        """Returns when the front says SERVING; `LinkTimeout` if it does not in time."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            stream = self._health.Watch(health_pb2.HealthCheckRequest(), timeout=left_s, wait_for_ready=True)
            try:
                if any(response.status == health_pb2.HealthCheckResponse.SERVING for response in stream):
                    return
            except grpc.RpcError as error:
                if error.code() not in (*_TRANSIENT, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise self._translated(error) from error
            finally:
                stream.cancel()
            time.sleep(min(0.1, max(0.0, deadline_s - time.monotonic())))
        raise LinkTimeout(f"the cluster was not ready within {timeout_s:.3g} s", peer=self.target)

    def _started(self, method: Callable[..., Any], request: Any, timeout_s: float | None) -> Operation:
        """The operation of a request that may be repeated."""
        deadline_s = time.monotonic() + self._or_default(timeout_s)

        def start() -> Operation:
            left_s = max(0.0, deadline_s - time.monotonic())
            return operations.operation_from_message(method(request, timeout=left_s).operation)

        return self._repeated(start, deadline_s)

    def _unary(self, method: Callable[..., Any], request: Any, timeout_s: float | None) -> Any:
        try:
            return method(request, timeout=self._or_default(timeout_s))
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def _chunks(self, request: inference_pb2.GenerateRequest, timeout_s: float) -> Generator[GenerateChunk, None, None]:
        stream = self._inference.Generate(request, timeout=timeout_s)
        try:
            for response in stream:
                yield text.chunk_from_message(response)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        finally:
            stream.cancel()

    def _reports(self, request: cluster_pb2.WatchLoadRequest) -> Generator[LoadReport, None, None]:
        streams = self._watched(lambda: self._cluster.WatchLoad(request, timeout=WATCH_STREAM_S), may_be_silent=False)
        with closing(streams) as responses:
            for response in responses:
                yield loads.report_from_message(response.report)

    def _watched(self, open_stream: Callable[[], Any], *, may_be_silent: bool) -> Generator[Any, None, None]:
        """Responses of one stream after the other: the next one is opened when one breaks or its deadline passes.

        A stream that brought nothing until its deadline is a failure unless it `may_be_silent`.
        """
        failures = 0
        while True:
            stream, heard = open_stream(), may_be_silent
            try:
                for response in stream:
                    failures, heard = 0, True
                    yield response
                return
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and heard:
                    continue
                failures += 1
                if error.code() not in _TRANSIENT or failures > self._max_retries:
                    raise self._translated(error) from error
                time.sleep(_delay_s(failures, error))
            finally:
                stream.cancel()

    def _repeated(self, attempt: Callable[[], Answer], deadline_s: float) -> Answer:
        for failures in range(1, self._max_retries + 2):
            try:
                return attempt()
            except grpc.RpcError as error:
                delay_s = _delay_s(failures, error)
                late = time.monotonic() + delay_s > deadline_s
                if error.code() not in _TRANSIENT or failures > self._max_retries or late:
                    raise self._translated(error) from error
                time.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    def _translated(self, error: grpc.RpcError) -> Exception:
        return errors.from_rpc_error(error, self.target)

    def _or_default(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else timeout_s


def _prompt(prompt: Prompt | str) -> Prompt:
    return Prompt(text=prompt) if isinstance(prompt, str) else prompt


def _delay_s(failures: int, error: grpc.RpcError) -> float:
    backoff_s: float = 0.1 * 2 ** (failures - 1)
    return min(MAX_DELAY_S, max(backoff_s, errors.retry_after_s(error) or 0.0))
