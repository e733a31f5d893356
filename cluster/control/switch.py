"""A switch of placements that is under way, and what deaths leave of both."""

from __future__ import annotations

from dataclasses import dataclass, replace

from actors.values import Placement


@dataclass(frozen=True)
class Switch:
    """Every group is whole in both placements: copies that `after` asks for have come, and what it does without stays
    until everybody uses it. Only then are the copies part of every commit."""

    before: Placement
    after: Placement
    gone: frozenset[str] = frozenset()
    """Who died since; in neither placement any more."""

    def without(self, actor: str) -> Switch:
        """The same if the actor is in neither placement."""
        if actor not in self.before.actors and actor not in self.after.actors:
            return self
        lost = {actor}
        return replace(
            self, before=self.before.without(lost), after=self.after.without(lost), gone=self.gone | frozenset(lost)
        )

    @property
    def best(self) -> Placement:
        """The one to go on with: that after the switch, unless the one before has groups that it lacks."""
        return self.before if len(self.before.missing) < len(self.after.missing) else self.after
