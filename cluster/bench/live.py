"""What benchmarks ask of a running cluster."""

from __future__ import annotations

from actors.transport.socket import SocketLink
from cluster.config import ClusterConfig
from cluster.fabric.contacts import ExpertContact
from cluster.fabric.launch import RunningCluster
from cluster.fabric.workertools import payload_settings


def link_to(contact: ExpertContact, running: RunningCluster, config: ClusterConfig, timeout_s: float) -> SocketLink:
    """As a router has one to this expert actor."""
    return SocketLink(
        contact.name,
        contact.address,
        name="bench",
        max_bytes=config.links.max_message_bytes,
        timeout_s=timeout_s,
        keys=running.link_keys(),
        payload=payload_settings(config, config.router.device),
    )
