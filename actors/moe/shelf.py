"""Slots on the device for one matrix of some expert groups of one layer, and the copies that fill them.

Copies run beside the computation, in a thread of their own and, on a CUDA device, on a stream of their own. They run in
the order in which they were started, so a slot that is given to another key may be filled anew without waiting.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Generic

import torch
from torch import Tensor

from actors.errors import StepAborted
from actors.moe.cache import Forecast, K, LruCache

LOAD_TIMEOUT_S = 120.0
"""For one matrix to come from its home: a disk that takes longer is not there any more."""


@dataclass
class CacheCounters:
    """Since the host started. One visit of one matrix of a group by one forward or backward is a hit or a miss."""

    hits: int = 0
    misses: int = 0
    loaded_ahead: int = 0
    """Loads that were started before anybody asked."""
    loaded_bytes: int = 0
    """To the device, for whatever reason."""
    wait_s: float = 0.0
    """That computing stood still for loads."""
    device_bytes: int = 0
    """That the slots take now."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Load:
    """A copy that was started."""

    issued: Future[None]
    """Done when the copy is, or on a CUDA device when it is on its stream."""
    done: Any = None
    """torch.cuda.Event, valid once it is issued."""

    def has_failed(self) -> bool:
        return self.issued.done() and self.issued.exception() is not None

    def is_done(self) -> bool:
        return self.issued.done() and (self.done is None or self.done.query())


class Loader:
    """Makes the copies. Used by one thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counters = CacheCounters()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="expert-cache")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stalls: deque[tuple[Any, Any]] = deque()
        """CUDA events around each wait of the computing stream."""

    def start(self, target: Tensor, source: Tensor, free: Any) -> Load:
        """`free`: what `mark` gave when the target was last in use."""
        self.counters.loaded_bytes += source.numel() * source.element_size()
        done = torch.cuda.Event() if self._stream is not None else None
        return Load(self._thread.submit(self._copy, target, source, free, done), done)

    def _copy(self, target: Tensor, source: Tensor, free: Any, done: Any) -> None:
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            target.copy_(source, non_blocking=True)
            done.record(self._stream)

    def wait(self, load: Load) -> None:
        """What the caller computes from now on comes after the copy. `StepAborted` if it does not come."""
        started = time.perf_counter()
        _result(load.issued)
        self.counters.wait_s += time.perf_counter() - started
        if load.done is not None and not load.done.query():
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            torch.cuda.current_stream(self.device).wait_event(load.done)
            after.record()
            self._stalls.append((before, after))

    def mark(self) -> Any:
        """Everything that was computed up to now."""
        while self._stalls and self._stalls[0][1].query():
            before, after = self._stalls.popleft()
            self.counters.wait_s += before.elapsed_time(after) / 1e3
        return torch.cuda.current_stream(self.device).record_event() if self._stream is not None else None

    def settle(self) -> None:
        """Waits until every copy is made: the sources may be written then."""
        _result(self._thread.submit(lambda: None))
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """More than once is right. A copy that does not end is not waited for longer than another would be."""
        with suppress(StepAborted, RuntimeError):  # RuntimeError: it is closed already
            self.settle()
        self._thread.shutdown(wait=False, cancel_futures=True)


def _result(copied: Future[None]) -> None:
    try:
        copied.result(LOAD_TIMEOUT_S)
    except FutureTimeout:
        text = f"weights of an expert group did not come from their home within {LOAD_TIMEOUT_S:.0f} s"
        raise StepAborted(text) from None


@dataclass
class _Slot:
    tensor: Tensor
    free: Any = field(default=None)
    """Of `Loader.mark`."""


class Shelf(Generic[K]):
    """At most `capacity` matrices are on the device. `home` gives the matrix of a key, behind the device."""

    def __init__(self, capacity: int, home: Callable[[K], Tensor], loader: Loader, forecast: Forecast[K]) -> None:
        self._lru = LruCache[K](capacity)
        self._home, self._loader, self._forecast = home, loader, forecast
        self._slots: dict[int, _Slot] = {}
        """Made when they are first needed, and kept."""
        self._loads: dict[K, Load] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._lru

    def __len__(self) -> int:
        return len(self._lru)

    def visit(self, keys: Collection[K], then: Callable[[], None]) -> Iterator[tuple[K, Tensor]]:
        """Each of the keys once, with its matrix on the device until the next is asked for: hits first, while the
        others are loaded. `then` is called when the last of the loads has been started."""
        for key in [key for key, load in self._loads.items() if load.has_failed()]:
            self.drop(key)
        order = self._forecast.hits_first(keys, self._lru)
        missing = deque(key for key in order if key not in self._lru)
        self._loader.counters.misses += len(missing)
        self._loader.counters.hits += len(order) - len(missing)
        here = sorted(order[: len(order) - len(missing)], key=self._is_on_its_way)
        order = [*here, *missing]
        pinned: set[K] = set()
        try:
            for key in here:
                self._pin(key, pinned)
            self._start(missing, pinned, then)
            for key in order:
                slot = self._ready(key, pinned)
                yield key, slot.tensor
                slot.free = self._loader.mark()
                self._lru.touch(key)
                self._unpin(key, pinned)
                if missing:
                    self._start(missing, pinned, then)
        finally:
            for key in tuple(pinned):
                self._unpin(key, pinned)

    def expect(self, keys: Sequence[K]) -> None:
        """These will be visited next: what there is room for beside those of them that are here is loaded."""
        for key in keys:
            if key not in self._lru:
                if self._lru.admit(key, keep=keys) is None:
                    return
                self._load(key)
                self._loader.counters.loaded_ahead += 1

    def anticipate(self, keys: Iterable[K]) -> None:
        """Loads those of these keys that are likely enough to be visited next."""
        for key, victim in self._forecast.exchanges(keys, self._lru):
            if victim is not None:
                self.drop(victim)
            if self._lru.admit(key) is not None:
                self._load(key)
                self._loader.counters.loaded_ahead += 1

    def reload(self, key: K) -> None:
        """Its home was written."""
        if key in self._lru:
            self._load(key)

    def drop(self, key: K) -> None:
        self._lru.drop(key)
        self._loads.pop(key, None)

    def _start(self, missing: deque[K], pinned: set[K], then: Callable[[], None]) -> None:
        while missing and self._lru.admit(missing[0]) is not None:
            key = missing.popleft()
            self._pin(key, pinned)
            self._load(key)
        if not missing:
            then()

    def _load(self, key: K) -> None:
        source, number = self._home(key), self._lru.slot(key)
        if number not in self._slots:
            tensor = torch.empty_like(source, device=self._loader.device)
            self._slots[number] = _Slot(tensor, self._loader.mark())
            self._loader.counters.device_bytes += tensor.numel() * tensor.element_size()
        slot = self._slots[number]
        self._loads[key] = self._loader.start(slot.tensor, source, slot.free)

    def _is_on_its_way(self, key: K) -> bool:
        return (load := self._loads.get(key)) is not None and not load.is_done()

    def _ready(self, key: K, pinned: set[K]) -> _Slot:
        if (load := self._loads.pop(key, None)) is not None:
            try:
                self._loader.wait(load)
            except Exception:  # whatever is in its slot now, it is not what is at home
                self._unpin(key, pinned)
                self.drop(key)
                raise
        return self._slots[self._lru.slot(key)]

    def _pin(self, key: K, pinned: set[K]) -> None:
        self._lru.pin(key)
        pinned.add(key)

    def _unpin(self, key: K, pinned: set[K]) -> None:
        self._lru.unpin(key)
        pinned.discard(key)
