"""A replica's part of a step beside its link: pieces of the gradients can be sent while backward still computes others.

Backward goes from the last layer to the first, so the last pieces are complete first.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from actors.errors import StepAborted
from actors.router.pieces import GradientPieces

LOOK_S = 1.0


class Buckets:
    """Which pieces are complete. One thread computes, another waits."""

    def __init__(self, parameters: Sequence[nn.Parameter], pieces: GradientPieces) -> None:
        self._parameters, self._pieces = parameters, pieces
        self._changed = threading.Condition()
        self._missing = [pieces.parameters_of(piece) for piece in range(len(pieces))]
        """Of each piece: parameters whose gradient is not complete."""
        self._num_backwards = 1
        self._added: Counter[int] = Counter()
        """Of each parameter, while watched: how often its gradient has been added to."""
        self._is_over = False
        self._spoilt = ""

    @contextmanager
    def watching(self, num_backwards: int = 1) -> Iterator[None]:
        """Around the last backwards of a step: a gradient is complete when it has been added to so many times more."""
        self._num_backwards = num_backwards
        numbered = [(number, p) for number, p in enumerate(self._parameters) if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(self._noting(number)) for number, p in numbered]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def close(self, error: str = "") -> None:
        """No gradient changes any more: all are complete, or with an error none is."""
        with self._changed:
            self._is_over, self._spoilt = True, self._spoilt or error
            self._changed.notify_all()

    def wait(self, piece: int) -> None:
        """Until the piece is complete. `StepAborted` if it never will be.

        The wait ends since the computation does: each of its questions to an expert actor has a deadline.
        """
        with self._changed:
            while not (self._is_over or self._spoilt or not self._missing[piece]):
                self._changed.wait(LOOK_S)
            if self._spoilt:
                raise StepAborted(self._spoilt)

    def _noting(self, number: int) -> Callable[[Tensor], None]:
        def note(_: Tensor) -> None:
            with self._changed:
                self._added[number] += 1
                if self._added[number] < self._num_backwards:
                    return
                if self._added[number] > self._num_backwards:
                    # Within one backward, as reentrant activation checkpointing does: it may have been sent too early.
                    self._spoilt = f"the gradient of parameter {number} came in parts"
                for missing in self._missing:
                    missing.discard(number)
                self._changed.notify_all()

        return note


class Work:
    """One computation in a thread of its own. It is given a function that says whether it should stop."""

    def __init__(self, compute: Callable[[Callable[[], bool]], None], name: str) -> None:
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._compute = compute
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def result(self) -> None:
        """Waits for its end, and raises what it raised."""
        while self._thread.is_alive():
            self._thread.join(LOOK_S)
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """It should stop. Waits for its end, however it ends."""
        self._stop.set()
        while self._thread.is_alive():
            self._thread.join(LOOK_S)

    def _run(self) -> None:
        try:
            self._compute(self._stop.is_set)
        except BaseException as error:  # told to whoever asks for the result
            self._error = error
