"""Which fault strikes when, and whom. Pure: the same seed gives the same faults, however long the cluster heals."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from actors.errors import InvalidInput
from cluster.backend import ActorStatus, ClusterStatus

Kind = Literal["kill", "freeze", "stall", "node", "scale", "router", "cut", "coordinator"]
"""kill: kill -9 of an expert actor. freeze: SIGSTOP of one, for longer than heartbeats may be missing. stall: the same
for less than that. node: kill -9 of a node with all of its expert actors, two with experts.actors and
experts.max_actors of 4 on 2 nodes, which leaves them no other room; it comes back by `ray.revive_after_s`.
scale: one expert actor more or fewer. router: kill -9 of a router. cut: all links of an expert actor end while its
process lives, and once more those that are opened then. coordinator: kill -9 of it."""
NOBODY: tuple[Kind, ...] = ("scale", "coordinator")
"""Faults that hit none of the actors that the status tells of."""
KINDS: tuple[Kind, ...] = get_args(Kind)
DEFAULT_KINDS: tuple[Kind, ...] = ("kill", "freeze", "stall", "scale")

STALL_S = 3.0
"""A stalled process runs again after this: before an actor counts as dead (5 s, `cluster.control.heartbeats`)."""
CUT_AGAIN_S = 1.0
"""After a cut, the second one: a step that is hit by both has tries left (`router.max_step_retries`)."""
FREEZE_S = 20.0
"""A frozen process would run again after this, if it still exists: it must not."""


@dataclass(frozen=True)
class Fault:
    number: int
    """From 1."""
    kind: Kind
    gap_s: float
    """From the fault before it, or the beginning of the phase."""
    pick: float
    """In [0, 1): which of those that could be hit."""


def faults(seed: int, mtbf_s: float, min_gap_s: float, kinds: Sequence[Kind]) -> Iterator[Fault]:
    """Without end. Gaps are exponential above `min_gap_s`, with the mean `mtbf_s`; every kind comes once a round."""
    _require(bool(kinds), "kinds", "is empty", None, f"use some of {', '.join(KINDS)}")
    _require(0 <= min_gap_s <= mtbf_s, "min_gap", "is not from 0 to the mean gap", min_gap_s, f"use at most {mtbf_s:g}")
    _require(mtbf_s > 0, "mtbf", "is not above 0", mtbf_s, "use a number of seconds above 0")
    return _faults(random.Random(seed), mtbf_s, min_gap_s, list(dict.fromkeys(kinds)))


def _faults(chance: random.Random, mtbf_s: float, min_gap_s: float, kinds: list[Kind]) -> Iterator[Fault]:
    number = 0
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            number += 1
            above_s = chance.expovariate(1 / (mtbf_s - min_gap_s)) if mtbf_s > min_gap_s else 0.0
            yield Fault(number, kind, min_gap_s + above_s, chance.random())


def victims(fault: Fault, status: ClusterStatus) -> tuple[ActorStatus, ...]:
    """Actors that the fault hits; none for `NOBODY`."""
    actors = ready(status, "router" if fault.kind == "router" else "expert")
    if fault.kind in NOBODY or not actors:
        return ()
    if fault.kind != "node":
        return (actors[int(fault.pick * len(actors))],)
    nodes = sorted({actor.node for actor in actors})
    node = nodes[int(fault.pick * len(nodes))]
    return tuple(actor for actor in actors if actor.node == node)


def scale_target(fault: Fault, here: int, base: int, least: int, most: int) -> int:
    """One expert actor more or fewer than `here`, within the bounds: back to `base` where it is off it."""
    if here != base:
        return here + (1 if here < base else -1)
    can_grow, can_shrink = here < most, here > least
    _require(can_grow or can_shrink, "kinds", "scale is impossible with these bounds", (least, most), "widen them")
    return here + 1 if can_grow and (fault.pick < 0.5 or not can_shrink) else here - 1


def ready(status: ClusterStatus, role: str) -> tuple[ActorStatus, ...]:
    """By id."""
    found = [actor for actor in status.actors if actor.role == role and actor.state == "ready"]
    return tuple(sorted(found, key=lambda actor: actor.id))


def ready_experts(status: ClusterStatus) -> tuple[ActorStatus, ...]:
    return ready(status, "expert")


def what_is_missing(status: ClusterStatus, wanted: int, gone: Collection[int] = ()) -> str:
    """Why this is no moment for a fault, since the cluster has one already; empty if all is as it should be.

    `gone`: processes that were hit for good: as long as they are told to be there, nobody has noticed. Not names: the
    last router that dies has a successor of its own name.
    """
    experts = ready_experts(status)
    if unnoticed := [actor.id for actor in (*experts, *ready(status, "router")) if actor.pid in gone]:
        return f"{', '.join(unnoticed)} not missed yet"
    if not status.ready:
        return status.message or "not ready"
    if len(experts) != wanted:
        return f"{len(experts)} of {wanted} expert actors"
    return status.message


def _require(condition: bool, field: str, message: str, value: object, remedy: str) -> None:
    if not condition:
        raise InvalidInput(message, field=field, value=value, remedy=remedy)
