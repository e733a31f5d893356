"""Updates of an expert actor beside its forwards and backwards: committed gradients wait here, and a thread makes them.

    commit(t)  ->  [ t-2 | t-1 | t ]  ->  thread: layer by layer, into new tensors  ->  the layer's stack switches
                     pending updates       those that wait together become one

A layer's *lag* is the number of committed updates that are not in it yet, its version the number of those that are. A
training forward of step t is computed on a layer whose version is at least t - 1 - s, s the job's staleness: one that
comes too early waits. Nothing else waits for updates, but what reads or changes whole groups, which `drain`s first.

Where both compute on the same cores the thread gives way: after each piece, some experts' part of a parameter, it lets
who waits for its core have it, and while a training question is computed it stops until the question is answered. So
updates take the time in which the router computes, and a question takes no longer for them. Once somebody waits for
updates, or more than half of those that the bound allows are to be made, they are made beside everything.

The thread takes all that is pending at a time. Steps of a group become one then (`merged`), except where its copies or
followers elsewhere must make the very same updates: those are made one after the other.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from actors.errors import StepAborted
from actors.expert.holdings import Holdings, LayerStep, TakenGradients
from actors.moe.experts import Weights

logger = logging.getLogger(__name__)

GIVE_WAY_S = 1.0
"""That a piece of an update is put off at most."""


@dataclass(frozen=True)
class PendingUpdate:
    """What a commit leaves to be done."""

    step: int
    lr: float
    scale: float
    gradients: Sequence[TakenGradients]
    """By layer; of this update alone."""
    own: frozenset[int]
    """Groups that nobody else has to update alike: they may be merged, or corrected for what was computed with here."""
    then: Mapping[int, Weights] = field(default_factory=dict)
    """By layer: that the gradients were computed with. Without the job's delay correction there are none."""
    summed: Any = None
    """On a GPU: the event after which the gradients are complete."""

    def of(self, layer: int, group: int) -> LayerStep:
        then = self.then.get(layer) if group in self.own else None
        return LayerStep(self.gradients[layer].groups[group], self.lr, self.scale, then=then)

    @property
    def mergeable(self) -> frozenset[int]:
        """Each update has its own correction."""
        return frozenset() if self.then else self.own


@torch.no_grad()
def merged(steps: Sequence[LayerStep]) -> LayerStep:
    """One step in the place of several: the mean of their scaled gradients, the sum of their rates.

    k small steps go about as far as one of k times the rate along the mean, as long as gradients change little between
    them (Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.1). Here they were computed before the first of
    the steps anyway; and Adam's averages, whose memory is longer than k steps, make its k updates much the same.
    """
    if len(steps) == 1:
        return steps[0]
    total = [gradient.mul_(steps[0].scale) for gradient in steps[0].gradients]
    for step in steps[1:]:
        for own, other in zip(total, step.gradients, strict=True):
            own.add_(other, alpha=step.scale)
    for own in total:
        own.div_(len(steps))
    return LayerStep(total, sum(step.lr for step in steps), 1.0, sum(step.merged for step in steps))


@dataclass
class Brake:
    """For tests and benchmarks: makes a host's updates slow. No message sets it, only the host's own process."""

    factor: float = 1.0
    """Each update takes so many times as long as it computes; while others have its core it does not."""
    sleep_s: float = 0.0
    """Before each update, merged or not."""
    pause_s: float = 0.0
    """Before the next one, once."""
    hold: int = 0
    """So many updates stay pending as long as nobody drains, and none are merged: every run has the same staleness."""

    @contextmanager
    def slowing(self, clock: Callable[[], float]) -> Iterator[None]:
        """Around what computes an update, or a part of it; `clock` tells the seconds for which it does."""
        started = clock()
        yield
        if self.factor > 1:
            time.sleep((self.factor - 1) * (clock() - started))

    def wait(self) -> None:
        """Before an update."""
        pause_s, self.pause_s = self.pause_s, 0.0
        if pause_s + self.sleep_s > 0:
            time.sleep(pause_s + self.sleep_s)


class Updates:
    """`put`, `drain` and `drop` are called with the host's lock held, so that nothing is committed meanwhile; the
    thread never takes that lock. `read`, `wait` and `admits` are called from any thread.

    After `drain` and until the next `put` the thread touches nothing.
    """

    def __init__(self, name: str, holdings: Callable[[], Holdings], device: torch.device, *, timeout_s: float) -> None:
        self.num_merged = 0
        """Committed updates that were not made by themselves, but as part of one that was made instead."""
        self._brake = Brake()
        self.busy_s = 0.0
        """Time spent on updates since the start."""
        self.on_made: Callable[[], None] = lambda: None
        """Called by the thread after each update."""
        self._name, self._holdings, self._timeout_s = name, holdings, timeout_s
        self._changed = threading.Condition()
        self._pending: deque[PendingUpdate] = deque()
        self._batch: list[PendingUpdate] = []
        """Is being made."""
        self._num_switched = 0
        """Layers that have the batch already."""
        self._draining = 0
        self._waiting = 0
        """Threads that need updates before they go on."""
        self._is_wanted = False
        """A question was told to come again later; until the updates of now are made."""
        self._foreground = 0
        """Training questions that are being computed."""
        self._gives_way = False
        """The thread is waiting for them."""
        self._given_s = 0.0
        """How long it has, since the start."""
        self._failure: Exception | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._beside = _Beside(device)

    @property
    def brake(self) -> Brake:
        return self._brake

    @brake.setter
    def brake(self, brake: Brake) -> None:
        with self._changed:
            self._brake = brake
            self._changed.notify_all()

    # -- for forwards -------------------------------------------------------------------------------------------------

    def lag(self, layer: int) -> int:
        """Committed updates that are not in this layer."""
        with self._changed:
            return self._lag(layer)

    @property
    def max_lag(self) -> int:
        """Of all layers."""
        return len(self._pending) + len(self._batch)

    def read(self, layer: int) -> tuple[Weights, int]:
        """The layer's weights of now and its lag, which belong together."""
        with self._changed:
            return self._holdings().stacks[layer].weights, self._lag(layer)

    def admits(self, layer: int, max_lag: int) -> bool:
        """Whether a forward need not wait, be it since updates have failed and it had better be told."""
        with self._changed:
            is_admitted = self._failure is not None or self._lag(layer) <= max_lag
            if not is_admitted:
                self._go_on()
            return is_admitted

    def wait(self, layer: int, max_lag: int) -> None:
        """Until the layer's lag is no larger. `StepAborted` if it stays so."""
        with self._changed, self._waited_for():
            if not self._changed.wait_for(
                lambda: self._failure is not None or self._lag(layer) <= max_lag, self._timeout_s
            ):
                raise StepAborted(
                    f"{self._name} is {self._lag(layer)} updates behind after {self._timeout_s:.0f} s, "
                    f"{max_lag} are allowed"
                )
        self.check()

    @contextmanager
    def _waited_for(self) -> Iterator[None]:
        self._waiting += 1
        self._changed.notify_all()
        try:
            yield
        finally:
            self._waiting -= 1

    def _go_on(self) -> None:
        """Whatever is being computed."""
        self._is_wanted = True
        if self._gives_way:
            self._changed.notify_all()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around what a router waits for: updates give way to it."""
        with self._changed:
            self._foreground += 1
        try:
            yield
        finally:
            with self._changed:
                self._foreground -= 1
                if self._gives_way:
                    self._changed.notify_all()

    def check(self) -> None:
        """Raises if an update could not be made: nothing that is computed here would be right."""
        if self._failure is not None:
            kind = type(self._failure).__name__
            raise StepAborted(f"an update of {self._name} failed with {kind}: {self._failure}") from self._failure

    # -- for commits, and whatever changes groups ---------------------------------------------------------------------

    def put(self, update: PendingUpdate) -> None:
        """It counts as committed from here on."""
        self.check()
        update = replace(update, summed=self._beside.mark())
        with self._changed:
            self._pending.append(update)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"updates-{self._name}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self) -> None:
        """All that is committed is in the weights, or `StepAborted`."""
        with self._changed:
            self._draining += 1
            self._changed.notify_all()
            try:
                is_done = self._changed.wait_for(lambda: self._failure is not None or not self.max_lag, self._timeout_s)
            finally:
                self._draining -= 1
            if not is_done:
                raise StepAborted(f"{self._name} has {self.max_lag} updates to make after {self._timeout_s:.0f} s")
        self.check()

    def drop(self) -> None:
        """What is pending will not be made: all groups are about to be replaced. `StepAborted` as from `drain`."""
        with self._changed, self._waited_for():
            self._pending.clear()
            if not self._changed.wait_for(lambda: not self._batch, self._timeout_s):
                raise StepAborted(f"{self._name} is still at an update after {self._timeout_s:.0f} s")
            self._failure = None

    def close(self) -> None:
        """Ends the thread after the layer at hand."""
        with self._changed:
            self._closed = True
            self._pending.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(self._timeout_s)

    @contextmanager
    def making(self) -> Iterator[None]:
        """Around an update that is made by the host's own thread, while all wait for it."""
        started = time.monotonic()
        self.brake.wait()
        with self.brake.slowing(self._beside.clock):
            yield
        self.busy_s += time.monotonic() - started

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _lag(self, layer: int) -> int:
        return len(self._pending) + (len(self._batch) if layer >= self._num_switched else 0)

    def _may_start(self) -> bool:
        kept = 0 if self._draining else self.brake.hold
        return len(self._pending) > kept

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_start())
                if self._closed:
                    return
                self._num_switched = 0
                self._batch = [self._pending.popleft()] if self.brake.hold else list(self._pending)
                if not self.brake.hold:
                    self._pending.clear()
            failure: Exception | None = None
            started = self._clock()
            try:
                self._make(self._batch)
                self.on_made()
            except Exception as error:  # told to whoever asks next: the thread has nobody to tell
                logger.exception("%s failed in an update", self._name)
                failure = error
            with self._changed:
                self.busy_s += self._clock() - started
                self._batch = []
                self._is_wanted = False
                self._failure = self._failure or failure
                self._changed.notify_all()

    def _make(self, batch: Sequence[PendingUpdate]) -> None:
        holdings = self._holdings()
        merging = frozenset.intersection(*(update.mergeable for update in batch)) if len(batch) > 1 else frozenset()
        self.brake.wait()
        for layer, stack in enumerate(holdings.stacks):
            if self._closed:
                return
            between = self._give_way if self._beside.shares_cores else None
            with self.brake.slowing(self._beside.clock), self._beside.after([update.summed for update in batch]):
                fresh = holdings.updated(layer, _steps_of(batch, layer, merging), between)
            self._beside.hand_over(fresh.values())
            for update in batch:
                holdings.give_back(layer, update.gradients[layer], between)
            with self._changed:
                stack.switch(fresh)
                self._num_switched = layer + 1
                self._changed.notify_all()
        self.num_merged += len(batch) - 1 if merging else 0

    def _give_way(self) -> None:
        """Between two pieces. The threads that take a question in may be waiting for this one's core, for which a
        scheduler lets them wait for milliseconds: nobody would know of the question. Where somebody waits for updates
        the core is kept, since others than those threads may want it."""
        if not self._must_go_on():
            began = time.monotonic()
            os.sched_yield()
            self._given_s += time.monotonic() - began
        if not self._foreground:  # read without the lock: the next piece is soon
            return
        with self._changed:
            self._gives_way, began = True, time.monotonic()
            self._changed.wait_for(lambda: not self._foreground or self._must_go_on(), GIVE_WAY_S)
            self._gives_way = False
            self._given_s += time.monotonic() - began

    def _clock(self) -> float:
        """Seconds, but for those in which the thread gave way."""
        return time.monotonic() - self._given_s

    def _must_go_on(self) -> bool:
        return bool(self._closed or self._draining or self._waiting or self._is_wanted or self._is_late)

    @property
    def _is_late(self) -> bool:
        """Whether whoever gives way any longer will be waited for."""
        return self.max_lag > max(1, self._holdings().settings.staleness // 2)


class _Beside:
    """On a GPU: a stream of the thread's own, beside that of forwards and backwards. Elsewhere it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._main: Any = None
        self._stream: Any = None

    @property
    def shares_cores(self) -> bool:
        """With forwards and backwards."""
        return self._device.type != "cuda"

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds that this thread computes, or that its device takes."""
        return time.thread_time if self.shares_cores else time.monotonic

    def mark(self) -> Any:
        """By the host's thread: what it has launched so far."""
        if self._device.type != "cuda":
            return None
        self._main = torch.cuda.current_stream(self._device)
        return self._main.record_event()

    @contextmanager
    def after(self, marks: Sequence[Any]) -> Iterator[None]:
        """What is launched inside waits for these, and is done at the end."""
        if self._device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            for mark in marks:
                self._stream.wait_event(mark)
            yield
        self._stream.synchronize()

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """The host's stream will use these: their memory is free only when it has, whoever drops them last."""
        for tensor in tensors if self._main is not None else ():
            tensor.record_stream(self._main)


def _steps_of(batch: Sequence[PendingUpdate], layer: int, merging: Collection[int]) -> dict[int, Sequence[LayerStep]]:
    """Of each group, in the order in which they are to be made."""
    steps: dict[int, Sequence[LayerStep]] = {}
    for group in batch[0].gradients[layer].groups:
        ordered = [update.of(layer, group) for update in batch]
        steps[group] = [merged(ordered)] if group in merging else ordered
    return steps
