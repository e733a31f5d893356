"""The keys of a cluster's links. The coordinator makes them and hands them to the actors in the call that loads them.

Not in the call that starts an actor: Ray's control store keeps the arguments of that one.
"""

from __future__ import annotations

from actors.transport.curve import LinkKeys
from cluster.config import LinksConfig


def link_keys(config: LinksConfig) -> LinkKeys | None:
    """A fresh pair, or none where `links.secure` is off."""
    return None if config.secure == "off" else LinkKeys.generate(on_ipc=config.secure == "on")
