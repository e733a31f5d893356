"""Who keeps whose snapshot: a peer on another node, so that no node takes a state and its copy with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cluster.placement.placement import ActorSlot


def peers(parts: Sequence[ActorSlot], keepers: Sequence[ActorSlot]) -> dict[str, ActorSlot | None]:
    """Part (named by the actor that writes it) -> who keeps it; None: there is nobody else.

    In turn, a ring where all are alike: a keeper on another node before one on the same, the least laden first, and of
    those the one that comes next after the writer.
    """
    laden: Counter[str] = Counter()
    found: dict[str, ActorSlot | None] = {}
    names = [keeper.id for keeper in keepers]
    for part in parts:
        after = names.index(part.id) + 1 if part.id in names else 0
        ring = [keeper for keeper in (*keepers[after:], *keepers[:after]) if keeper.id != part.id]
        chosen = min(ring, key=lambda keeper: (keeper.node == part.node, laden[keeper.id]), default=None)
        found[part.id] = chosen
        if chosen is not None:
            laden[chosen.id] += 1
    return found
