"""The `Backend` of the front over Ray: control calls to the coordinator, tokens straight from the router."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from actors.errors import InvalidInput, MoeClusterError
from actors.values import Growth, Sampling, TokenEvent
from cluster.backend import (
    Checkpoint,
    ClusterStatus,
    EmbedResult,
    GenerateChunk,
    Job,
    JobEvent,
    LoadReport,
    ModelDirectory,
    Operation,
    Prompt,
    Rebalance,
    SamplingParams,
    ScoreResult,
)
from cluster.config import JobConfig, ModelConfig
from cluster.control.ledger import Entry
from cluster.errors import Unavailable
from cluster.fabric.calls import acall, translated
from cluster.fabric.options import COORDINATOR, ROUTER
from cluster.fabric.reach import Reach
from cluster.jobs.tokenizer import Tokenizer, load_tokenizer
from cluster.serving import TextStream

PATIENCE_S = 10.0
"""For a coordinator that is coming back; who asks is then told to try again."""
AGAIN_S = 0.2


class RayBackend:
    """Handles only: any number of fronts may hold one, and none keeps state."""

    def __init__(self, control: Any, router: Any, model: ModelConfig) -> None:
        self._control = control
        self._reach = Reach(control, router)
        self._tokenizer: Tokenizer = load_tokenizer(model)

    async def submit_job(self, config: JobConfig, *, request_id: str, timeout_s: float) -> Job:
        job: Job = await self._of_coordinator(lambda control: control.submit.remote(config, request_id), timeout_s)
        return job

    async def get_job(self, job_id: str, *, timeout_s: float) -> Job:
        job: Job = await self._of_coordinator(lambda control: control.job.remote(job_id), timeout_s)
        return job

    async def list_jobs(self, *, timeout_s: float) -> Sequence[Job]:
        jobs: Sequence[Job] = await self._of_coordinator(lambda control: control.jobs.remote(), timeout_s)
        return jobs

    async def cancel_job(self, job_id: str, *, timeout_s: float) -> Job:
        job: Job = await self._of_coordinator(lambda control: control.cancel.remote(job_id), timeout_s)
        return job

    async def job_events(
        self, job_id: str, *, after: int, max_events: int, wait_s: float
    ) -> tuple[Sequence[JobEvent], Job]:
        found: tuple[Sequence[JobEvent], Job] = await self._of_coordinator(
            lambda control: control.job_events.remote(job_id, after, max_events, wait_s), wait_s + 10
        )
        return found

    async def generate(
        self, prompt: Prompt, params: SamplingParams, *, timeout_s: float
    ) -> AsyncIterator[GenerateChunk]:
        deadline = time.monotonic() + timeout_s
        ids = self._ids(prompt)
        text = TextStream(self._tokenizer, params.stop, num_prompt_tokens=len(ids))
        tokens = self._tokens(ids, Sampling(params.max_tokens, params.temperature, params.top_p, params.seed), deadline)
        async with aclosing(tokens):
            async for event in tokens:
                chunk = text.push(event)
                yield chunk
                if chunk.finish_reason:
                    return

    async def _tokens(self, prompt: list[int], sampling: Sampling, deadline: float) -> AsyncGenerator[TokenEvent]:
        """When the router dies, or every holder of an expert group, the stream goes on from its prompt and its tokens
        so far as soon as that is mended."""
        so_far: list[int] = []
        while True:
            left = replace(sampling, max_tokens=sampling.max_tokens - len(so_far))
            try:
                async with aclosing(self._session([*prompt, *so_far], left, deadline)) as events:
                    async for event in events:
                        so_far.append(event.token)
                        yield event
                return
            except MoeClusterError as error:
                await self._reach.after(error, deadline)

    async def _session(self, prompt: list[int], sampling: Sampling, deadline: float) -> AsyncGenerator[TokenEvent]:
        """One session of one router."""
        session = uuid.uuid4().hex
        with self._reach.router() as router:
            stream = router.generate.remote(session, prompt, sampling, deadline - time.monotonic())
            try:
                async with aclosing(_events(stream, deadline)) as events:
                    async for event in events:
                        yield event
            finally:
                with suppress(MoeClusterError), translated(ROUTER):
                    router.end_session.remote(session)

    async def score(self, prompt: Prompt, *, timeout_s: float) -> ScoreResult:
        ids = self._ids(prompt)
        logprobs, version = await self._ask(lambda router: router.score.remote(ids), timeout_s)
        return ScoreResult(tuple(ids), tuple(logprobs), version)

    async def embed(self, prompt: Prompt, *, timeout_s: float) -> EmbedResult:
        ids = self._ids(prompt)
        embedding, version = await self._ask(lambda router: router.embed.remote(ids), timeout_s)
        return EmbedResult(tuple(embedding), len(ids), version)

    async def _ask(self, ask: Callable[[Any], Any], timeout_s: float) -> Any:
        """Of a router; again when it dies, or the experts that it needs."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with self._reach.router() as router:
                    return await acall(ROUTER, ask(router), deadline - time.monotonic())
            except MoeClusterError as error:
                await self._reach.after(error, deadline)

    async def status(self, *, timeout_s: float) -> ClusterStatus:
        status: ClusterStatus = await self._of_coordinator(lambda control: control.status.remote(), timeout_s)
        return status

    async def load_report(self, *, timeout_s: float) -> LoadReport:
        report: LoadReport = await self._of_coordinator(lambda control: control.load_report.remote(), timeout_s)
        return report

    async def rebalance(self, *, dry_run: bool, timeout_s: float) -> Rebalance:
        result: Rebalance = await acall(COORDINATOR, self._control.rebalance.remote(dry_run, timeout_s), timeout_s)
        return result

    async def scale(self, actors: int, *, request_id: str, timeout_s: float) -> Operation:
        operation: Operation = await self._of_coordinator(
            lambda control: control.scale.remote(actors, request_id), timeout_s
        )
        return operation

    async def drain(self, node: str, deadline_s: float, *, request_id: str, timeout_s: float) -> Operation:
        operation: Operation = await self._of_coordinator(
            lambda control: control.drain.remote(node, deadline_s, request_id), timeout_s
        )
        return operation

    async def grow(self, growth: Growth, *, request_id: str, timeout_s: float) -> Operation:
        operation: Operation = await self._of_coordinator(
            lambda control: control.grow.remote(growth, request_id), timeout_s
        )
        return operation

    async def scale_routers(self, routers: int, *, request_id: str, timeout_s: float) -> Operation:
        operation: Operation = await self._of_coordinator(
            lambda control: control.scale_routers.remote(routers, request_id), timeout_s
        )
        return operation

    async def operation(self, operation_id: str, *, timeout_s: float) -> Operation:
        operation: Operation = await self._of_coordinator(
            lambda control: control.operation.remote(operation_id), timeout_s
        )
        return operation

    async def operations(self, *, timeout_s: float) -> Sequence[Operation]:
        operations: Sequence[Operation] = await self._of_coordinator(
            lambda control: control.operations.remote(), timeout_s
        )
        return operations

    async def cancel_operation(self, operation_id: str, *, timeout_s: float) -> Operation:
        operation: Operation = await self._of_coordinator(
            lambda control: control.cancel_operation.remote(operation_id), timeout_s
        )
        return operation

    async def ledger(self, after: int, *, timeout_s: float) -> Sequence[Entry]:
        entries: Sequence[Entry] = await self._of_coordinator(lambda control: control.ledger.remote(after), timeout_s)
        return entries

    async def save_checkpoint(self, *, timeout_s: float) -> Checkpoint:
        saved: Checkpoint = await acall(COORDINATOR, self._control.save_checkpoint.remote(timeout_s), timeout_s)
        return saved

    async def checkpoints(self, *, timeout_s: float) -> Sequence[Checkpoint]:
        found: Sequence[Checkpoint] = await self._of_coordinator(
            lambda control: control.checkpoints.remote(), timeout_s
        )
        return found

    async def export_model(self, path: str, *, timeout_s: float) -> ModelDirectory:
        result: ModelDirectory = await acall(COORDINATOR, self._control.export.remote(path, timeout_s), timeout_s)
        return result

    async def import_model(self, path: str, *, timeout_s: float) -> ClusterStatus:
        status: ClusterStatus = await acall(COORDINATOR, self._control.import_model.remote(path, timeout_s), timeout_s)
        return status

    async def _of_coordinator(self, ask: Callable[[Any], Any], timeout_s: float) -> Any:
        """What may be asked twice: a coordinator that has died is awaited for a while."""
        now = time.monotonic()
        deadline, patient_until = now + timeout_s, now + min(PATIENCE_S, 0.9 * timeout_s)
        while True:
            try:
                return await acall(COORDINATOR, ask(self._control), deadline - time.monotonic())
            except Unavailable:
                if time.monotonic() + AGAIN_S > patient_until:
                    raise
                await asyncio.sleep(AGAIN_S)

    def _ids(self, prompt: Prompt) -> list[int]:
        ids = list(prompt.token_ids) if prompt.token_ids is not None else self._tokenizer.encode(prompt.text or "")
        if not ids:
            raise InvalidInput("holds no token", field="prompt", remedy="send at least one character")
        return ids


async def _events(stream: Any, deadline: float) -> AsyncGenerator[TokenEvent]:
    """Tokens of a Ray streaming generator until the deadline."""
    iterator = aiter(stream)
    while True:
        with translated(ROUTER):
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    ref = await anext(iterator)
            except StopAsyncIteration:
                return
            event: TokenEvent = await ref
        yield event
