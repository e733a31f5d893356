"""What the Ray edges of expert actors and routers share.

torch and transformers take seconds to import, so only the actors themselves do it, all at the same time: whoever starts
them imports these modules without. transformers is for routers; an expert actor imports it only where its groups come
from a model directory, at the start of a cluster.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from actors.errors import StepAborted
from actors.values import Address
from cluster.config import ClusterConfig
from cluster.fabric.options import thread_env

if TYPE_CHECKING:
    from actors.expert.updates import Brake
    from actors.snapshots import Key, Snapshot
    from actors.transport.contract import Link
    from actors.transport.curve import LinkKeys
    from actors.transport.payload.contract import PayloadSettings
    from cluster.checkpoint.memory import KeptDraft, Way


SLOW_UPDATES = "MOE_CLUSTER_SLOW_UPDATES_S"
"""In the environment of a whole cluster, for `moe-cluster chaos`: its expert actors wait so long before each update."""


def brake_of(environment: Mapping[str, str]) -> Brake:
    from actors.expert.updates import Brake

    return Brake(sleep_s=float(environment.get(SLOW_UPDATES) or 0.0))


@contextmanager
def _uncollected() -> Iterator[None]:
    """What is imported stays. Python's collector would go through it again and again meanwhile, a sixth of the time,
    and later with each full collection."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def import_torch(threads: int) -> None:
    os.environ.update(thread_env(threads))  # read once, when torch is
    with _uncollected():
        import torch

    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def import_transformers() -> None:
    """The slow part of it, before it is needed."""
    with _uncollected():
        import transformers.modeling_utils  # noqa: F401


def payload_settings(config: ClusterConfig, device: str = "cpu") -> PayloadSettings:
    """For a link's end that sends tensors of this device."""
    from actors.transport.payload.contract import PayloadSettings

    wish = config.links.payload
    return PayloadSettings("auto" if device == "cpu" and wish in ("cuda_ipc", "nccl") else wish, device)


def has_relays(config: ClusterConfig) -> bool:
    """Whether tokens may take the way over relays: embedded nodes are on one host."""
    return config.links.relay == "on" or (config.links.relay == "auto" and config.ray.mode == "existing")


def open_link(
    peer: str, address: Address, name: str, config: ClusterConfig, keys: LinkKeys | None, device: str = "cpu"
) -> Link:
    from actors.transport.socket import SocketLink

    return SocketLink(
        peer,
        address,
        name=name,
        max_bytes=config.links.max_message_bytes,
        timeout_s=config.router.request_timeout_s,
        keys=keys,
        payload=payload_settings(config, device),
    )


def way_of(open_link: Callable[[str, Address], Link], config: ClusterConfig) -> Way:
    from cluster.checkpoint.memory import PIECE_BYTES, Way

    limit = min(PIECE_BYTES, config.links.max_message_bytes // 2)
    return Way(open_link, config.router.request_timeout_s, limit)


def of_version(snapshot: Snapshot[Key] | None, draft: KeptDraft) -> Snapshot[Key]:
    """What was taken for this draft; another may have been taken since, after a return to an earlier state."""
    if snapshot is None or snapshot.version != draft.version:
        raise StepAborted(f"the snapshot of version {draft.version} is not here any more")
    return snapshot
