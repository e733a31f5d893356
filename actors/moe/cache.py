"""Policy of the expert cache: which keys have one of a few slots, and which are worth loading before they are used.

Pure: no tensors, no devices, no threads. A key stands for one matrix of one expert group of one layer.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from actors.errors import InvalidInput

K = TypeVar("K", bound=Hashable)

RATE = 0.1
"""Weight of the newest pass in a forecast: about the last ten passes count."""
MARGIN = 0.4
"""A key is loaded ahead in the place of another only if it is so much more likely to be used: each exchange costs a
load, and is wasted when both are used. Under `bench cache`'s Zipf load, with room for a quarter of the groups: 40 %
hits, for 13 % more bytes than without loading a layer ahead, which gave 39 %; 0.1 gave 43 % for 36 % more bytes."""


@dataclass(frozen=True)
class CacheSettings:
    size: int
    """Expert groups whose weights the device has room for, in each layer. Two or more: the next is loaded while one is
    computed with."""
    directory: str = ""
    """Where the files behind the device are; empty: host memory."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InvalidInput("must be at least 1", field="expert_cache_size", value=self.size)


class LruCache(Generic[K]):
    """`capacity` slots, numbered from 0. The least recently used key that is not pinned makes room for another."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise InvalidInput("must be at least 1", field="capacity", value=capacity)
        self.capacity = capacity
        self._slots: OrderedDict[K, int] = OrderedDict()
        """Least recently used first."""
        self._free = list(reversed(range(capacity)))
        self._pins: Counter[K] = Counter()

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[K]:
        """Least recently used first."""
        return iter(tuple(self._slots))

    def slot(self, key: K) -> int:
        return self._slots[key]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def touch(self, key: K) -> None:
        """It is the most recently used now."""
        self._slots.move_to_end(key)

    def pin(self, key: K) -> None:
        """It keeps its slot until `unpin` was called as often."""
        if key not in self._slots:
            raise KeyError(key)
        self._pins[key] += 1

    def unpin(self, key: K) -> None:
        if self._pins[key] < 1:
            raise KeyError(key)
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def is_pinned(self, key: K) -> bool:
        return key in self._pins

    def admit(self, key: K, keep: Collection[K] = ()) -> int | None:
        """Slot for a key that has none, as the most recently used: a free one, or that of the least recently used key
        that is neither pinned nor in `keep`. None if there is no such key; then nothing changes."""
        if key in self._slots:
            raise KeyError(key)
        if not self._free:
            victim = next((k for k in self._slots if k not in self._pins and k not in keep), None)
            if victim is None:
                return None
            self.drop(victim)
        slot = self._slots[key] = self._free.pop()
        return slot

    def drop(self, key: K) -> None:
        """Its slot is free. Nothing happens to a key without one; a pinned key is a mistake of the caller."""
        if key in self._pins:
            raise KeyError(key)
        if key in self._slots:
            self._free.append(self._slots.pop(key))


class Forecast(Generic[K]):
    """How likely the next pass uses each key: the share of the passes before that did, recent ones counting more.

    p <- p + RATE * (used - p), from 0: an exponential moving average of the gate's choices.
    """

    def __init__(self) -> None:
        self._likelihood: dict[K, float] = {}

    def note(self, used: Collection[K]) -> None:
        for key in {*self._likelihood, *used}:
            old = self._likelihood.get(key, 0.0)
            self._likelihood[key] = old + RATE * ((key in used) - old)

    def of(self, key: K) -> float:
        return self._likelihood.get(key, 0.0)

    def forget(self, key: K) -> None:
        self._likelihood.pop(key, None)

    def hits_first(self, wanted: Iterable[K], cache: LruCache[K]) -> list[K]:
        """Order to use these in: those that have a slot, then the others, which are loaded meanwhile. Among each the
        least likely come first, so that what is evicted next is what is least likely to be asked for again."""
        return sorted(wanted, key=lambda key: (key not in cache, self.of(key)))

    def exchanges(self, keys: Iterable[K], cache: LruCache[K]) -> list[tuple[K, K | None]]:
        """(key to load ahead, key that makes room for it; None: a slot is free), the most likely first."""
        missing = sorted((k for k in keys if k not in cache and self.of(k) > 0), key=self.of, reverse=True)
        victims = sorted((k for k in cache if not cache.is_pinned(k)), key=self.of)
        into_free, rest = missing[: cache.num_free], missing[cache.num_free :]
        pairs: list[tuple[K, K | None]] = [(key, None) for key in into_free]
        return pairs + [(k, v) for k, v in zip(rest, victims, strict=False) if self.of(k) > self.of(v) + MARGIN]
