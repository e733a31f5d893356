"""The keys of a cluster's links. The coordinator makes them; actors get them as an argument of the call that loads them.

Not as one of the actor's own making: Ray's control store keeps those for as long as the actor lives.
"""

from __future__ import annotations

from actors.transport.curve import LinkKeys
from cluster.config import LinksConfig


def link_keys(config: LinksConfig) -> LinkKeys | None:
    """A fresh pair, or none where `links.secure` is off."""
    return None if config.secure == "off" else LinkKeys.generate(on_ipc=config.secure == "on")
