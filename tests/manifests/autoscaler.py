"""Ray's autoscaler over the groups of a RayCluster, in this process: Ray's own reading of the manifest and Ray's own
scheduler, with pods that are values here.

Pods come the moment that they are asked for; actors that wait for room get it as Ray gives it: where the resources are,
and the labels that they ask for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.core.generated.autoscaler_pb2 import NodeState, ResourceRequest, ResourceRequestByCount
from ray.core.generated.common_pb2 import LabelSelector, LabelSelectorConstraint, LabelSelectorOperator
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind

from cluster.fabric.options import NODE_ID_LABEL
from tests.manifests.kustomize import Manifest, ray_cluster

Options = Mapping[str, Any]
"""Of an actor, as `cluster.fabric.options` gives them to Ray."""


@dataclass
class Actor:
    options: Options

    @property
    def demand(self) -> dict[str, float]:
        counts = {"CPU": self.options["num_cpus"], "GPU": self.options["num_gpus"], **self.options["resources"]}
        return {name: float(amount) for name, amount in counts.items() if amount}

    @property
    def not_on(self) -> list[str]:
        """Ids of nodes."""
        text = self.options.get("label_selector", {}).get(NODE_ID_LABEL, "")
        found = re.fullmatch(r"!in\((.*)\)", text)
        return found[1].split(",") if found else []

    @property
    def request(self) -> ResourceRequest:
        if not self.not_on:
            return ResourceRequest(resources_bundle=self.demand)
        operator = LabelSelectorOperator.LABEL_OPERATOR_NOT_IN
        constraint = LabelSelectorConstraint(label_key=NODE_ID_LABEL, operator=operator, label_values=self.not_on)
        return ResourceRequest(
            resources_bundle=self.demand, label_selectors=[LabelSelector(label_constraints=[constraint])]
        )


@dataclass
class Pod:
    node_id: str
    group: str
    resources: dict[str, float]
    labels: dict[str, str]
    actors: list[Actor] = field(default_factory=list)
    idle_s: float = 0.0

    @property
    def free(self) -> dict[str, float]:
        free = dict(self.resources)
        for actor in self.actors:
            for name, amount in actor.demand.items():
                free[name] -= amount
        return free

    def takes(self, actor: Actor) -> bool:
        has_room = all(self.free.get(name, 0.0) >= amount for name, amount in actor.demand.items())
        return has_room and self.node_id not in actor.not_on

    @property
    def instance(self) -> AutoscalerInstance:
        node = NodeState(
            node_id=self.node_id.encode(),
            ray_node_type_name=self.group,
            total_resources=self.resources,
            available_resources=self.free,
            labels={**self.labels, NODE_ID_LABEL: self.node_id},
            idle_duration_ms=int(self.idle_s * 1000),
        )
        instance = Instance(
            instance_id=self.node_id,
            node_id=self.node_id,
            instance_type=self.group,
            status=Instance.RAY_RUNNING,
            node_kind=NodeKind.WORKER,
        )
        return AutoscalerInstance(cloud_instance_id=self.node_id, ray_node=node, im_instance=instance)


class Autoscaler:
    def __init__(self, manifests: Sequence[Manifest]) -> None:
        values = _derive_autoscaling_config_from_ray_cr(copy.deepcopy(ray_cluster(manifests)))
        self._config = AutoscalingConfig(values, skip_content_hash=True)
        self._scheduler = ResourceDemandScheduler()
        self._numbers = count()
        self.pods: list[Pod] = []
        self.waiting: list[Actor] = []

    def turn(self, passed_s: float = 5.0) -> None:
        """Pods come and go as they are to, and actors start where there is room."""
        for pod in self.pods:
            pod.idle_s = 0.0 if pod.actors else pod.idle_s + passed_s
        self._start_actors()
        reply = self._reply()
        gone = {request.instance_id for request in reply.to_terminate}
        assert not any(pod.actors for pod in self.pods if pod.node_id in gone), "Ray ends idle nodes alone"
        self.pods = [pod for pod in self.pods if pod.node_id not in gone]
        for launch in reply.to_launch:
            self.pods += [self._pod(launch.instance_type) for _ in range(launch.count)]
        self._start_actors()

    def counts(self) -> dict[str, int]:
        """Pods of each group, those without any left out."""
        return {group: sum(p.group == group for p in self.pods) for group in sorted({p.group for p in self.pods})}

    def of(self, resource: str) -> list[Pod]:
        return [pod for pod in self.pods if any(resource in actor.demand for actor in pod.actors)]

    def _start_actors(self) -> None:
        waiting, self.waiting = self.waiting, []
        for actor in waiting:
            room = [pod for pod in self.pods if pod.takes(actor)]
            if room:
                min(room, key=lambda pod: len(pod.actors)).actors.append(actor)
            else:
                self.waiting.append(actor)

    def _reply(self) -> SchedulingReply:
        return self._scheduler.schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=self._config.get_node_type_configs(),
                max_num_nodes=self._config.get_max_num_nodes(),
                idle_timeout_s=self._config.get_idle_timeout_s(),
                resource_requests=[ResourceRequestByCount(request=a.request, count=1) for a in self.waiting],
                current_instances=[pod.instance for pod in self.pods],
            )
        )

    def _pod(self, group: str) -> Pod:
        config = self._config.get_node_type_configs()[group]
        return Pod(f"node{next(self._numbers)}", group, dict(config.resources), dict(config.labels))
