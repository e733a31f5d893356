"""How a batch is divided over several routers. Pure: sizes and speeds in, numbers of sequences out.

Letters: M micro-batches, R routers, B sequences of a micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from actors.errors import InvalidInput


@dataclass(frozen=True)
class Part:
    """What one router computes of one micro-batch."""

    number: int
    """Unique over all routers of the step: experts keep by it what backward needs."""
    ids_BS: Tensor
    share: float
    """Of the micro-batch's sequences: its balance loss counts for so much."""


def divide(sizes_M: Sequence[int], speeds_R: Sequence[float]) -> list[list[int]]:
    """Sequences of each micro-batch for each router, [M][R]: in proportion to their speeds over all micro-batches
    together, and one for every router at least where a micro-batch has as many.

    The same arguments give the same answer. A speed of 0 is not known yet: it is taken for the mean of the others.
    `InvalidInput` without a router, or for a speed that is below 0 or not finite.
    """
    shares_R = _shares(speeds_R)
    owed_R = [0.0] * len(shares_R)
    counts_MR = []
    for size in sizes_M:
        owed_R = [owed + size * share for owed, share in zip(owed_R, shares_R, strict=True)]
        counts_R = _counts(size, owed_R)
        # What rounding took from a router now, it gets with the next micro-batch.
        owed_R = [owed - count for owed, count in zip(owed_R, counts_R, strict=True)]
        counts_MR.append(counts_R)
    return counts_MR


def _shares(speeds_R: Sequence[float]) -> list[float]:
    for number, speed in enumerate(speeds_R):
        if not 0 <= speed < math.inf:
            raise InvalidInput("is no speed", field=f"speeds[{number}]", value=speed, remedy="use a number from 0 on")
    if not speeds_R:
        raise InvalidInput("there is no router to divide a batch over", field="speeds", value=0)
    known = [speed for speed in speeds_R if speed]
    mean = sum(known) / len(known) if known else 1.0
    filled = [speed or mean for speed in speeds_R]
    return [speed / sum(filled) for speed in filled]


def _counts(size: int, owed_R: Sequence[float]) -> list[int]:
    least = 1 if size >= len(owed_R) else 0
    counts_R = [max(least, math.floor(owed)) for owed in owed_R]
    routers = range(len(owed_R))
    while sum(counts_R) < size:
        counts_R[max(routers, key=lambda r: owed_R[r] - counts_R[r])] += 1
    while sum(counts_R) > size:
        counts_R[min((r for r in routers if counts_R[r] > least), key=lambda r: owed_R[r] - counts_R[r])] -= 1
    return counts_R


def parts_of(microbatches: Sequence[Tensor], counts_MR: Sequence[Sequence[int]]) -> list[list[Part]]:
    """The parts of each router, [R][<= M]; with one router the micro-batches themselves."""
    num_routers = len(counts_MR[0])
    parts_R: list[list[Part]] = [[] for _ in range(num_routers)]
    for number, (ids_BS, counts_R) in enumerate(zip(microbatches, counts_MR, strict=True)):
        for router, rows_bS in enumerate(ids_BS.split(list(counts_R))):
            if len(rows_bS):
                parts_R[router].append(Part(number * num_routers + router, rows_bS, len(rows_bS) / len(ids_BS)))
    return parts_R


class Speeds:
    """Tokens a second of each router over the last steps, an average in which a step weighs less the older it is."""

    def __init__(self, weight: float = 0.3) -> None:
        self._weight = weight
        self._speeds: dict[str, float] = {}

    def note(self, name: str, num_tokens: int, seconds: float) -> None:
        if num_tokens > 0 and seconds > 0:
            speed = num_tokens / seconds
            self._speeds[name] = speed + (1 - self._weight) * (self._speeds.get(name, speed) - speed)

    def of(self, names: Iterable[str]) -> list[float]:
        """0 for one that has not computed yet."""
        return [self._speeds.get(name, 0.0) for name in names]

    def forget(self, name: str) -> None:
        self._speeds.pop(name, None)
