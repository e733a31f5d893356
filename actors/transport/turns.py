"""Whose question an expert actor answers next, where several wait: serving before training, within a bound."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from typing import Generic, Literal, TypeVar

from actors.errors import InvalidInput

Lane = Literal["serving", "training"]
Item = TypeVar("Item")

SERVING_WEIGHT = 4


class Turns(Generic[Item]):
    """Questions that wait, in two lanes.

    While both have one, serving goes first, but after `weight` of it in a row training has a turn: a question waits for
    at most one of training, or for `weight` of serving, besides those before it in its own lane. Not thread-safe.
    """

    def __init__(self, weight: int = SERVING_WEIGHT) -> None:
        if type(weight) is not int or weight < 1:
            raise InvalidInput(
                "is no number of serving questions between two of training",
                field="experts.serving_weight",
                value=weight,
                remedy="use 1 or more; 1: in turn",
            )
        self._weight = weight
        self._serving: deque[tuple[Hashable, Item]] = deque()
        self._training: deque[tuple[Hashable, Item]] = deque()
        self._waiting: Counter[tuple[Hashable, Lane]] = Counter()
        self._in_a_row = 0
        """Of serving, while training waited."""

    def __len__(self) -> int:
        return len(self._serving) + len(self._training)

    def put(self, sender: Hashable, lane: Lane, item: Item) -> None:
        """What a sender asks is taken in the order in which it was put: while something of it waits in one lane, more
        of it joins that lane."""
        other: Lane = "training" if lane == "serving" else "serving"
        if self._waiting[sender, other]:
            lane = other
        self._waiting[sender, lane] += 1
        (self._serving if lane == "serving" else self._training).append((sender, item))

    def take(self) -> Item:
        """The next one. `IndexError` if none waits."""
        lane = self._next_lane()
        sender, item = (self._serving if lane == "serving" else self._training).popleft()
        self._in_a_row = self._in_a_row + 1 if lane == "serving" and self._training else 0
        self._waiting[sender, lane] -= 1
        if not self._waiting[sender, lane]:
            del self._waiting[sender, lane]
        return item

    def _next_lane(self) -> Lane:
        if not self._training:
            return "serving"
        return "serving" if self._serving and self._in_a_row < self._weight else "training"
