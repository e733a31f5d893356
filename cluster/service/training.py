"""TrainingService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from cluster.backend import Backend
from cluster.service.call import remaining_s
from cluster.service.codec import checks, config, jobs
from protos.moecluster.v1 import training_pb2 as pb
from protos.moecluster.v1 import training_pb2_grpc

MAX_EVENTS = 256
"""Events fetched from the backend at once."""
WAIT_S = 10.0
"""How long one look for new events may wait; a watch looks again until its deadline."""


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def SubmitJob(self, request: pb.SubmitJobRequest, context: Any) -> pb.SubmitJobResponse:
        checks.identifier("request_id", request.request_id)
        job_config = config.job_config_from_caller(request.config)
        job = await self._backend.submit_job(job_config, request_id=request.request_id, timeout_s=remaining_s())
        return pb.SubmitJobResponse(job=jobs.job_to_message(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        checks.identifier("job_id", request.job_id)
        job = await self._backend.get_job(request.job_id, timeout_s=remaining_s())
        return pb.GetJobResponse(job=jobs.job_to_message(job))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        found = await self._backend.list_jobs(timeout_s=remaining_s())
        chosen, next_page_token = jobs.page(found, request.page_size, request.page_token)
        return pb.ListJobsResponse(jobs=map(jobs.job_to_message, chosen), next_page_token=next_page_token)

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        checks.identifier("job_id", request.job_id)
        job = await self._backend.cancel_job(request.job_id, timeout_s=remaining_s())
        return pb.CancelJobResponse(job=jobs.job_to_message(job))

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[pb.WatchJobResponse]:
        checks.identifier("job_id", request.job_id)
        job = await self._backend.get_job(request.job_id, timeout_s=remaining_s())
        after = request.after_event
        jobs.check_after_event(after, job.last_event)
        while not (job.state.is_final and after >= job.last_event):
            wait_s = min(WAIT_S, remaining_s())
            events, job = await self._backend.job_events(job.id, after=after, max_events=MAX_EVENTS, wait_s=wait_s)
            for event in events:
                yield pb.WatchJobResponse(event=jobs.event_to_message(event))
                after = event.number
