"""What each expert actor has to do for others: what decides between copies that hold the same experts."""

from __future__ import annotations

from collections.abc import Sequence


class Backlog:
    """What each actor has to do for others, guessed from how much it did for others during the pass before, or during
    those that were in flight together."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._num_visits = 0
        """Layers that were asked for since the last refresh."""
        self._mine: dict[str, int] = {}
        """Pairs sent since the last refresh."""
        self._total: dict[str, int] = {}
        """Pairs the actor has computed since it started, as it last said."""
        self._before: dict[str, int] = {}
        self._pairs: dict[str, float] = {}

    def visit(self) -> None:
        self._num_visits += 1

    def note(self, name: str, sent: int, total: int) -> None:
        self._mine[name] = self._mine.get(name, 0) + sent
        self._total[name] = total

    def refresh_after_a_pass(self, names: Sequence[str]) -> None:
        """Between the beginnings of passes in flight there is too little to tell."""
        if self._num_visits >= self._num_layers:
            self.refresh(names)

    def refresh(self, names: Sequence[str]) -> None:
        for name in names:
            total = self._total.get(name, 0)
            others = total - self._before.get(name, total) - self._mine.get(name, 0)
            self._pairs[name] = max(0, others) / max(self._num_visits, self._num_layers)
        self._before = dict(self._total)
        self._mine.clear()
        self._num_visits = 0

    def by_name(self) -> dict[str, float]:
        """Pairs a layer."""
        return dict(self._pairs)
