"""ClusterService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from cluster.backend import Backend
from cluster.service.call import remaining_s
from cluster.service.codec import checks, loads, moves, status
from protos.moecluster.v1 import cluster_pb2 as pb
from protos.moecluster.v1 import cluster_pb2_grpc

REPORT_TIMEOUT_S = 10.0
"""For one report of a watch, whose own deadline is far away."""


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(
            status=status.status_to_message(await self._backend.status(timeout_s=remaining_s()))
        )

    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(
            report=loads.report_to_message(await self._backend.load_report(timeout_s=remaining_s()))
        )

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Any) -> AsyncIterator[pb.WatchLoadResponse]:
        interval_s = loads.interval_from_message(request)
        while True:  # until the caller leaves or its deadline passes: both end this coroutine from outside
            report = await self._backend.load_report(timeout_s=min(REPORT_TIMEOUT_S, remaining_s()))
            yield pb.WatchLoadResponse(report=loads.report_to_message(report))
            await asyncio.sleep(interval_s)

    async def Rebalance(self, request: pb.RebalanceRequest, context: Any) -> pb.RebalanceResponse:
        result = await self._backend.rebalance(dry_run=request.dry_run, timeout_s=remaining_s())
        return moves.rebalance_to_message(result)

    async def ExportModel(self, request: pb.ExportModelRequest, context: Any) -> pb.ExportModelResponse:
        checks.path("path", request.path)
        return status.directory_to_message(await self._backend.export_model(request.path, timeout_s=remaining_s()))

    async def ImportModel(self, request: pb.ImportModelRequest, context: Any) -> pb.ImportModelResponse:
        checks.path("path", request.path)
        after = await self._backend.import_model(request.path, timeout_s=remaining_s())
        return pb.ImportModelResponse(status=status.status_to_message(after))
