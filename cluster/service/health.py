"""grpc.health.v1, with watchers that do not depend on each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

from grpc_health.v1 import health, health_pb2


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc,name-defined]  # newer than the stubs
    """grpcio-health-checking 1.81 lets all watchers of a service share a condition and forgets it when the first of
    them leaves: the others are never told again. Here it is kept until the last has left."""

    def __init__(self) -> None:
        super().__init__()
        self._watching: Counter[str] = Counter()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        name = request.service
        condition = self._server_watchers[name]
        self._watching[name] += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watching[name] -= 1
            if self._watching[name]:
                self._server_watchers[name] = condition
            else:
                del self._watching[name]
                self._server_watchers.pop(name, None)
