"""InferenceService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from cluster.backend import Backend
from cluster.service.call import closing, remaining_s
from cluster.service.codec import text
from cluster.service.metrics.calls import CallMetrics
from protos.moecluster.v1 import inference_pb2 as pb
from protos.moecluster.v1 import inference_pb2_grpc


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, backend: Backend, metrics: CallMetrics) -> None:
        self._backend, self._metrics = backend, metrics

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        prompt = text.prompt_from_message(request.prompt)
        params = text.params_from_message(request.params)
        async with closing(self._backend.generate(prompt, params, timeout_s=remaining_s())) as chunks:
            async for chunk in self._metrics.timed(chunks):
                yield text.chunk_to_message(chunk)

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        prompt = text.prompt_from_message(request.prompt)
        return text.score_to_message(await self._backend.score(prompt, timeout_s=remaining_s()))

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        prompt = text.prompt_from_message(request.prompt)
        return text.embed_to_message(await self._backend.embed(prompt, timeout_s=remaining_s()))
