"""Zones: the copies of a unit lie in as many of them as they can, since all nodes of a zone may die together.

L layers   U units   G groups   N nodes   Z zones   X any leading axes
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Zones:
    zone_N: Ints
    """Number of each node's zone."""
    wanted: int
    """Zones that every unit is to be in, 2 or more."""

    @staticmethod
    def of(names_N: Sequence[str], slots_N: Ints, redundancy: int) -> Zones | None:
        """None where zones make no difference: fewer than two have slots, or units have one copy.

        Nodes of which no zone is known (an empty name) count as one zone together: nothing says that they are apart.
        """
        numbers = list(dict.fromkeys(names_N))
        zone_N = np.array([numbers.index(name) for name in names_N], dtype=np.int64)
        wanted = min(redundancy, len(set(zone_N[slots_N > 0].tolist())))
        return Zones(zone_N, wanted) if wanted > 1 else None

    @cached_property
    def member_NZ(self) -> Ints:
        return np.asarray(self.zone_N[:, None] == np.arange(self.zone_N.max() + 1), dtype=np.int64)

    def on(self, on_XN: NDArray) -> Ints:
        """[X, Z]: copies in each zone, from those (or whether there are some) on each node."""
        return np.asarray(on_XN @ self.member_NZ)

    def number(self, on_XN: NDArray) -> Ints:
        """[X]: different zones."""
        return np.asarray((self.on(on_XN) > 0).sum(-1))

    def lacking(self, on_LUN: NDArray) -> Ints:
        """[L]: units in fewer zones than wanted."""
        return np.asarray((self.number(on_LUN) < self.wanted).sum(-1))

    def order(self, key_LN: Floats) -> Ints:
        """[L, N]: nodes by their keys, but first the first of every zone, then the second ones.

        Nodes with a key below 0 come before all, those with an infinite one after all.
        """
        rank_LN = np.argsort(np.argsort(key_LN, axis=-1, kind="stable"), axis=-1)
        same_NN = self.zone_N[:, None] == self.zone_N
        before_LN = ((rank_LN[:, None, :] < rank_LN[:, :, None]) & same_NN).sum(-1)
        kind_LN = np.where(np.isinf(key_LN), 2, key_LN >= 0)
        return np.asarray(np.lexsort((rank_LN, before_LN, kind_LN), axis=-1))

    def first(self, homes_LGN: Bools, number: int) -> Bools:
        """The same with at most `number` homes of each group, of those there are the ones in most zones."""
        index_N = np.arange(len(self.zone_N))
        earlier_NN = (self.zone_N[:, None] == self.zone_N) & (index_N[:, None] < index_N)
        key_LGN = homes_LGN @ earlier_NN.astype(np.int64) * len(index_N) + index_N
        key_LGN = np.where(homes_LGN, key_LGN, len(index_N) ** 2)
        rank_LGN = np.argsort(np.argsort(key_LGN, axis=-1, kind="stable"), axis=-1)
        return np.asarray(homes_LGN & (rank_LGN < number))

    def may_swap(self, homes_RGN: Bools, top_R: Ints) -> Bools:
        """[R, G, N, 2]: whether a group stays in as many zones if it goes from the node `top` to another; and back."""
        on_RGZ = self.on(homes_RGN)
        rows = np.arange(len(top_R))
        zone_top_R = self.zone_N[top_R]
        on_top_RG, on_RGN = on_RGZ[rows, :, zone_top_R], on_RGZ[..., self.zone_N]
        same_RGN = (self.zone_N == zone_top_R[:, None])[:, None]
        there = same_RGN | (on_top_RG[..., None] > 1) | (on_RGN == 0)
        back = same_RGN | (on_RGN > 1) | (on_top_RG[..., None] == 0)
        return np.stack([there, back], axis=-1)


@dataclass
class Lodging:
    """Homes of the groups of one layer, to be changed in place."""

    homes_GN: Bools
    size_G: Ints
    share_G: Floats
    """Load of a group in each of its homes."""
    room_N: Ints
    slowness_N: Floats


def set_apart(zones: Zones, lodging: Lodging, homes_each: int) -> None:
    """Groups in fewer zones than wanted get a home in another, hottest first, as long as there is a way.

    A full node there takes a group if one of its own can go elsewhere: to the home that the group leaves, to a node
    with room, or to a full one where it goes on in this way. So for groups of one size this finds room wherever there
    is some, as augmenting paths do in bipartite matching. A group with less than `homes_each` homes need leave none.
    """
    for group in np.argsort(-lodging.share_G, kind="stable").tolist():
        homes_N = lodging.homes_GN[group]
        while homes_N.any() and zones.number(homes_N) < zones.wanted:
            chain = _Chain(zones, lodging, group, homes_each)
            if not chain.found():
                break
            chain.follow()


class _Step(NamedTuple):
    group: int
    source: int | None
    """Node that the group leaves, if it leaves one."""
    target: int


class _Chain:
    """The shortest row of groups that make room for one another, at whose head is the one to be set apart."""

    def __init__(self, zones: Zones, lodging: Lodging, group: int, homes_each: int) -> None:
        self.zones, self.lodging, self.group = zones, lodging, group
        on_Z = zones.on(lodging.homes_GN[group])
        doubled_N = lodging.homes_GN[group] & (on_Z[zones.zone_N] > 1)
        self.sources: list[int | None] = [None] if lodging.homes_GN[group].sum() < homes_each else []
        self.sources += np.flatnonzero(doubled_N).tolist()
        busy_N = (lodging.share_G @ lodging.homes_GN) * lodging.slowness_N
        self.nodes: list[int] = np.argsort(busy_N, kind="stable").tolist()
        self.targets = [node for node in self.nodes if not on_Z[zones.zone_N[node]]]
        self.steps: list[_Step] = []

    def found(self) -> bool:
        return any(self._search(source) for source in self.sources)

    def follow(self) -> None:
        lodging = self.lodging
        for group, source, target in self.steps:
            if source is not None:
                lodging.homes_GN[group, source] = False
                lodging.room_N[source] += lodging.size_G[group]
            lodging.homes_GN[group, target] = True
            lodging.room_N[target] -= lodging.size_G[group]

    def _search(self, source: int | None) -> bool:
        """Breadth first over the nodes that would hold more than they have room for."""
        room_N = self.lodging.room_N.copy()
        if source is not None:
            room_N[source] += self.lodging.size_G[self.group]
        queue = deque([_Step(self.group, source, target)] for target in self.targets)
        for steps in queue:
            if self._ends_well(steps, room_N):
                return True
        seen = set(self.targets)
        while queue:
            steps = queue.popleft()
            for step in self._next(steps, room_N):
                if step.target not in seen:
                    seen.add(step.target)
                    queue.append([*steps, step])
                    if self._ends_well(queue[-1], room_N):
                        return True
        return False

    def _ends_well(self, steps: list[_Step], room_N: Ints) -> bool:
        """Whether there is room for the last group where it comes to."""
        self.steps = steps
        return bool(room_N[steps[-1].target] >= self.lodging.size_G[steps[-1].group])

    def _next(self, steps: list[_Step], room_N: Ints) -> Iterator[_Step]:
        """Groups that can leave the last node and make enough room there, those of like load first."""
        lodging, (comer, _, node) = self.lodging, steps[-1]
        size_G, share_G = lodging.size_G, lodging.share_G
        here = set(np.flatnonzero(lodging.homes_GN[:, node]).tolist()) - {step.group for step in steps}
        for group in sorted(here, key=lambda group: (abs(share_G[group] - share_G[comer]), group)):
            if room_N[node] + size_G[group] >= size_G[comer]:
                yield from (_Step(group, node, target) for target in self.nodes if self._may_go(group, node, target))

    def _may_go(self, group: int, source: int, target: int) -> bool:
        """It is not there yet, and stays in as many zones."""
        homes_N = self.lodging.homes_GN[group]
        if homes_N[target]:
            return False
        after_N = homes_N.copy()
        after_N[[source, target]] = False, True
        return bool(self.zones.number(after_N) >= self.zones.number(homes_N))
