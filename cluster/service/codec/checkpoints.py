"""Checkpoints as they are listed."""

from __future__ import annotations

from cluster.backend import Checkpoint
from cluster.service.codec import times
from protos.moecluster.v1 import cluster_pb2 as pb


def checkpoint_to_message(checkpoint: Checkpoint) -> pb.Checkpoint:
    return pb.Checkpoint(
        version=checkpoint.version,
        create_time=times.to_message(checkpoint.created_s),
        url=checkpoint.url,
        size_bytes=checkpoint.size_bytes,
        job_id=checkpoint.job_id,
        job_step=checkpoint.job_step,
    )


def checkpoint_from_message(message: pb.Checkpoint) -> Checkpoint:
    return Checkpoint(
        version=message.version,
        created_s=times.from_message(message.create_time),
        url=message.url,
        size_bytes=message.size_bytes,
        job_id=message.job_id,
        job_step=message.job_step,
    )
