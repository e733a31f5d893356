"""The cluster's status, and model directories."""

from __future__ import annotations

from dataclasses import asdict, fields

from cluster.backend import ActorStatus, ClusterStatus, ExpertCache, GpuUse, LinkUse, ModelDirectory
from cluster.service.codec import enums
from protos.moecluster.v1 import cluster_pb2 as pb

_ROLES = pb.ActorRole.DESCRIPTOR
_STATES = pb.ActorState.DESCRIPTOR


def status_to_message(status: ClusterStatus) -> pb.ClusterStatus:
    return pb.ClusterStatus(
        model=status.model,
        num_parameters=status.num_parameters,
        num_experts=status.num_experts,
        num_moe_layers=status.num_moe_layers,
        top_k=status.top_k,
        version=status.version,
        placement_epoch=status.placement_epoch,
        owners=dict(status.owners),
        group_size=status.group_size,
        nodes=status.nodes,
        actors=[_actor_to_message(actor) for actor in status.actors],
        load=[pb.LayerLoad(tokens=load_E) for load_E in status.load_LE],
        jobs=dict(status.jobs),
        ready=status.ready,
        message=status.message,
        max_positions=status.max_positions,
        vocab_size=status.vocab_size,
        shared_share=status.shared_share,
        copies={group: pb.GroupCopies(actors=actors) for group, actors in status.copies.items()},
        staleness_mean=status.staleness_mean,
        staleness_max=status.staleness_max,
    )


def status_from_message(message: pb.ClusterStatus) -> ClusterStatus:
    return ClusterStatus(
        model=message.model,
        num_parameters=message.num_parameters,
        num_experts=message.num_experts,
        num_moe_layers=message.num_moe_layers,
        top_k=message.top_k,
        version=message.version,
        placement_epoch=message.placement_epoch,
        owners=dict(message.owners),
        group_size=message.group_size,
        nodes=tuple(message.nodes),
        actors=tuple(_actor_from_message(actor) for actor in message.actors),
        load_LE=tuple(tuple(layer.tokens) for layer in message.load),
        jobs=dict(message.jobs),
        ready=message.ready,
        message=message.message,
        max_positions=message.max_positions,
        vocab_size=message.vocab_size,
        shared_share=message.shared_share,
        copies={group: tuple(copies.actors) for group, copies in message.copies.items()},
        staleness_mean=message.staleness_mean,
        staleness_max=message.staleness_max,
    )


def directory_to_message(directory: ModelDirectory) -> pb.ExportModelResponse:
    return pb.ExportModelResponse(
        path=directory.path, files=directory.files, size_bytes=directory.size_bytes, version=directory.version
    )


def directory_from_message(message: pb.ExportModelResponse) -> ModelDirectory:
    return ModelDirectory(message.path, tuple(message.files), message.size_bytes, message.version)


def _actor_to_message(actor: ActorStatus) -> pb.ActorStatus:
    return pb.ActorStatus(
        id=actor.id,
        role=enums.to_number(_ROLES, actor.role),
        node=actor.node,
        pid=actor.pid,
        state=enums.to_number(_STATES, actor.state),
        device=actor.device,
        version=actor.version,
        groups=actor.groups,
        memory_bytes=actor.memory_bytes,
        tokens=actor.tokens,
        link=actor.link,
        cache=pb.ExpertCache(**asdict(actor.cache)) if actor.cache else None,
        zone=actor.zone,
        link_use=[pb.LinkUse(**asdict(use)) for use in actor.link_use],
        gpu=pb.GpuUse(**asdict(actor.gpu)) if actor.gpu else None,
        num_waiting=actor.num_waiting,
        queue_s=actor.queue_s,
        merged_updates=actor.merged_updates,
    )


def _actor_from_message(message: pb.ActorStatus) -> ActorStatus:
    return ActorStatus(
        id=message.id,
        role=enums.to_name(_ROLES, message.role),
        node=message.node,
        pid=message.pid,
        state=enums.to_name(_STATES, message.state),
        device=message.device,
        version=message.version,
        groups=tuple(message.groups),
        memory_bytes=message.memory_bytes,
        tokens=message.tokens,
        link=message.link,
        cache=_cache_from_message(message.cache) if message.HasField("cache") else None,
        zone=message.zone,
        link_use=tuple(LinkUse(use.kind, use.sent_bytes, use.received_bytes, use.wait_s) for use in message.link_use),
        gpu=_gpu_from_message(message.gpu) if message.HasField("gpu") else None,
        num_waiting=message.num_waiting,
        queue_s=message.queue_s,
        merged_updates=message.merged_updates,
    )


def _gpu_from_message(message: pb.GpuUse) -> GpuUse:
    busy_ratio = message.busy_ratio if message.HasField("busy_ratio") else None
    return GpuUse(message.used_bytes, message.total_bytes, message.allocated_bytes, busy_ratio)


def _cache_from_message(message: pb.ExpertCache) -> ExpertCache:
    return ExpertCache(**{field.name: getattr(message, field.name) for field in fields(ExpertCache)})
