"""Versions that an expert actor keeps beside the newest, for requests that are pinned to them.

A pin keeps references to the weights of all layers as they were; the next update writes elsewhere (`Holdings.share`).
So a pin takes no memory at first, and never more than one copy of the actor's weights: no gradients, no moments. What
is pinned stays as it was pinned, whatever becomes of placement, jobs and the number of experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from actors.errors import VersionGone
from actors.expert.holdings import Holdings
from actors.moe.experts import Weights, Work


@dataclass(frozen=True)
class KeptVersion:
    version: int
    experts: tuple[int, ...]
    """Their numbers, in the order in which messages count them."""
    rows_E: tuple[int, ...]
    """Place of each of them in the weights."""
    num_rows: int
    layers: Sequence[Weights]

    def placed(self, work: Work) -> Work:
        """Counts of `experts` -> counts of every place of the weights."""
        counts = [0] * self.num_rows
        for row, count in zip(self.rows_E, work.counts_E, strict=True):
            counts[row] = count
        return Work(work.token_P, counts, work.weight_P)


class KeptVersions:
    """By the name of the pin. The host's lock is held around every call but `names` and `num_bytes`."""

    def __init__(self) -> None:
        self._kept: dict[str, KeptVersion] = {}

    @property
    def names(self) -> list[str]:
        return list(self._kept)

    def add(self, name: str, holdings: Holdings, version: int) -> KeptVersion:
        """The holdings are at this version, in all layers. One that is there already is replaced."""
        experts = tuple(holdings.experts)
        # Places of the experts, found by sending one pair to each, in turn.
        num_rows = len(holdings.by_place([0] * len(experts)))
        rows_E = tuple(row for row, count in enumerate(holdings.by_place([1] * len(experts))) if count)
        self._kept[name] = KeptVersion(version, experts, rows_E, num_rows, holdings.share())
        return self._kept[name]

    def get(self, name: str) -> KeptVersion:
        """`VersionGone` if it is not here."""
        if name not in self._kept:
            raise VersionGone(f"pin {name} is not here; there are {', '.join(self._kept) or 'none'}")
        return self._kept[name]

    def keep(self, names: Collection[str], holdings: Holdings) -> None:
        """All others are given up, and with them their memory."""
        for name in [name for name in self._kept if name not in names]:
            del self._kept[name]
        holdings.share_no_more(none=not self._kept)

    def num_bytes(self, holdings: Holdings) -> int:
        """That nothing but pins takes. From any thread."""
        in_use = {tensor.data_ptr() for stack in holdings.stacks for tensor in stack.weights.values()}
        pinned: dict[int, Tensor] = {}
        for kept in list(self._kept.values()):
            pinned |= {tensor.data_ptr(): tensor for weights in kept.layers for tensor in weights.values()}
        return sum(tensor.nbytes for address, tensor in pinned.items() if address not in in_use)
