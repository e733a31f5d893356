"""What `links.secure` makes of a cluster's links."""

from __future__ import annotations

import pickle

import pytest

from cluster.config import LinksConfig
from cluster.fabric.links import link_keys


def test_off_makes_none() -> None:
    assert link_keys(LinksConfig(secure="off")) is None


@pytest.mark.parametrize(("secure", "on_ipc"), [("auto", False), ("on", True)])
def test_every_cluster_has_a_pair_of_its_own(secure: str, on_ipc: bool) -> None:
    config = LinksConfig(secure=secure)
    keys, others = link_keys(config), link_keys(config)
    assert keys is not None
    assert others is not None
    assert keys.on_ipc is on_ipc
    assert len({keys.public, keys.secret, others.public, others.secret}) == 4
    assert pickle.loads(pickle.dumps(keys)) == keys, "Ray carries them to the actors"  # noqa: S301
