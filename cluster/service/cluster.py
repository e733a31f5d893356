"""ClusterService."""

from __future__ import annotations

from typing import Any

from cluster.backend import Backend
from cluster.service.call import remaining_s
from cluster.service.codec import checks, status
from protos.moecluster.v1 import cluster_pb2 as pb
from protos.moecluster.v1 import cluster_pb2_grpc


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(
            status=status.status_to_message(await self._backend.status(timeout_s=remaining_s()))
        )

    async def ExportModel(self, request: pb.ExportModelRequest, context: Any) -> pb.ExportModelResponse:
        checks.path("path", request.path)
        return status.directory_to_message(await self._backend.export_model(request.path, timeout_s=remaining_s()))

    async def ImportModel(self, request: pb.ImportModelRequest, context: Any) -> pb.ImportModelResponse:
        checks.path("path", request.path)
        after = await self._backend.import_model(request.path, timeout_s=remaining_s())
        return pb.ImportModelResponse(status=status.status_to_message(after))
