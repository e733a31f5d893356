"""Passes of several micro-batches in flight: while the tokens of one are with the experts, the router computes another.

transformers' forward and autograd's backward cannot be left in the middle, so every pass in flight has a thread, and
both run in it: autograd's own thread of a CUDA device would be one for all of them. Only one computes at a time, who
holds the baton, and it goes on only where a dispatcher would wait, once a layer and direction, always to the next slot
in a fixed order. So everything happens in an order that does not depend on timing: gradients are added up micro-batch
by micro-batch, as if there were no others in flight.

Links are used by who holds the baton alone. An answer is awaited when the baton is back, after all others have had
their turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from actors.errors import StepAborted
from actors.trunk.shared import nothing

if TYPE_CHECKING:
    from actors.router.dispatcher import Dispatcher

LOOK_S = 1.0


class Baton:
    """Goes round among slots 0 to n - 1. Every wait ends since the holder's does: its questions have deadlines."""

    def __init__(self, num_slots: int) -> None:
        self._lock = threading.Lock()
        self._turns = [threading.Condition(self._lock) for _ in range(num_slots)]
        self._holder = 0
        self._staying = set(range(num_slots))
        self.error: BaseException | None = None
        """What ended the first of those that failed."""

    def take(self, slot: int) -> None:
        """The first turn of a slot. Like all waits here: `StepAborted` once another slot has failed."""
        with self._lock:
            self._wait(slot)

    def pass_on(self) -> None:
        """By the holder, until it is its turn again."""
        with self._lock:
            slot = self._holder
            self._give()
            self._wait(slot)

    def leave(self, slot: int, error: BaseException | None = None) -> None:
        """It has no more turn. After an error nobody has."""
        with self._lock:
            self._staying.discard(slot)
            self.error = self.error or error
            if self.error is not None:
                for turn in self._turns:
                    turn.notify_all()
            elif self._holder == slot:
                self._give()

    def _give(self) -> None:
        num_slots = len(self._turns)
        following = [(self._holder + step) % num_slots for step in range(1, num_slots + 1)]
        if (slot := next((s for s in following if s in self._staying), None)) is not None:
            self._holder = slot
            self._turns[slot].notify_all()

    def _wait(self, slot: int) -> None:
        while self._holder != slot and self.error is None:
            self._turns[slot].wait(LOOK_S)
        if self.error is not None:
            raise StepAborted(f"another micro-batch in flight has failed: {self.error}")


class Flight:
    """One run of passes through a dispatcher, at most `num_slots` of them at once.

    `threads`: of the slots but the first, for this flight alone. They should outlive it: cuDNN's plans for attention
    are a thread's own, and take 75 ms a micro-batch to make.
    """

    def __init__(self, dispatcher: Dispatcher, num_slots: int, threads: ThreadPoolExecutor) -> None:
        self._dispatcher, self._num_slots, self._threads = dispatcher, num_slots, threads
        self._baton = Baton(num_slots)

    def run(self, passes: Iterable[Callable[[], None]]) -> None:
        """All of them; a slot that is done with one takes the next. The first error ends all, and is raised when every
        slot has ended: within the deadline of the question that is awaited, if one is."""
        todo = iter(passes)
        scene = _stream_of_this_thread()
        self._dispatcher.while_away = self._while_away if self._num_slots > 1 else nothing
        others: list[Future[None]] = []
        try:
            for slot in range(1, self._num_slots):
                others.append(self._threads.submit(self._fly, slot, todo, scene))
            self._fly(0, todo, nullcontext)
        except BaseException as error:
            self._baton.leave(0, error)
            raise
        finally:
            while wait(others, LOOK_S).not_done:
                pass
            self._dispatcher.while_away = nothing
        if self._baton.error is not None:
            raise self._baton.error

    def _fly(
        self, slot: int, todo: Iterator[Callable[[], None]], scene: Callable[[], AbstractContextManager[object]]
    ) -> None:
        failure: BaseException | None = None
        try:
            with scene():
                self._baton.take(slot)
                for one in todo:  # whose turn it is takes the next
                    one()
        except BaseException as error:  # raised by `run`
            failure = error
        self._baton.leave(slot, failure)

    def _while_away(self) -> None:
        current = self._dispatcher.current
        self._baton.pass_on()
        self._dispatcher.current = current


def _stream_of_this_thread() -> Callable[[], AbstractContextManager[object]]:
    """Makes another thread use the same CUDA stream, where there is one."""
    if not torch.cuda.is_initialized():
        return nullcontext
    stream = torch.cuda.current_stream()
    return lambda: torch.cuda.stream(stream)
