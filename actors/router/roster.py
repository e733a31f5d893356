"""Which expert actors a router works with: their placement, and how each of them is reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from actors.transport.contract import Link
from actors.values import Address, Placement

LinkOpener = Callable[[], Link]


@dataclass(frozen=True)
class Peer:
    """An expert actor, as a router reaches it."""

    open: LinkOpener
    exchange: Address | None = None
    """Where other expert actors reach it; needed where groups have copies."""
    near: bool = False
    """Whether it is on the router's own node."""
    contact: Mapping[str, Any] = field(default_factory=dict)
    """Plain values by which another router can find it."""


@dataclass(frozen=True)
class Roster:
    placement: Placement
    peers: Mapping[str, Peer]
    """Every actor of the placement."""

    def fields(self) -> dict[str, Any]:
        """Of the message that tells expert actors their part."""
        placement = self.placement
        addresses = {name: list(astuple(peer.exchange)) for name, peer in self.peers.items() if peer.exchange}
        holders = [list(held) for held in placement.holders]
        return {"epoch": placement.epoch, "holders": holders, "addresses": addresses}
