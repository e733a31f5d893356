"""How many updates of a job the experts' weights are made of, counted where nobody has counted steps: the optimizers of
the experts count their own, and a checkpoint has that count."""

from __future__ import annotations

from actors.errors import CheckpointError
from cluster.checkpoint.state import read_experts
from cluster.checkpoint.store import CheckpointStore
from cluster.service.client import Client


def updates_made(client: Client) -> int:
    """After a job has ended: of a checkpoint that is written for it, for which all updates that wait are made.

    `CheckpointError` if actors do not agree on the number.
    """
    url = client.save_checkpoint().url
    for found in CheckpointStore(url.rpartition("/")[0]).committed():
        if found.url == url:
            return read_experts(found).updates
    raise CheckpointError("was written, and is not there", field=url)
