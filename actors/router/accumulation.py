"""Forward and backward of a router's part of a batch: gradients of the trunk here, of the experts where they are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from actors.errors import InvalidInput, NonFinite, StepAborted
from actors.expert.exchange import Attempt
from actors.losses import token_losses
from actors.router.dispatcher import Dispatcher
from actors.router.division import Part
from actors.router.flight import Flight
from actors.router.learner import Learner
from actors.router.passes import Purpose
from actors.router.replicas import Tally
from actors.values import MAX_IN_FLIGHT

Watching = Callable[[int], AbstractContextManager[None]]
"""Gives what is to be entered around the backwards after which all gradients are complete: so many add to each."""


def unwatched(num_backwards: int) -> AbstractContextManager[None]:
    return nullcontext()


class Accumulation:
    """Of one router, for the thread that trains."""

    def __init__(self, learner: Learner, dispatcher: Dispatcher, in_flight: int) -> None:
        self._learner, self._dispatcher = learner, dispatcher
        self._threads = ThreadPoolExecutor(MAX_IN_FLIGHT - 1, thread_name_prefix="in-flight")
        self.in_flight = in_flight

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    @property
    def in_flight(self) -> int:
        """Micro-batches at once. Each has its activations until its backward is done, so memory for these grows with
        it. It may be changed between two steps."""
        return self._in_flight

    @in_flight.setter
    def in_flight(self, number: int) -> None:
        if not 1 <= number <= MAX_IN_FLIGHT:
            remedy = f"use 1 to {MAX_IN_FLIGHT}"
            raise InvalidInput("is no number of micro-batches at once", field="in_flight", value=number, remedy=remedy)
        self._in_flight = number

    def run(
        self,
        attempt: Attempt,
        parts: Sequence[Part],
        num_tokens: int,
        num_microbatches: int,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        watching: Watching = unwatched,
    ) -> Tally:
        """Losses are normalised by the `num_tokens` of the whole batch, over all routers.

        `StepAborted` once `should_stop`; `NonFinite` for a loss that is not finite.
        """
        started = time.monotonic()
        num_slots = max(1, min(self._in_flight, len(parts)))
        flight = Flight(self._dispatcher, num_slots, self._threads)
        losses: dict[int, tuple[float, float]] = {}

        def one(part: Part, around_backward: AbstractContextManager[None]) -> None:
            if should_stop():
                raise StepAborted("the step was given up")
            balance_share = part.share / num_microbatches
            losses[part.number] = self._one(attempt, part, num_tokens, balance_share, around_backward)

        def each() -> Iterator[Callable[[], None]]:
            for part in parts:
                is_last = num_slots == 1 and part is parts[-1]
                yield partial(one, part, watching(1) if is_last else nullcontext())

        with watching(len(parts)) if num_slots > 1 else nullcontext():
            flight.run(each())
        total = total_balance = 0.0
        for part in parts:
            loss, balance = losses[part.number]
            total, total_balance = total + loss, total_balance + balance
        own_tokens = sum(part.ids_BS.shape[0] * (part.ids_BS.shape[1] - 1) for part in parts)
        return Tally(total, total_balance, own_tokens, time.monotonic() - started)

    def _one(
        self,
        attempt: Attempt,
        part: Part,
        num_tokens: int,
        balance_share: float,
        around_backward: AbstractContextManager[None],
    ) -> tuple[float, float]:
        """-> loss and balance loss of one part."""
        learner, step = self._learner, attempt.step
        ids_BS = part.ids_BS.to(learner.device)
        min_version = max(0, step - 1 - learner.settings.staleness)
        self._dispatcher.begin(
            Purpose(step, attempt.number, part.number, min_version=min_version, sequence_length=ids_BS.shape[1])
        )
        loss = token_losses(learner.trunk(input_ids=ids_BS, use_cache=False).logits, ids_BS) / num_tokens
        own = loss.item()
        own_balance = 0.0
        if (balance := learner.routing.take_loss(part.number)) is not None:
            balance = balance * balance_share
            own_balance = balance.item()
            loss = loss + balance
        if not math.isfinite(own + own_balance):
            raise NonFinite(f"loss is {own + own_balance}", step=step)
        with around_backward, torch.autograd.set_multithreading_enabled(False):  # in this thread, as a flight wants it
            loss.backward()
        return own, own_balance
