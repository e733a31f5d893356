"""Which bytes of a region are in use: first fit, so that what is used again is what was used last, and little memory is
ever touched. Pure bookkeeping, the same for host memory and GPU memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ALIGN_BYTES = 256


@dataclass(frozen=True)
class _Slot:
    start: int
    end: int
    ticket: int


class Slots:
    """Tickets rise and are never used twice, so that one told back late frees nothing else."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.high_bytes = 0
        """End of the highest slot since `forget_high`."""
        self._used: list[_Slot] = []
        """By start."""
        self._last_ticket = 0

    def __len__(self) -> int:
        return len(self._used)

    def take(self, num_bytes: int) -> tuple[int, int] | None:
        """-> (ticket, start), `start` a multiple of `ALIGN_BYTES`; None if there is no room in one piece."""
        room = num_bytes + -num_bytes % ALIGN_BYTES
        start = index = 0
        for index, slot in enumerate(self._used):  # noqa: B007 - where the gap is
            if slot.start - start >= room:
                break
            start = slot.end
        else:
            index = len(self._used)
        if start + room > self.size_bytes:
            return None
        self._last_ticket += 1
        self._used.insert(index, _Slot(start, start + room, self._last_ticket))
        self.high_bytes = max(self.high_bytes, start + room)
        return self._last_ticket, start

    def free(self, tickets: Iterable[int]) -> None:
        """Those that are not in use are passed over."""
        freed = set(tickets)
        self._used = [slot for slot in self._used if slot.ticket not in freed]

    def forget_high(self) -> None:
        self.high_bytes = max((slot.end for slot in self._used), default=0)
