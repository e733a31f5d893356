"""The demand looked at every few seconds, and what the policy decides carried out.

Actors that are asked for wait for a node with room for them: that is what Ray's autoscaler adds nodes for, and nodes
without actors are what it takes away.
"""

from __future__ import annotations

import logging
import time
import uuid

from actors.errors import MoeClusterError
from cluster.config import ExpertsConfig
from cluster.control.scaling import ActorLoad, Demand, ScalingLimits, ScalingState, decide
from cluster.fabric.changes import Changes
from cluster.fabric.crew import Crew
from cluster.fabric.guarded import Guarded
from cluster.fabric.scaling import Scaling

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0


class Autoscaler:
    def __init__(self, state: Guarded, crew: Crew, changes: Changes, scaling: Scaling, config: ExpertsConfig) -> None:
        self._state, self._crew, self._changes, self._scaling = state, crew, changes, scaling
        self._is_on = config.autoscale.enabled
        with state.reading() as coordinator:
            # More actors than groups would hold nothing.
            most = min(config.max_actors, coordinator.placement.num_groups)
        policy = config.autoscale
        self._limits = ScalingLimits(
            max(config.min_actors, config.redundancy),
            most,
            headroom=policy.headroom,
            rise_s=policy.rise_s,
            idle_s=policy.idle_s,
            cool_down_s=policy.cool_down_s,
            max_queue_s=policy.max_queue_s,
        )
        self._memory = ScalingState()
        self._next_look_s = 0.0

    def look(self) -> None:
        """To be called often."""
        now = time.monotonic()
        if not self._is_on or now < self._next_look_s:
            return
        self._next_look_s = now + LOOK_EVERY_S
        busy, num_waiting, queue_s = self._crew.demand()
        with self._state.reading() as coordinator:
            actors = tuple(ActorLoad(busy.get(actor.id, 0.0)) for actor in coordinator.actors())
            job_running = coordinator.jobs.active() is not None
        # Actors that have not reported yet, or died a moment ago, are no sign of what is needed.
        is_changing = self._changes.is_under_way or len(actors) != self._scaling.wanted
        demand = Demand(actors, num_waiting, queue_s, job_running, is_changing)
        decision, self._memory = decide(demand, self._memory, self._limits, now)
        if decision is not None:
            logger.info("from %d to %d expert actors: %s", decision.was, decision.wanted, decision.reason)
            try:
                self._scaling.scale(decision.wanted, f"autoscale-{uuid.uuid4().hex[:12]}")
            except MoeClusterError as error:
                logger.warning("not scaled: %s", error)
