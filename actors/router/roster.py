"""Which expert actors a router works with: their placement, and how each of them is reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from actors.transport.contract import Link
from actors.values import Address, Placement

LinkOpener = Callable[[], Link]


@dataclass(frozen=True)
class Relaying:
    """How an actor is reached over a relay of its node."""

    node: str
    """The same for all actors that can be reached together."""
    address: Address
    """Where its neighbours reach it."""
    open: LinkOpener = field(compare=False)
    """To its own relay."""
    worth_bytes: int = 0
    """It is relayed to where at least so many bytes of a layer's tokens then do not cross."""


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
    relaying: Relaying | None = None
    """None where it is asked over its own link alone."""


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
