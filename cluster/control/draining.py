"""Which nodes are to be empty, and by when. Pure: the edge asks Ray, moves groups and ends actors.

Nodes leave because somebody asked for it, or because Ray announced it, e.g. before the preemption of a spot machine.
Times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from actors.errors import InvalidInput
from cluster.errors import FailedPrecondition

DEFAULT_NOTICE_S = 300.0
"""Time for a node that Ray announced without a deadline."""
LEAST_NOTICE_S = 10.0
"""For one whose deadline is near or over: Ray itself does not end a node at its deadline."""
AGAIN_S = 5.0
"""After an attempt that failed."""


@dataclass(frozen=True)
class Notice:
    """A node that Ray is going to take away."""

    node_id: str
    until_s: float | None
    """When it may end; None if nobody said."""

    def deadline_s(self, now: float) -> float:
        """Seconds from now that there are to empty it."""
        return DEFAULT_NOTICE_S if self.until_s is None else max(LEAST_NOTICE_S, self.until_s - now)


class Leaving:
    """Nodes that are to be empty, by Ray node id."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}
        """Node id -> when."""
        self._announced: dict[str, Notice] = {}
        self._names: dict[str, str] = {}
        self._try_at_s: dict[str, float] = {}
        self._num_tries = 0

    @property
    def names(self) -> Mapping[str, str]:
        """Node id -> name."""
        return {node_id: self._names[node_id] for node_id in {*self._asked, *self._announced}}

    @property
    def asked(self) -> Mapping[str, str]:
        """Of `names` those that somebody asked for."""
        return {node_id: self._names[node_id] for node_id in self._asked}

    def ask(self, node_id: str, name: str, now: float) -> None:
        self._asked[node_id] = now
        self._names[node_id] = name

    def take_back(self, node_id: str) -> None:
        """It was asked for and did not come about. What Ray announced holds."""
        self._asked.pop(node_id, None)

    def announced(self, notices: Mapping[str, float | None], nodes: Mapping[str, str], looked_s: float) -> list[str]:
        """What Ray said at `looked_s` or later: node id -> when it may end (None: not said), and the names of all
        living nodes.

        -> ids of the nodes that are news. Who is gone, or stays after all, is forgotten.
        """
        news = [node_id for node_id in notices if node_id in nodes and node_id not in self._announced]
        self._announced = {node_id: Notice(node_id, notices[node_id]) for node_id in notices if node_id in nodes}
        # A node that has joined since is asked for while it is not among these yet.
        self._asked = {node_id: at_s for node_id, at_s in self._asked.items() if node_id in nodes or at_s >= looked_s}
        names = {**self._names, **nodes}
        self._names = {node_id: names[node_id] for node_id in {*self._asked, *self._announced}}
        self._try_at_s = {node_id: at_s for node_id, at_s in self._try_at_s.items() if node_id in self._announced}
        return news

    def next(self, held: Mapping[str, int], now: float) -> Notice | None:
        """The announced node to empty now: of those that hold actors (`held`: node id -> number), the one that ends
        first. Nothing while the last attempt is too young."""
        due = [
            notice
            for node_id, notice in self._announced.items()
            if held.get(node_id) and self._try_at_s.get(node_id, now) <= now
        ]
        return min(due, key=lambda notice: notice.deadline_s(now), default=None)

    def tried(self, node_id: str, now: float) -> str:
        """An attempt begins. -> its request id."""
        self._try_at_s[node_id] = now + AGAIN_S
        self._num_tries += 1
        return f"notice-{node_id[:12]}-{self._num_tries}"


def find_node(name: str, nodes: Mapping[str, str], keepers: Mapping[str, str]) -> str:
    """The id of the node with this name or id.

    `nodes`: id -> name of the living ones. `keepers`: id -> what there cannot be moved, e.g. `the router`.
    `InvalidInput` for a name that no node has, or more than one; `FailedPrecondition` for a node of `keepers`.
    """
    found = [node_id for node_id, node in nodes.items() if name in (node, node_id)]
    names = ", ".join(sorted(set(nodes.values()))) or "none"
    if not found:
        raise InvalidInput("is no node of the cluster", field="node", value=name, remedy=f"the nodes are {names}")
    if len(found) > 1:
        ids = ", ".join(sorted(found))
        raise InvalidInput("is the name of several nodes", field="node", value=name, remedy=f"use one of the ids {ids}")
    (node_id,) = found
    if node_id in keepers:
        raise FailedPrecondition(f"node {name} holds {keepers[node_id]}, which cannot be moved while the cluster runs")
    return node_id
