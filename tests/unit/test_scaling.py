"""The autoscaling policy under a simulated clock and load, scaling by hand, and who goes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.control.scaling import (
    ActorLoad,
    Demand,
    ScaleDecision,
    ScalingLimits,
    ScalingState,
    actors_to_remove,
    changed,
    check_scale,
    decide,
)
from cluster.errors import FailedPrecondition
from cluster.placement.placement import ActorSlot, spread

LIMITS = ScalingLimits(min_actors=1, max_actors=16)
TICK_S = 10.0


def busy(num_actors: int, need: float, **rest: object) -> Demand:
    """`need` actors' work, evenly on so many, each saturated at 1."""
    share = min(need / num_actors, 1.0)
    return replace(Demand((ActorLoad(share),) * num_actors), **rest)  # type: ignore[arg-type]


def waiting(num_actors: int, queue_s: float, need: float = math.inf) -> Demand:
    return busy(num_actors, need, num_waiting=3, queue_s=queue_s)


def simulate(
    num_actors: int, demand_of: Callable[[int], Demand], seconds: float, limits: ScalingLimits = LIMITS
) -> list[ScaleDecision]:
    """A look every 10 s; what is decided is under way until the next one."""
    state, decisions, decision = ScalingState(), [], None
    for tick in range(int(seconds / TICK_S)):
        demand = replace(demand_of(num_actors), is_changing=decision is not None)
        decision, state = decide(demand, state, limits, 1000.0 + tick * TICK_S)
        if decision:
            assert decision.was == num_actors != decision.wanted
            decisions.append(decision)
            num_actors = decision.wanted
    return decisions


def last(start: int, decisions: Sequence[ScaleDecision]) -> int:
    return decisions[-1].wanted if decisions else start


# --- Up ----------------------------------------------------------------------------------------------------------


def test_actors_are_added_when_the_headroom_is_used_up() -> None:
    assert simulate(4, lambda n: busy(n, 3.3), 1000) == [], "3.3 and 20 % are below 4"
    (decision,) = simulate(4, lambda n: busy(n, 3.4), 1000)
    reason = "the work of 3.4 busy actors and 20% headroom is more than 4 do, for 10 s"
    assert decision == ScaleDecision(5, 4, reason)
    assert decision.kind == "scale_up"


def test_a_short_burst_adds_nobody() -> None:
    looks = itertools.count()
    assert simulate(4, lambda n: busy(n, 4.0 if next(looks) % 2 else 1.9), 1000) == []


def test_requests_that_wait_add_actors_at_once() -> None:
    decision, state = decide(waiting(4, 2.5), ScalingState(), LIMITS, 0.0)
    text = "requests waiting: 3, the oldest for 2.5 s, where 2 s are allowed"
    assert decision == ScaleDecision(5, 4, text)
    assert decide(waiting(5, 4.5), state, LIMITS, 4.0)[0] is None, "it came before the change"
    again, _ = decide(waiting(5, 4.5), state, LIMITS, 5.0)
    assert again is not None
    assert again.wanted == 10, "twice as many at most"
    old = changed(ScalingState(seen_s=0.0))
    for now in (30.0, 60.0):
        decision, old = decide(waiting(5, 90.0), old, LIMITS, now)
    assert decision is not None, "after the cool-down even that counts"


def test_requests_that_wait_for_something_else_add_nobody() -> None:
    assert decide(waiting(4, 60.0, need=0.3), ScalingState(), LIMITS, 0.0)[0] is None
    assert decide(waiting(4, 60.0, need=0.5), ScalingState(), LIMITS, 0.0)[0] is not None
    assert decide(waiting(4, 2.0), ScalingState(), LIMITS, 0.0)[0] is None, "within the bound"
    assert decide(busy(4, 3.0, queue_s=9.0), ScalingState(), LIMITS, 0.0)[0] is None, "nobody waits"
    assert decide(waiting(16, 60.0), ScalingState(), LIMITS, 0.0)[0] is None, "at the maximum"


def test_a_step_in_the_demand_is_met_one_cool_down_after_the_other() -> None:
    found = simulate(2, lambda n: busy(n, 8.0), 3600)
    assert [decision.wanted for decision in found] == [3, 4, 5, 6, 8, 10]


# --- Down --------------------------------------------------------------------------------------------------------


def test_actors_go_after_a_long_time_and_by_half() -> None:
    assert simulate(8, lambda n: busy(n, 1.0), 300) == []
    found = simulate(8, lambda n: busy(n, 1.0), 3600)
    assert [decision.wanted for decision in found] == [4, 2], "1.0 with headroom and hysteresis is 1.38"
    assert found[0].reason == "the demand fitted 2 for 300 s"
    assert found[0].kind == "scale_down"


def test_the_highest_demand_of_the_idle_time_counts() -> None:
    looks = itertools.count()
    found = simulate(8, lambda n: busy(n, 4.0 if next(looks) == 20 else 0.5), 310)
    assert [decision.wanted for decision in found] == [6]


def test_nobody_goes_while_requests_wait_or_the_load_is_not_known() -> None:
    assert simulate(8, lambda n: waiting(n, 60.0, need=0.5), 1000) == []
    assert simulate(8, lambda n: Demand((ActorLoad(0.0, capacity=0.0),) * n), 1000) == []
    assert simulate(8, lambda n: Demand((ActorLoad(math.nan, math.nan),) * n), 1000) == []


def test_an_actor_that_died_meanwhile_is_not_taken_again() -> None:
    state = ScalingState(seen_s=0.0, below_s=299.0, fits=3)
    decision, state = decide(busy(3, 0.1), state, LIMITS, 5.0)
    assert (decision, state.below_s, state.fits) == (None, 0.0, 1)


def lockstep(num_actors: int, trunk_s: float, experts_s: float) -> Demand:
    """A job whose steps take the trunk's time and then the experts'."""
    share_s = experts_s / num_actors
    return Demand((ActorLoad(share_s / (trunk_s + share_s)),) * num_actors, job_running=True)


def test_a_running_job_keeps_the_actors_that_make_it_fast() -> None:
    assert simulate(8, lambda n: lockstep(n, 1.0, 4.0), 36_000) == []
    found = simulate(8, lambda n: lockstep(n, 1.0, 0.4), 36_000)
    assert [decision.wanted for decision in found] == [4, 3], "not one after the other until the step is all experts"
    found = simulate(2, lambda n: lockstep(n, 1.0, 40.0), 3600)
    assert last(2, found) == 8, "busy for 83 % of the time"


# --- Neither -----------------------------------------------------------------------------------------------------


def test_the_demand_changes_nothing_during_the_cool_down() -> None:
    state = ScalingState(seen_s=0.0, since_change_s=0.0)
    for now in range(1, 60):
        decision, state = decide(busy(4, 4.0), state, LIMITS, float(now))
        assert decision is None
    assert decide(busy(4, 4.0), state, LIMITS, 60.0)[0] is not None


def test_a_change_under_way_is_waited_for() -> None:
    state = ScalingState(seen_s=0.0, above_s=100.0)
    decision, state = decide(replace(waiting(4, 60.0), is_changing=True), state, LIMITS, 5.0)
    assert (decision, state) == (None, ScalingState(seen_s=5.0, since_change_s=0.0, queue_s=60.0))


def test_a_number_outside_the_limits_is_put_right() -> None:
    limits = replace(LIMITS, min_actors=3, max_actors=6)
    (up,) = simulate(2, lambda n: busy(n, 0.1), 100, limits)
    assert (up.wanted, up.reason) == (3, "2 expert actors are outside 3 to 6")
    assert simulate(20, lambda n: busy(n, 20.0), 100, limits)[0].wanted == 6
    assert decide(Demand(()), ScalingState(), limits, 0.0)[0] == ScaleDecision(
        3, 0, "0 expert actors are outside 3 to 6"
    )


def test_work_is_measured_in_actors_of_average_capacity() -> None:
    assert Demand((ActorLoad(50, 100), ActorLoad(100, 100), ActorLoad(150, 400))).need == 1.5
    assert Demand((ActorLoad(50, 100), ActorLoad(25, capacity=0))).need == 0.75
    assert Demand((ActorLoad(5, 0),)).need is None
    limits = replace(LIMITS, headroom=0.25)
    assert simulate(3, lambda n: Demand((ActorLoad(0.8),) * n), 100, limits) == [], "3.0000000000000004 is 3"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("min_actors", 0, r"experts\.min_actors: is below 1 \(got 0\); use 1 or more"),
        ("max_actors", 1, r"experts\.max_actors: is below experts\.min_actors 2 \(got 1\); use 2 or more"),
        ("headroom", 0.0, r"experts\.headroom: is not above 0"),
        ("hysteresis", math.nan, r"experts\.hysteresis"),
        ("cool_down_s", math.inf, r"experts\.cool_down_s"),
        ("idle_s", -1.0, r"experts\.idle_s"),
        ("job_busy", 0.0, r"experts\.job_busy: is outside \(0, 1\]"),
        ("max_gap_s", 0.0, r"experts\.max_gap_s"),
    ],
)
def test_limits_that_cannot_be(name: str, value: float, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        replace(ScalingLimits(2, 4), **{name: value})  # type: ignore[arg-type]


# --- Any demand --------------------------------------------------------------------------------------------------

NEEDS = st.floats(0, 40)
ANY_LIMITS = st.builds(
    lambda low, more, headroom, hysteresis: ScalingLimits(low, low + more, headroom, hysteresis),
    st.integers(1, 6),
    st.integers(0, 30),
    st.sampled_from([0.05, 0.2, 1.0]),
    st.sampled_from([0.0, 0.15, 0.5]),
)


@given(st.integers(1, 40), NEEDS, ANY_LIMITS, st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_constant_demand_is_met_and_then_nothing_changes(
    start: int, need: float, limits: ScalingLimits, job_running: bool
) -> None:
    found = simulate(start, lambda n: busy(n, need, job_running=job_running), 4000, limits)
    start = min(max(start, limits.min_actors), limits.max_actors)
    assert len({decision.kind for decision in found if limits.min_actors <= decision.was <= limits.max_actors}) <= 1
    end = last(start, found)
    assert end >= min(need * (1 + limits.headroom), limits.max_actors) - 1e-6
    if not job_running and end > limits.min_actors:
        spare = (1 + limits.headroom) * (1 + limits.hysteresis)
        assert end <= max(start, math.ceil(need * (1 + limits.headroom)) + 1)
        assert end < need * spare + 1 + 1e-6, "no more than fit"


@given(st.integers(1, 16), st.floats(0, 12), st.integers(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_noise_within_the_hysteresis_never_takes_what_must_come_back(
    start: int, need: float, seed: int, job_running: bool
) -> None:
    random = Random(seed)

    def noisy(n: int) -> Demand:
        return busy(n, need * random.uniform(1.0, 1.15), job_running=job_running)

    kinds = [decision.kind for decision in simulate(start, noisy, 4000)]
    assert kinds == sorted(kinds, reverse=True), "ups come before downs"


@given(st.integers(1, 16), st.floats(0.5, 12), st.floats(0, 20))
@example(start=1, need=0.75, backlog=17.0)
@settings(max_examples=200, deadline=None)
def test_a_backlog_is_met_within_a_bound_of_decisions(start: int, need: float, backlog: float) -> None:
    """`backlog`: work that waits in the beginning, in seconds of one actor."""

    def served(n: int) -> Demand:
        nonlocal backlog
        demand = busy(n, n if backlog else need, num_waiting=int(backlog > 0), queue_s=backlog / max(need, 0.1))
        backlog = max(0.0, backlog + (need - n) * TICK_S)
        return demand

    found = simulate(start, served, 4000)
    kinds = [decision.kind for decision in found]
    assert kinds == sorted(kinds, reverse=True), "ups come before downs"
    assert last(start, found) >= need
    grown, bound = start, 1
    while grown < 1.2 * need:
        grown, bound = max(grown + 1, math.ceil(1.2 * grown - 1e-9)), bound + 1
    assert kinds.count("scale_up") <= bound


ANY_LOADS = st.lists(st.builds(ActorLoad, st.floats(), st.floats()), max_size=12).map(tuple)
ANY_DEMANDS = st.builds(Demand, ANY_LOADS, st.integers(0, 5), st.floats(), st.booleans(), st.booleans())
EVEN_DEMANDS = st.builds(
    lambda n, share, queue_s: Demand((ActorLoad(share),) * n, 1, queue_s),
    st.integers(1, 12),
    st.floats(0, 1),
    st.sampled_from([0.0, 1.0, 3.0, 30.0]),
)


@given(st.lists(st.tuples(ANY_DEMANDS | EVEN_DEMANDS, st.floats(-100, 100)), max_size=60), ANY_LIMITS)
@settings(max_examples=300, deadline=None)
def test_limits_steps_and_cool_down_hold_whatever_comes(
    looks: list[tuple[Demand, float]], limits: ScalingLimits
) -> None:
    state, now, quiet_s = ScalingState(), 0.0, math.inf
    for demand, passed_s in looks:
        now += passed_s
        quiet_s += max(0.0, passed_s)
        decision, state = decide(demand, state, limits, now)
        if decision is None:
            continue
        assert not demand.is_changing
        assert limits.min_actors <= decision.wanted <= limits.max_actors
        assert decision.wanted >= min(math.ceil(demand.num_actors / 2), limits.max_actors)
        if quiet_s < limits.cool_down_s:
            assert decision.kind == "scale_up"
            assert demand.queue_s > limits.max_queue_s
        quiet_s = 0.0


@given(st.lists(st.floats(-1e6, 0.0), max_size=100), st.sampled_from([0.0, 4.0]))
@settings(deadline=None)
def test_a_clock_that_runs_backwards_scales_nothing(jumps: list[float], need: float) -> None:
    now, state = 1e9, ScalingState(seen_s=1e9, above_s=0.0, below_s=290.0, fits=1)
    for jump in jumps:
        now += jump
        decision, state = decide(busy(4, need), state, LIMITS, now)
        assert decision is None


def test_a_clock_that_was_set_back_delays_nothing() -> None:
    state = ScalingState()
    for now in [*range(0, 300, 10), *range(-5000, -4990, 10)]:
        decision, state = decide(busy(4, 1.0), state, LIMITS, float(now))
        assert decision is None
    assert state.below_s == 290.0
    assert decide(busy(4, 1.0), state, LIMITS, -4990.0)[0] is not None


def test_a_clock_that_jumps_ahead_counts_for_half_a_minute() -> None:
    state = ScalingState()
    for now in (0.0, 1.0, 1e6):
        decision, state = decide(busy(4, 0.1), state, LIMITS, now)
        assert decision is None
    assert state.below_s == 31.0


# --- By hand -----------------------------------------------------------------------------------------------------


def test_scaling_by_hand() -> None:
    assert check_scale(3, 2, LIMITS, None)
    assert not check_scale(2, 2, LIMITS, None), "nothing to do"
    assert check_scale(3, 2, LIMITS, None, redundancy=2, num_nodes=1), "whoever adds may be about to add the node"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (17, r"experts\.actors: is above experts\.max_actors 16 \(got 17\); use at most 16"),
        (1, r"experts\.actors: is below experts\.min_actors 2 \(got 1\); use 2 or more"),
        (2, r"experts\.actors: is too few for experts\.redundancy 3: .* \(got 2\); use 3 or more"),
    ],
)
def test_numbers_that_cannot_be(wanted: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_scale(wanted, 4, replace(LIMITS, min_actors=2), "a rebalance", redundancy=3)


def test_numbers_that_cannot_be_now() -> None:
    with pytest.raises(FailedPrecondition, match="scaling from 2 to 4 is under way; try again when it is done"):
        check_scale(3, 2, LIMITS, "scaling from 2 to 4")
    with pytest.raises(FailedPrecondition, match=r"are on 1 node, and experts\.redundancy 2 needs 2"):
        check_scale(3, 4, LIMITS, None, redundancy=2, num_nodes=1)


# --- Who goes ----------------------------------------------------------------------------------------------------


def slots(text: str) -> list[ActorSlot]:
    """`a1 b1 c2`: a and b on node 1, c on node 2."""
    return [ActorSlot(word[0], word[1:]) for word in text.split()]


def test_those_with_the_fewest_groups_go_first() -> None:
    placement = Placement(1, (("a",), ("a",), ("b",), ("c",), ("c",)), 1)
    assert actors_to_remove(placement, slots("a1 b2 c3"), 2, redundancy=1) == ("b",)
    assert actors_to_remove(placement, slots("a1 b2 c3 d3"), 2, redundancy=1) == ("d", "b"), "d holds nothing"
    assert actors_to_remove(placement, slots("a1 b2 c3"), 3, redundancy=1) == ()
    assert actors_to_remove(placement, slots("a1 c1 b2"), 2, redundancy=1) == ("b",), "however full its node is"


def test_a_group_with_copies_enough_does_not_move() -> None:
    placement = Placement(1, (("a", "b", "c"), ("a", "c"), ("b", "c"), ("c", "a")), 1)
    assert actors_to_remove(placement, slots("a1 b2 c3"), 2, redundancy=1) == ("b",), "of three with nothing to move"
    assert actors_to_remove(placement, slots("a1 b2 c3"), 2, redundancy=2) == ("b",)
    assert actors_to_remove(placement, slots("a1 b2 c3"), 1, redundancy=1) == ("b", "a")


def test_a_group_that_has_copies_too_few_counts_as_a_move() -> None:
    placement = Placement(1, (("a", "b"), ("a", "b"), ("a", "b", "c")), 1)
    assert actors_to_remove(placement, slots("a1 b2 c3"), 2, redundancy=2) == ("c",)
    placement = Placement(1, (("a", "b"), ("c", "b", "d"), ("d", "c", "b")), 1)
    assert actors_to_remove(placement, slots("a1 b2 c3 d4"), 3, redundancy=2) == ("d",), "a holds less, but moves more"


def test_nodes_are_kept_for_redundancy() -> None:
    placement = spread(8, 1, slots("a1 b1 c1 d2"))
    assert actors_to_remove(placement, slots("a1 b1 c1 d2"), 2, redundancy=2) == ("c", "b")
    assert actors_to_remove(placement, slots("a1 b1 c1 d2"), 1, redundancy=2) == ("c", "b", "d")
    placement = spread(9, 1, slots("a1 b1 c1"))
    assert actors_to_remove(placement, slots("a1 b1 c1 d2"), 2, redundancy=2) == ("c", "b"), "though d holds nothing"


def test_of_equal_ones_the_newest_on_the_fullest_node_goes() -> None:
    placement = spread(10, 1, slots("a1 b1 c2 d2 e2"))
    assert actors_to_remove(placement, slots("a1 b1 c2 d2 e2"), 3, redundancy=1) == ("e", "d")


def test_drained_nodes_come_first() -> None:
    placement = spread(8, 1, slots("a1 b2 c2 d3"), redundancy=2)
    actors = slots("a1 b2 c2 d3")
    assert set(actors_to_remove(placement, actors, 2, 2, leaving={"2"})) == {"b", "c"}
    assert actors_to_remove(placement, actors, 3, 2, leaving={"1"}) == ("a",)
    assert actors_to_remove(placement, slots("a1 b2 c2"), 2, 2, leaving={"1"}) == ("a",), "it will not stay anyway"
    assert actors_to_remove(placement, actors, 3, 3, leaving={"1", "2"})[0] in "bc", "nodes are kept if possible"
    assert actors_to_remove(placement, actors, 3, 1, leaving={"9"}) == actors_to_remove(placement, actors, 3, 1)


def test_somebody_must_stay() -> None:
    with pytest.raises(InvalidInput, match="keep 1 or more"):
        actors_to_remove(spread(2, 1, slots("a1 b2")), slots("a1 b2"), 0, 1)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[Placement, list[ActorSlot], int, int, set[str]]:
    actors = [ActorSlot(name, draw(st.sampled_from("1234"))) for name in "abcdefg"[: draw(st.integers(1, 7))]]
    held = st.lists(st.sampled_from("abcdefgh"), max_size=3, unique=True).map(tuple)
    placement = Placement(1, tuple(draw(st.lists(held, min_size=1, max_size=8))), 1)
    leaving = draw(st.sets(st.sampled_from("1234"), max_size=2))
    return placement, actors, draw(st.integers(1, 8)), draw(st.integers(1, 3)), leaving


@given(fleets())
@settings(max_examples=300, deadline=None)
def test_any_fleet_keeps_as_many_nodes_as_it_needs(
    fleet: tuple[Placement, list[ActorSlot], int, int, set[str]],
) -> None:
    placement, actors, keep, redundancy, leaving = fleet
    gone = actors_to_remove(placement, actors, keep, redundancy, leaving)
    assert gone == actors_to_remove(placement, actors, keep, redundancy, leaving), "deterministic"
    assert len(set(gone)) == len(gone) == max(0, len(actors) - keep)
    is_leaving = [actor.node in leaving for name in gone for actor in actors if actor.id == name]
    assert is_leaving == sorted(is_leaving, reverse=True)
    good = [actor for actor in actors if actor.node not in leaving]
    stay = [actor for actor in actors if actor.id not in gone]
    if all(actor in stay for actor in good):
        return
    assert all(actor in good for actor in stay), "nobody of a drained node stays in the place of another"
    assert len({actor.node for actor in stay}) >= min(redundancy, len({actor.node for actor in good}), keep)


@given(fleets())
@settings(max_examples=200, deadline=None)
def test_one_that_goes_has_the_fewest_groups_to_move(
    fleet: tuple[Placement, list[ActorSlot], int, int, set[str]],
) -> None:
    placement, actors, *_ = fleet
    if len(actors) < 2:
        return
    alive = {actor.id for actor in actors}

    def num_lost(name: str) -> int:
        return sum(name in held and not alive & set(held) - {name} for held in placement.holders)

    (gone,) = actors_to_remove(placement, [replace(actor, node=actor.id) for actor in actors], len(actors) - 1, 1)
    assert num_lost(gone) == min(map(num_lost, alive))
