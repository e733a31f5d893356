"""How actors are reached on the data plane."""

from __future__ import annotations

from dataclasses import dataclass

from actors.values import Address


@dataclass(frozen=True)
class ExpertContact:
    """How to reach an expert actor on the data plane."""

    name: str
    node_id: str
    pid: int
    address: Address
    """Where routers reach it."""
    exchange: Address
    """Where other expert actors reach it."""
    relay: Address | None = None
    """Where routers reach the relay beside it; None: it has none."""


@dataclass(frozen=True)
class RouterContact:
    name: str
    node_id: str
    pid: int
    address: Address
    """Where the router that leads reaches it."""
