"""Pieces of the gradients that are complete while backward goes on."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from actors.errors import StepAborted
from actors.router.buckets import Buckets, Work
from actors.router.pieces import BUCKET_BYTES, MAX_BUCKETS, GradientPieces, bucket_bytes

WAIT_S = 30.0


def model() -> tuple[nn.Linear, nn.Linear, list[nn.Parameter], Buckets]:
    """Two layers, a piece each."""
    first, last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    parameters = [first.weight, last.weight]
    return first, last, parameters, Buckets(parameters, GradientPieces(parameters, max_bytes=64))


def is_complete(buckets: Buckets, piece: int) -> bool:
    return not buckets._missing[piece]


def test_the_last_layers_piece_is_complete_before_the_first_layers() -> None:
    first, last, _, buckets = model()
    hidden = first(torch.ones(2, 4))
    seen: list[tuple[bool, bool]] = []
    hidden.register_hook(lambda grad: seen.append((is_complete(buckets, 0), is_complete(buckets, 1))))
    with buckets.watching():
        # The hook on `hidden` runs when its gradient is there, and so may that of the last weight.
        last(hidden).sum().backward()
        assert is_complete(buckets, 0)
    buckets.wait(0)
    buckets.wait(1)
    assert seen[0][0] is False


def test_whoever_waits_goes_on_in_the_middle_of_backward() -> None:
    first, last, _, buckets = model()
    came, went_on = threading.Event(), threading.Event()

    def hold(grad: Tensor) -> None:
        came.set()
        assert went_on.wait(WAIT_S), "nobody has got the last layer's piece yet"

    first.weight.register_hook(hold)

    def compute(should_stop: object) -> None:
        with buckets.watching():
            last(first(torch.ones(2, 4))).sum().backward()
        buckets.close()

    work = Work(compute, "test")
    assert came.wait(WAIT_S)
    buckets.wait(1)
    assert not is_complete(buckets, 0)
    went_on.set()
    work.result()
    buckets.wait(0)


def test_of_several_backwards_in_flight_all_must_have_added() -> None:
    first, last, _, buckets = model()
    with buckets.watching(2):
        last(first(torch.ones(2, 4))).sum().backward()
        assert not is_complete(buckets, 0)
        assert not is_complete(buckets, 1)
        last(torch.ones(2, 4)).sum().backward()
        assert is_complete(buckets, 1)
        assert not is_complete(buckets, 0)
        first(torch.ones(2, 4)).sum().backward()
        assert is_complete(buckets, 0)


def test_a_parameter_without_a_gradient_is_complete_at_the_end() -> None:
    first, _, _, buckets = model()
    with buckets.watching():
        first(torch.ones(2, 4)).sum().backward()
    assert is_complete(buckets, 0)
    assert not is_complete(buckets, 1)
    buckets.close()
    buckets.wait(1)


def test_nobody_gets_a_gradient_that_came_in_parts() -> None:
    """Two backwards stand for one that adds twice to a parameter."""
    first, last, _, buckets = model()
    with buckets.watching():
        for _ in range(2):
            last(first(torch.ones(2, 4))).sum().backward()
    buckets.close()
    with pytest.raises(StepAborted, match="came in parts"):
        buckets.wait(0)


def test_a_computation_that_fails_ends_every_wait() -> None:
    _, _, _, buckets = model()
    began = threading.Event()

    def compute(should_stop: object) -> None:
        assert began.wait(WAIT_S)
        buckets.close("it failed")
        raise StepAborted("it failed")

    work = Work(compute, "test")
    began.set()
    with pytest.raises(StepAborted, match="it failed"):
        buckets.wait(0)
    with pytest.raises(StepAborted, match="it failed"):
        work.result()
    work.end()


def test_work_that_is_ended_is_told_so() -> None:
    stopped = threading.Event()
    began = threading.Event()

    def compute(should_stop: object) -> None:
        assert callable(should_stop)
        began.set()
        while not should_stop():
            stopped.wait(0.01)
        stopped.set()

    work = Work(compute, "test")
    assert began.wait(WAIT_S)
    work.end()
    assert stopped.is_set()
    work.result()


def test_hooks_are_gone_after_the_step() -> None:
    first, _, _, buckets = model()
    with buckets.watching():
        pass
    first(torch.ones(2, 4)).sum().backward()
    assert not is_complete(buckets, 0)


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        (1000, 1 << 26, BUCKET_BYTES),
        (BUCKET_BYTES * MAX_BUCKETS, 1 << 26, 4 * BUCKET_BYTES),
        (1000, 512, 512),
    ],
)
def test_how_large_a_piece_is(size: int, most: int, expected: int) -> None:
    assert bucket_bytes([nn.Parameter(torch.empty(size, device="meta"))], most) == expected
