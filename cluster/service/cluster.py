"""ClusterService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from cluster.backend import Backend, LedgerReport, Operation
from cluster.control.ledger import summed_up
from cluster.service.call import remaining_s
from cluster.service.codec import checkpoints, checks, ledger, loads, moves, operations, status
from protos.moecluster.v1 import cluster_pb2 as pb
from protos.moecluster.v1 import cluster_pb2_grpc

REPORT_TIMEOUT_S = 10.0
"""For one report of a watch, whose own deadline is far away."""
LOOK_S = 0.2
"""Between two looks of a watch at an operation."""


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

    async def ScaleExperts(self, request: pb.ScaleExpertsRequest, context: Any) -> pb.ScaleExpertsResponse:
        operations.check_scale(request.actors, request.request_id)
        operation = await self._backend.scale(request.actors, request_id=request.request_id, timeout_s=remaining_s())
        return pb.ScaleExpertsResponse(operation=operations.operation_to_message(operation))

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Any) -> pb.DrainNodeResponse:
        node, deadline_s = operations.drain_from_message(request)
        operation = await self._backend.drain(node, deadline_s, request_id=request.request_id, timeout_s=remaining_s())
        return pb.DrainNodeResponse(operation=operations.operation_to_message(operation))

    async def GrowModel(self, request: pb.GrowModelRequest, context: Any) -> pb.GrowModelResponse:
        growth = operations.growth_from_message(request)
        operation = await self._backend.grow(growth, request_id=request.request_id, timeout_s=remaining_s())
        return pb.GrowModelResponse(operation=operations.operation_to_message(operation))

    async def ScaleRouters(self, request: pb.ScaleRoutersRequest, context: Any) -> pb.ScaleRoutersResponse:
        operations.check_scale(request.routers, request.request_id, "routers")
        operation = await self._backend.scale_routers(
            request.routers, request_id=request.request_id, timeout_s=remaining_s()
        )
        return pb.ScaleRoutersResponse(operation=operations.operation_to_message(operation))

    async def GetOperation(self, request: pb.GetOperationRequest, context: Any) -> pb.GetOperationResponse:
        checks.identifier("operation_id", request.operation_id)
        operation = await self._backend.operation(request.operation_id, timeout_s=remaining_s())
        return pb.GetOperationResponse(operation=operations.operation_to_message(operation))

    async def ListOperations(self, request: pb.ListOperationsRequest, context: Any) -> pb.ListOperationsResponse:
        found = await self._backend.operations(timeout_s=remaining_s())
        return pb.ListOperationsResponse(operations=map(operations.operation_to_message, found))

    async def WatchOperation(
        self, request: pb.WatchOperationRequest, context: Any
    ) -> AsyncIterator[pb.WatchOperationResponse]:
        checks.identifier("operation_id", request.operation_id)
        shown: Operation | None = None
        while shown is None or not shown.state.is_final:
            if shown is not None:
                await asyncio.sleep(LOOK_S)
            timeout_s = min(REPORT_TIMEOUT_S, remaining_s())
            operation = await self._backend.operation(request.operation_id, timeout_s=timeout_s)
            if operation != shown:
                yield pb.WatchOperationResponse(operation=operations.operation_to_message(operation))
            shown = operation

    async def CancelOperation(self, request: pb.CancelOperationRequest, context: Any) -> pb.CancelOperationResponse:
        checks.identifier("operation_id", request.operation_id)
        operation = await self._backend.cancel_operation(request.operation_id, timeout_s=remaining_s())
        return pb.CancelOperationResponse(operation=operations.operation_to_message(operation))

    async def GetLedger(self, request: pb.GetLedgerRequest, context: Any) -> pb.GetLedgerResponse:
        ledger.check_after_entry(request.after_entry)
        entries = await self._backend.ledger(request.after_entry, timeout_s=remaining_s())
        return ledger.report_to_message(LedgerReport(tuple(entries), summed_up(entries)))

    async def SaveCheckpoint(self, request: pb.SaveCheckpointRequest, context: Any) -> pb.SaveCheckpointResponse:
        saved = await self._backend.save_checkpoint(timeout_s=remaining_s())
        return pb.SaveCheckpointResponse(checkpoint=checkpoints.checkpoint_to_message(saved))

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Any) -> pb.ListCheckpointsResponse:
        found = await self._backend.checkpoints(timeout_s=remaining_s())
        return pb.ListCheckpointsResponse(checkpoints=map(checkpoints.checkpoint_to_message, found))

    async def ExportModel(self, request: pb.ExportModelRequest, context: Any) -> pb.ExportModelResponse:
        checks.path("path", request.path)
        return status.directory_to_message(await self._backend.export_model(request.path, timeout_s=remaining_s()))

    async def ImportModel(self, request: pb.ImportModelRequest, context: Any) -> pb.ImportModelResponse:
        checks.path("path", request.path)
        after = await self._backend.import_model(request.path, timeout_s=remaining_s())
        return pb.ImportModelResponse(status=status.status_to_message(after))
