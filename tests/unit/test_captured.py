"""When a batch's step is captured, when a graph is used again, and when it is not. What graphs compute needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from actors.errors import PeerLost
from actors.moe.experts import Weights
from actors.router import captured
from actors.router.captured import MAX_STEPS, SEEN_BEFORE, CapturedForward, Moved, Nowhere, Standing
from actors.router.slots import BLOCK, Layout, Slots
from actors.trunk.shared import Meanwhile

PLAIN = torch.zeros(1, 4)


class Step:
    """Computes nothing, and tells the same of itself as a captured step."""

    failure: Exception | None = None

    def __init__(
        self, model: Any, slots: Slots, rows: int, length: int, standing: Standing | None, tokens: Any
    ) -> None:
        if self.failure is not None:
            raise self.failure
        self.shape, self.is_whole = (rows, length), standing is not None
        self._of, self._standing = (model, slots.generation), standing

    @property
    def is_over(self) -> bool:
        return self._standing is not None and self._standing.is_over()

    def is_of(self, model: Any, slots: Slots) -> bool:
        return self._of == (model, slots.generation)

    def has(self, standing: Standing | None) -> bool:
        return standing is not None and self._standing is not None and self._standing.is_as(standing)

    def run(self, tokens: Sequence[int], lengths: Sequence[int], meanwhile: Meanwhile) -> Tensor:
        return torch.ones(len(tokens), 4)

    launches: ClassVar[list[Launch]] = []
    faults: ClassVar[dict[int, Exception]] = {}
    """By number of the launch, at once or when its tokens are asked for."""

    def launch(self, tokens: Sequence[int], lengths: Sequence[int]) -> Launch:
        number = len(self.launches)
        if isinstance(fault := self.faults.get(number), Moved):
            raise fault
        self.launches.append(Launch(number, list(tokens), list(lengths), fault))
        return self.launches[-1]


@dataclass
class Launch:
    """Gives its number as every row's token."""

    number: int
    input: list[int]
    lengths: list[int]
    fault: Exception | None
    is_over = False

    def tokens(self, num_rows: int) -> list[int]:
        self.is_over = True
        if self.fault is not None:
            raise self.fault
        return [self.number] * num_rows

    def abandon(self) -> None:
        self.is_over = True


class Here:
    """One layer with one stack, whose weights a test may change."""

    def __init__(self) -> None:
        self.weights: Weights | None = {}
        self.epoch = 0
        self.is_over = False

    @contextmanager
    def holding(self) -> Iterator[Standing | None]:
        is_here = self.weights is not None
        yield Standing(self.epoch, [self.weights], _not_asked, lambda: self.is_over) if is_here else None


def _not_asked() -> Any:
    raise AssertionError("these steps compute nothing")


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "CapturedStep", Step)
    monkeypatch.setattr(captured, "plain_forward", lambda model, slots, tokens: PLAIN)
    monkeypatch.setattr(Step, "failure", None)
    monkeypatch.setattr(Step, "launches", [])
    monkeypatch.setattr(Step, "faults", {})


def slots_of(*lengths: int) -> Slots:
    slots = Slots(Layout((None,), False, False), torch.device("cpu"), max_slots=8, max_positions=1024)
    slots.lengths = list(lengths)
    return slots


def is_replayed(forward: CapturedForward, model: Any, slots: Slots) -> bool:
    return forward(model, slots, [0] * len(slots.lengths)) is not PLAIN


def settle(forward: CapturedForward, model: Any, slots: Slots) -> None:
    assert [is_replayed(forward, model, slots) for _ in range(SEEN_BEFORE + 1)] == [False] * SEEN_BEFORE + [True]


def test_shapes_that_come_again_are_captured_once() -> None:
    forward, model, slots = CapturedForward(Nowhere()), nn.Module(), slots_of(5, 9, 3)
    settle(forward, model, slots)
    slots.lengths = [6, BLOCK - 1, 4, 7]  # as many rows when rounded up, as many positions
    assert is_replayed(forward, model, slots)
    (step,) = forward._steps.values()
    assert isinstance(step, Step)
    assert step.shape == (4, BLOCK)
    assert (forward.num_captures, forward.num_replays) == (1, 2)


def test_other_shapes_are_other_graphs_and_the_oldest_goes() -> None:
    forward, model, slots = CapturedForward(Nowhere()), nn.Module(), slots_of(1)
    slots.reserve(8, 1024)
    shapes = [[length] * rows for length in (5, 200, 300, 600) for rows in (1, 2, 3)]
    for lengths in shapes:
        slots.lengths = lengths
        settle(forward, model, slots)
    assert len(forward._steps) == MAX_STEPS
    slots.lengths = shapes[-MAX_STEPS]
    assert is_replayed(forward, model, slots)
    slots.lengths = shapes[0]
    assert not is_replayed(forward, model, slots)


def test_another_view_and_more_room_are_noticed() -> None:
    forward, model, slots = CapturedForward(Nowhere()), nn.Module(), slots_of(5)
    settle(forward, model, slots)
    grown = nn.Module()
    settle(forward, grown, slots)
    slots.reserve(8, BLOCK)
    settle(forward, grown, slots)
    assert forward.num_captures == 3


def test_experts_that_move_are_left_out_until_they_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "SETTLED_AFTER", 10)
    here = Here()
    forward, model, slots = CapturedForward(here), nn.Module(), slots_of(5)

    def kinds(steps: int) -> list[bool | None]:
        """Of each step: whether experts were inside; None for one that was not captured."""
        found: list[bool | None] = []
        for _ in range(steps):
            was_replayed = is_replayed(forward, model, slots)
            found.append(list(forward._steps.values())[-1].is_whole if was_replayed else None)
        return found

    settle(forward, model, slots)
    assert kinds(2) == [True, True]
    here.weights = dict[str, Tensor]()  # an update made a copy
    assert kinds(5) == [None] * (SEEN_BEFORE) + [False, False]
    assert not any(step.is_whole for step in forward._steps.values()), "what was moved is kept by nobody"
    assert kinds(12)[-1] is True
    here.epoch += 1  # another group came into a place that was free
    assert kinds(5)[-1] is False
    assert kinds(12)[-1] is True
    here.weights = None  # not all of them are here any more
    assert kinds(1) == [False]


def test_graphs_go_with_what_they_hold_though_nothing_comes_in_its_place() -> None:
    """The end of a communicator waits for every graph that holds it."""
    here = Here()
    forward, model, slots = CapturedForward(here), nn.Module(), slots_of(5)
    settle(forward, model, slots)
    here.weights = None  # elsewhere, where no graph reaches
    is_replayed(forward, model, slots)
    assert any(step.is_whole for step in forward._steps.values()), "they may come back"
    here.is_over = True
    is_replayed(forward, model, slots)
    assert not any(step.is_whole for step in forward._steps.values())


@pytest.mark.parametrize("must", [False, True])
def test_a_capture_that_fails_since_its_peers_end_is_made_again(monkeypatch: pytest.MonkeyPatch, must: bool) -> None:
    monkeypatch.setattr(captured, "SETTLED_AFTER", 10)
    here = Here()
    forward, model, slots = CapturedForward(here, must=must), nn.Module(), slots_of(5)
    here.is_over = True
    monkeypatch.setattr(Step, "failure", RuntimeError("the communicator was aborted"))
    assert not any(is_replayed(forward, model, slots) for _ in range(SEEN_BEFORE + 1))
    here.is_over = False
    monkeypatch.setattr(Step, "failure", None)
    assert [is_replayed(forward, model, slots) for _ in range(30)][-1]
    assert any(step.is_whole for step in forward._steps.values())


def test_a_family_that_cannot_be_captured_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "failure", RuntimeError("waits for the device"))
    forward, model, slots = CapturedForward(Nowhere()), nn.Module(), slots_of(5)
    assert not any(is_replayed(forward, model, slots) for _ in range(2 * SEEN_BEFORE))
    monkeypatch.setattr(Step, "failure", None)
    assert not is_replayed(forward, model, slots), "it is not tried again"
    must = CapturedForward(Nowhere(), must=True)
    monkeypatch.setattr(Step, "failure", RuntimeError("waits for the device"))
    with pytest.raises(RuntimeError, match="waits for the device"):
        settle(must, model, slots)


# -- steps that are launched one behind the other ---------------------------------------------------------------------


def chained(forward: CapturedForward, model: Any, slots: Slots, most: int) -> list[list[int]]:
    """What `most` steps give, or as many as there are; counted up as a batch does."""
    found: list[list[int]] = []
    left = iter(range(most - 1))
    with closing(forward.chain(model, slots, [7] * len(slots.lengths), lambda: next(left, None) is not None)) as chain:
        for tokens in chain:
            assert len(Step.launches) in (len(found) + 1, len(found) + 2), "at most one is ahead"
            slots.lengths = [length + 1 for length in slots.lengths]
            found.append(tokens)
    assert all(launch.is_over for launch in Step.launches)
    return found


def whole(*lengths: int) -> tuple[CapturedForward, Any, Slots, Here]:
    """Captured with its experts, for these lengths."""
    here = Here()
    forward, model, slots = CapturedForward(here), nn.Module(), slots_of(*lengths)
    settle(forward, model, slots)
    return forward, model, slots, here


def test_a_step_is_begun_before_the_tokens_of_the_one_before_are_known() -> None:
    forward, model, slots, _ = whole(5, 9)
    order: list[str] = []
    forward.meanwhile = lambda: order.append(f"{len(Step.launches)} launched")
    assert chained(forward, model, slots, 3) == [[0, 0], [1, 1], [2, 2]]
    assert order == ["2 launched", "3 launched", "3 launched"], "readers are woken while the device has work"
    assert [launch.input for launch in Step.launches] == [[7, 7], [], []]
    assert Step.launches[0].lengths == [5, 9]
    assert forward.num_replays == 1 + 3


def test_a_chain_ends_where_the_graph_looks_at_no_more_positions() -> None:
    forward, model, slots, _ = whole(BLOCK - 3)
    assert len(chained(forward, model, slots, 10)) == 3
    assert slots.lengths == [BLOCK]


@pytest.mark.parametrize("at", [0, 1])
def test_a_chain_ends_where_somebody_has_moved(at: int) -> None:
    forward, model, slots, _ = whole(5)
    Step.faults[at] = Moved()
    assert chained(forward, model, slots, 4) == [[0]][:at]
    assert not forward._steps, "what has moved is captured anew"


@pytest.mark.parametrize("at", [0, 1])
def test_what_follows_a_step_that_was_lost_counts_nothing(at: int) -> None:
    forward, model, slots, _ = whole(5)
    Step.faults[at] = PeerLost("killed by the test", peer="expert-1")
    assert chained(forward, model, slots, 9) == [[0]][:at]
    assert len(Step.launches) == at + 2
    assert not forward._steps


def test_a_chain_is_of_what_was_captured_with_its_experts() -> None:
    without = CapturedForward(Nowhere())
    model, slots = nn.Module(), slots_of(5)
    settle(without, model, slots)
    assert chained(without, model, slots, 2) == []
    forward, model, slots, here = whole(5)
    assert chained(forward, nn.Module(), slots, 2) == []
    here.weights = None
    assert chained(forward, model, slots, 2) == []


def test_whoever_goes_away_leaves_nothing_under_way() -> None:
    forward, model, slots, _ = whole(5)
    chain = forward.chain(model, slots, [7], lambda: True)
    assert next(chain) == [0]
    assert [launch.is_over for launch in Step.launches] == [True, False]
    chain.close()  # type: ignore[attr-defined]
    assert all(launch.is_over for launch in Step.launches)
