"""What every actor process tells with its vitals beside its work, and what the coordinator makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray

from actors.gpu import gpu_use
from cluster.backend import GpuUse, LinkUse
from cluster.fabric.options import ZONE_LABEL

if TYPE_CHECKING:
    from actors.transport.contract import Link


class Measures:
    """In the actor: the zone of its node, what crossed its links, how its GPU is used."""

    def __init__(self, device: str) -> None:
        from actors.transport.meter import Meter

        self._device, self._meter = device, Meter()
        self._zone = str(ray.get_runtime_context().get_node_labels().get(ZONE_LABEL, ""))

    def opened(self, link: Link) -> Link:
        """Counts it from now on. -> the same link."""
        return self._meter.watch(link)

    def told(self) -> dict[str, Any]:
        """Plain values for `status_fields`."""
        traffic = {kind: asdict(traffic) for kind, traffic in self._meter.totals().items()}
        return {"zone": self._zone, "traffic": traffic, "gpu": gpu_use(self._device)}


def status_fields(vitals: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ActorStatus` that come from `Measures`, and the queue of a router."""
    return {
        "zone": vitals.get("zone", ""),
        "link_use": tuple(
            LinkUse(kind, traffic["bytes_sent"], traffic["bytes_received"], traffic["wait_s"])
            for kind, traffic in vitals.get("traffic", {}).items()
        ),
        "gpu": GpuUse(**vitals["gpu"]) if vitals.get("gpu") else None,
        "num_waiting": int(vitals.get("num_waiting", 0)),
        "queue_s": float(vitals.get("queue_s", 0.0)),
    }
