"""A change of placement that is under way, and what deaths leave of what was there and what has come."""

from __future__ import annotations

from dataclasses import dataclass, replace

from actors.values import Placement


@dataclass(frozen=True)
class Switch:
    """Copies come first; when all are there everybody is told of `after`; and only when everybody uses it are they part
    of every commit, and may go what it does without. Until then who dies is in neither placement any more."""

    before: Placement
    after: Placement
    come: frozenset[tuple[int, str]] = frozenset()
    """Group and actor: copies that are there, whole, and follow every update as long as who sends it lives."""
    gone: frozenset[str] = frozenset()
    """Who died since it began."""

    def with_copy(self, group: int, actor: str) -> Switch:
        return replace(self, come=self.come | {(group, actor)})

    def without(self, actor: str) -> Switch:
        """The same if the actor is in neither placement."""
        if actor not in self.before.actors and actor not in self.after.actors:
            return self
        return replace(self, before=_less(self.before, actor), after=_less(self.after, actor), gone=self.gone | {actor})

    @property
    def left(self) -> Placement:
        """Each group where it was; if nobody of those lives, where it has come."""
        holders = zip(self.before.holders, self.after.holders, strict=True)
        come = self.come
        return replace(
            self.before,
            holders=tuple(
                was or tuple(actor for actor in to_be if (group, actor) in come)
                for group, (was, to_be) in enumerate(holders)
            ),
        )


def _less(placement: Placement, actor: str) -> Placement:
    """Its epoch stays, by which it is known."""
    return replace(placement, holders=tuple(tuple(a for a in held if a != actor) for held in placement.holders))
