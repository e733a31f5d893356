"""Failure detection on a simulated clock: who is found and when, and above all who is not."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import InvalidInput
from cluster.control.heartbeats import Heartbeats, Verdict

Span = tuple[float, float]
"""From, to; seconds."""


class Loop:
    """A coordinator that pings each half second and checks twice as often, and actors that answer 20 ms later.

    Who is stalled answers what it got meanwhile when the stall is over. `own` stalls are the coordinator's.
    """

    def __init__(self, stalls: dict[str, list[Span]], own: Collection[Span] = (), seed: int = 0) -> None:
        self.heartbeats = Heartbeats()
        self.verdicts: list[tuple[float, Verdict]] = []
        self._stalls, self._own, self._random = stalls, sorted(own), Random(seed)
        self._now, self._pinged_s = 0.0, -1.0
        self._on_the_way: list[tuple[float, str]] = []

    def run(self, until_s: float) -> list[tuple[float, Verdict]]:
        while self._now < until_s:
            self._read_answers()
            if self._now - self._pinged_s >= self.heartbeats.interval_s - 1e-9:
                self._pinged_s = self._now
                for actor in self._stalls:
                    self.heartbeats.sent(actor, self._now)
                    self._on_the_way.append((self._answer_s(actor), actor))
            self.verdicts += [(self._now, verdict) for verdict in self.heartbeats.check(self._now)]
            self._now += 0.25 + self._random.uniform(0.0, 0.02)
            self._now = max([self._now, *(end for start, end in self._own if start <= self._now < end)])
        return self.verdicts

    def _read_answers(self) -> None:
        for time_s, actor in [each for each in self._on_the_way if each[0] <= self._now]:
            self._on_the_way.remove((time_s, actor))
            self.heartbeats.answered(actor, self._now)

    def _answer_s(self, actor: str) -> float:
        arrives = self._now + 0.01
        return max([arrives, *(end for start, end in self._stalls[actor] if start <= arrives < end)]) + 0.01


FOREVER = 1e9


def states(verdicts: list[tuple[float, Verdict]], actor: str) -> list[str]:
    return [verdict.state for _, verdict in verdicts if verdict.actor == actor]


@given(st.floats(10, 11), st.integers())
@settings(max_examples=200, deadline=None)
def test_a_frozen_actor_is_found_within_six_seconds(frozen_s: float, seed: int) -> None:
    found = Loop({"a": [], "b": [(frozen_s, FOREVER)], "c": []}, seed=seed).run(30)
    assert [(verdict.actor, verdict.state) for _, verdict in found] == [("b", "suspect"), ("b", "dead")]
    (suspected_s, _), (dead_s, dead) = found
    assert 3.0 - 0.02 <= suspected_s - frozen_s < 4.0
    assert 5.0 - 0.02 <= dead_s - frozen_s < 6.0
    assert 5.0 <= dead.silent_s < 5.3


@given(st.floats(10, 11), st.floats(0, 3), st.integers())
@settings(max_examples=200, deadline=None)
def test_a_stall_of_three_seconds_is_no_death(stalled_s: float, length_s: float, seed: int) -> None:
    found = Loop({"a": [(stalled_s, stalled_s + length_s)]}, seed=seed).run(30)
    assert states(found, "a") in ([], ["suspect", "well"])


def test_an_actor_that_answers_again_is_well() -> None:
    loop = Loop({"a": [(10, 30), (40, 43.9), (50, FOREVER)]})
    assert states(loop.run(60), "a") == ["suspect", "dead", "well", "suspect", "well", "suspect", "dead"]
    well = [verdict.silent_s for _, verdict in loop.verdicts if verdict.state == "well"]
    assert 19.0 <= well[0] < 20.2
    assert 3.0 <= well[1] < 4.2


@given(st.floats(10, 12), st.floats(1.3, 60), st.integers())
@settings(max_examples=100, deadline=None)
def test_an_own_stall_kills_nobody(stalled_s: float, length_s: float, seed: int) -> None:
    end = stalled_s + length_s
    assert Loop({"a": [], "b": []}, own=[(stalled_s, end)], seed=seed).run(end + 30) == []


def test_an_own_stall_does_not_hide_a_frozen_actor() -> None:
    own = [(12.0, 32.0), (33.0, 40.0)]
    found = Loop({"a": [], "b": [(10.0, FOREVER)], "c": [(35.0, FOREVER)]}, own).run(60)
    assert states(found, "a") == []
    times = {verdict.actor: time_s for time_s, verdict in found if verdict.state == "dead"}
    assert 5.0 < times["b"] - 10.0 - 27.0 < 6.5, "the gaps do not count"
    assert 5.0 < times["c"] - 40.0 < 6.0


def test_answers_that_lie_unread_after_an_own_stall_come_in_time() -> None:
    heartbeats = Heartbeats()
    heartbeats.sent("a", 0.0)
    for now in (0.0, 0.9, 1.8, 2.7, 3.6, 4.5, 4.9):
        heartbeats.check(now)
    assert heartbeats.check(24.9) == [], "the answer came meanwhile, and nobody has read it"
    heartbeats.answered("a", 25.0)
    (verdict,) = heartbeats.check(25.0)
    assert (verdict.actor, verdict.state) == ("a", "well")
    assert verdict.silent_s == pytest.approx(5.0)


def test_a_loop_that_is_always_slow_finds_the_frozen_later() -> None:
    heartbeats = Heartbeats()
    heartbeats.sent("a", 0.0)
    found = [(now, verdict.state) for now in range(0, 60, 2) for verdict in heartbeats.check(float(now))]
    assert found == [(14, "suspect"), (22, "dead")]


def test_each_change_is_told_once_and_nothing_of_the_forgotten() -> None:
    heartbeats = Heartbeats()
    heartbeats.sent("a", 0.0)
    heartbeats.sent("b", 0.0)
    told = [verdict for tick in range(80) for verdict in heartbeats.check(tick / 10)]
    assert [(verdict.actor, verdict.state) for verdict in told] == [
        ("a", "suspect"),
        ("b", "suspect"),
        ("a", "dead"),
        ("b", "dead"),
    ]
    heartbeats.forget("a")
    heartbeats.forget("a")
    heartbeats.answered("a", 8.0)
    heartbeats.answered("b", 8.0)
    assert [verdict.actor for verdict in heartbeats.check(8.0)] == ["b"]
    heartbeats.sent("a", 8.0)
    assert heartbeats.check(8.1) == [], "it begins anew"


def test_silence_begins_with_a_ping() -> None:
    heartbeats = Heartbeats()
    heartbeats.sent("a", 0.0)
    heartbeats.answered("a", 0.1)
    assert [heartbeats.check(tick / 2) for tick in range(100)] == [[]] * 100, "nobody asked it"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sent", "answered", "check", "forget"]),
            st.floats(-1e6, 1e6) | st.floats(0, 1),
        ),
        max_size=80,
    )
)
@settings(max_examples=300, deadline=None)
def test_no_clock_and_no_order_of_calls_breaks_it(calls: list[tuple[str, float]]) -> None:
    heartbeats, now, told, counted_s = Heartbeats(), 0.0, "well", 0.0
    for name, passed_s in calls:
        now += passed_s
        counted_s += passed_s if 0 < passed_s <= 1 else 0.5
        if name == "forget":
            heartbeats.forget("a")
            told = "well"
        elif name != "check":
            getattr(heartbeats, name)("a", now)
            counted_s = 0.0 if name == "answered" else counted_s
        else:
            for verdict in heartbeats.check(now):
                assert verdict.state != told
                assert verdict.silent_s >= 0
                assert verdict.state != "dead" or counted_s >= 4.99
                told = verdict.state


@pytest.mark.parametrize(("jump_s", "late_s"), [(-1e9, 0.25), (-3.0, 0.25), (3.0, 0.25), (1e9, 0.25), (0.0, 0.0)])
@pytest.mark.parametrize("jump_tick", [20, 45])
def test_a_clock_that_jumps_is_no_silence_and_hides_none(jump_tick: int, jump_s: float, late_s: float) -> None:
    heartbeats = Heartbeats()
    told = []
    for tick in range(100):
        now = tick / 4 + (jump_s if tick >= jump_tick else 0.0)
        heartbeats.sent("a", now)
        if tick < 40:
            heartbeats.answered("a", now)
        told += [(tick / 4, verdict.state) for verdict in heartbeats.check(now)]
    late_s = late_s if jump_tick == 45 else 0.0
    assert told == [(13.0 + late_s, "suspect"), (15.0 + late_s, "dead")]


@pytest.mark.parametrize("values", [(0.0, 3, 5, 1), (0.5, 0.5, 5, 1), (0.5, 6, 5, 1), (0.5, 3, 5, 0.5)])
def test_times_that_cannot_be(values: tuple[float, float, float, float]) -> None:
    with pytest.raises(InvalidInput, match="heartbeats: an actor is suspect before it is dead"):
        Heartbeats(*values)
