"""How many expert actors there should be, and which of them go. Pure: the edge measures, starts and stops them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from actors.errors import InvalidInput
from actors.values import Placement
from cluster.errors import FailedPrecondition
from cluster.placement.placement import ActorSlot

_ROUNDING = 1e-9
"""Actors: 5.0000000001 actors' work fits five."""


@dataclass(frozen=True)
class ScalingLimits:
    """`InvalidInput` for those that cannot be."""

    min_actors: int
    max_actors: int
    headroom: float = 0.2
    """Demand counts for so much more: at 0.2 actors are added when they are busier than 83 % of the time. Not 0:
    saturated actors show no demand above what they are."""
    hysteresis: float = 0.15
    """Fewer actors must fit the demand, headroom included, with so much to spare."""
    cool_down_s: float = 60.0
    """After a change the demand alone changes nothing for so long."""
    rise_s: float = 10.0
    """Demand must be too high for so long, that one burst adds nobody."""
    idle_s: float = 300.0
    """Demand must fit fewer actors for so long."""
    max_queue_s: float = 2.0
    """Requests that wait longer add actors."""
    queue_busy: float = 0.1
    """Unless actors are busy for less than this share of the time: then requests wait for something else."""
    job_busy: float = 0.15
    """While a job runs, actors are taken only as long as the others stay busy for at most this share of the time. Steps
    get slower with each, and the demand falls with the steps: without a bound of its own it would fit ever fewer."""
    max_gap_s: float = 30.0
    """Time between two looks counts for at most so much: nobody saw the demand meanwhile, or the clock jumped."""

    def __post_init__(self) -> None:
        _require(self.min_actors >= 1, "min_actors", "is below 1", self.min_actors, "use 1 or more")
        low, high = self.min_actors, self.max_actors
        _require(high >= low, "max_actors", f"is below experts.min_actors {low}", high, f"use {low} or more")
        for name in ("headroom", "max_gap_s"):
            value = getattr(self, name)
            _require(0 < value < math.inf, name, "is not above 0", value, "use a number above 0")
        for name in ("hysteresis", "cool_down_s", "rise_s", "idle_s", "max_queue_s", "queue_busy"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, "is not a number from 0 on", value, "use 0 or more")
        _require(0 < self.job_busy <= 1, "job_busy", "is outside (0, 1]", self.job_busy, "use a share of the time")


@dataclass(frozen=True)
class ActorLoad:
    """Of one living expert actor over the last window, e.g. 10 s. Both in one unit: pairs a second, or seconds of
    expert time a second, where the capacity is 1."""

    handled: float
    capacity: float = 1.0
    """0 where it is not known yet: then it is taken for an average one."""


@dataclass(frozen=True)
class Demand:
    actors: tuple[ActorLoad, ...]
    num_waiting: int = 0
    """Requests that wait for their turn."""
    queue_s: float = 0.0
    """How long the oldest of them has waited."""
    job_running: bool = False
    is_changing: bool = False
    """Actors are on their way in or out: nothing is decided, and the cool-down begins when that ends."""

    @property
    def num_actors(self) -> int:
        return len(self.actors)

    @property
    def need(self) -> float | None:
        """Actors of average capacity that this work would keep busy all the time, if it were even: to make it so is
        the planner's part. None where no capacity is known."""
        capacities = [actor.capacity for actor in self.actors if 0 < actor.capacity < math.inf]
        handled = sum(actor.handled for actor in self.actors if 0 <= actor.handled < math.inf)
        need = handled * len(capacities) / sum(capacities) if capacities else math.nan
        return None if math.isnan(need) else need


@dataclass(frozen=True)
class ScalingState:
    """What `decide` remembers. It holds durations, not times, so that a clock that jumps spoils nothing."""

    seen_s: float | None = None
    """Time of the last look."""
    since_change_s: float | None = None
    """None: no change yet."""
    above_s: float | None = None
    """How long the demand has been too high; None: it is not."""
    below_s: float | None = None
    """How long the demand has fitted fewer actors; None: it does not."""
    fits: int = 0
    """Actors that fitted it all that time."""
    queue_s: float = 0.0
    """How long the oldest request had waited at the last look."""


@dataclass(frozen=True)
class ScaleDecision:
    wanted: int
    """Expert actors there should be."""
    was: int
    reason: str

    @property
    def kind(self) -> str:
        """As in the ledger."""
        return "scale_up" if self.wanted > self.was else "scale_down"


def decide(
    demand: Demand, state: ScalingState, limits: ScalingLimits, now: float
) -> tuple[ScaleDecision | None, ScalingState]:
    """To be called every few seconds with the state it returned last. A decision counts as carried out."""
    before, state = state, _look(demand, state, limits, now)
    if demand.is_changing:
        return None, changed(state)
    decision = _for_waiting(demand, state, before.queue_s, limits)
    if decision is None and not _cools_down(state, limits):
        decision = _into_limits(demand, limits) or _up(demand, state, limits) or _down(demand, state, limits)
    return decision, changed(state) if decision else state


def changed(state: ScalingState) -> ScalingState:
    """After a change that `decide` did not ask for, e.g. by hand or by a death: the demand is measured anew."""
    return ScalingState(seen_s=state.seen_s, since_change_s=0.0, queue_s=state.queue_s)


def _look(demand: Demand, state: ScalingState, limits: ScalingLimits, now: float) -> ScalingState:
    passed_s = 0.0 if state.seen_s is None else min(max(0.0, now - state.seen_s), limits.max_gap_s)
    high, fits = _actors_for(demand, limits, spare=False), _actors_for(demand, limits, spare=True)
    is_above = high is not None and high > demand.num_actors
    is_below = fits is not None and fits < demand.num_actors and not _is_waiting(demand, limits)
    if state.fits >= demand.num_actors:  # some are gone meanwhile
        state = replace(state, below_s=None, fits=0)
    return ScalingState(
        seen_s=now,
        since_change_s=None if state.since_change_s is None else state.since_change_s + passed_s,
        above_s=_longer(state.above_s, passed_s) if is_above else None,
        below_s=_longer(state.below_s, passed_s) if is_below else None,
        fits=max(fits or 0, state.fits) if is_below else 0,
        queue_s=demand.queue_s,
    )


def _longer(duration_s: float | None, passed_s: float) -> float:
    return 0.0 if duration_s is None else duration_s + passed_s


def _actors_for(demand: Demand, limits: ScalingLimits, *, spare: bool) -> int | None:
    """Actors that fit the demand, with room to `spare` or just so; None where it is not known."""
    if demand.need is None:
        return None
    share = 1 / (1 + limits.headroom)
    if spare:
        share /= 1 + limits.hysteresis
        share = min(share, limits.job_busy) if demand.job_running else share
    wanted = math.ceil(min(demand.need / share, limits.max_actors) - _ROUNDING)
    return max(wanted, limits.min_actors)


def _cools_down(state: ScalingState, limits: ScalingLimits) -> bool:
    return state.since_change_s is not None and state.since_change_s < limits.cool_down_s


def _is_waiting(demand: Demand, limits: ScalingLimits) -> bool:
    return demand.num_waiting > 0 and demand.queue_s > limits.max_queue_s


def _for_waiting(
    demand: Demand, state: ScalingState, queue_before_s: float, limits: ScalingLimits
) -> ScaleDecision | None:
    """The longer they wait the more, up to twice as many: a saturated actor does not tell how much is asked."""
    now = demand.num_actors
    # Right after a change: one that came before it says nothing of what there is since, and a queue that gets shorter
    # needs time alone.
    is_settled = _cools_down(state, limits) and (
        demand.queue_s > (state.since_change_s or 0.0) or demand.queue_s < queue_before_s
    )
    is_idle = demand.need is not None and demand.need < limits.queue_busy * now
    if not _is_waiting(demand, limits) or is_settled or is_idle:
        return None
    factor = min(demand.queue_s / limits.max_queue_s, 2.0) if limits.max_queue_s else 2.0
    wanted = max(now + 1, math.ceil(now * factor), _actors_for(demand, limits, spare=False) or 0, limits.min_actors)
    wanted = min(wanted, limits.max_actors)
    waiting = f"requests waiting: {demand.num_waiting}, the oldest for {demand.queue_s:.1f} s"
    reason = f"{waiting}, where {limits.max_queue_s:g} s are allowed"
    return ScaleDecision(wanted, now, reason) if wanted > now else None


def _into_limits(demand: Demand, limits: ScalingLimits) -> ScaleDecision | None:
    now = demand.num_actors
    wanted = min(max(now, limits.min_actors), limits.max_actors)
    allowed = f"{limits.min_actors} to {limits.max_actors}"
    return ScaleDecision(wanted, now, f"{now} expert actors are outside {allowed}") if wanted != now else None


def _up(demand: Demand, state: ScalingState, limits: ScalingLimits) -> ScaleDecision | None:
    wanted = _actors_for(demand, limits, spare=False)
    if wanted is None or state.above_s is None or state.above_s < limits.rise_s:
        return None
    work = f"the work of {demand.need:.1f} busy actors and {limits.headroom:.0%} headroom"
    reason = f"{work} is more than {demand.num_actors} do, for {state.above_s:.0f} s"
    return ScaleDecision(wanted, demand.num_actors, reason)


def _down(demand: Demand, state: ScalingState, limits: ScalingLimits) -> ScaleDecision | None:
    if state.below_s is None or state.below_s < limits.idle_s:
        return None
    # Half at most: what the last minutes asked for is no promise.
    wanted = max(state.fits, math.ceil(demand.num_actors / 2))
    return ScaleDecision(wanted, demand.num_actors, f"the demand fitted {state.fits} for {state.below_s:.0f} s")


# --- By hand -----------------------------------------------------------------------------------------------------


def check_scale(
    wanted: int,
    now: int,
    limits: ScalingLimits,
    running: str | None,
    *,
    redundancy: int = 1,
    num_nodes: int | None = None,
) -> bool:
    """Whether there is something to do for who asks for `wanted` expert actors where `now` live.

    `running`: the scaling operation under way. `num_nodes`: nodes that may carry them. `InvalidInput` for a number that
    cannot be, `FailedPrecondition` for one that cannot be now.
    """
    low, high = limits.min_actors, limits.max_actors
    _require(wanted <= high, "actors", f"is above experts.max_actors {high}", wanted, f"use at most {high}")
    _require(wanted >= low, "actors", f"is below experts.min_actors {low}", wanted, f"use {low} or more")
    too_few = f"is too few for experts.redundancy {redundancy}: the copies of a group go to different actors"
    _require(wanted >= redundancy, "actors", too_few, wanted, f"use {redundancy} or more")
    if running:
        raise FailedPrecondition(f"{running} is under way; try again when it is done")
    # Who adds actors may be about to add the node.
    if wanted < now and num_nodes is not None and num_nodes < redundancy:
        nodes = f"{num_nodes} node{'' if num_nodes == 1 else 's'}"
        raise FailedPrecondition(
            f"expert actors are on {nodes}, and experts.redundancy {redundancy} needs {redundancy}; add a node first"
        )
    return wanted != now


# --- Who goes ----------------------------------------------------------------------------------------------------


def actors_to_remove(
    placement: Placement, actors: Sequence[ActorSlot], keep: int, redundancy: int, leaving: Collection[str] = ()
) -> tuple[str, ...]:
    """Who of the living `actors` goes so that `keep` stay, first to last.

    `leaving`: nodes that are being drained. Theirs go first whatever the redundancy, which they could not serve for
    long. Of the others go those that leave `redundancy` nodes, where `keep` allows it, and as many zones, then those
    with the fewest groups to move, one by one; then those on the fullest node, and the newest.
    """
    _require(keep >= 1, "actors", "is below 1", keep, "keep 1 or more")
    place = {actor.id: number for number, actor in enumerate(actors)}
    held = {actor.id: placement.held_by(actor.id) for actor in actors}
    node_of = {actor.id: actor.node for actor in actors}
    """Of those that stay so far."""
    zone_of = {actor.id: actor.zone for actor in actors}

    def cost(actor: str) -> tuple[bool, bool, int, int, int, int]:
        sizes, zones = Counter(node_of.values()), Counter(zone_of[other] for other in node_of)
        loses_node = len(sizes) <= redundancy and sizes[node_of[actor]] == 1
        loses_zone = 1 < len(zones) <= redundancy and zones[zone_of[actor]] == 1
        others = ({node_of[o] for o in placement.holders[g] if o in node_of and o != actor} for g in held[actor])
        num_moves = sum(len(nodes) < redundancy for nodes in others)
        return loses_node, loses_zone, num_moves, -sizes[node_of[actor]], len(held[actor]), -place[actor]

    gone: list[str] = []
    while len(node_of) > keep:
        gone.append(min([actor for actor in node_of if node_of[actor] in leaving] or node_of, key=cost))
        del node_of[gone[-1]]
    return tuple(gone)


def _require(condition: bool, name: str, message: str, value: object, remedy: str) -> None:
    if not condition:
        raise InvalidInput(message, field=f"experts.{name}", value=value, remedy=remedy)
