"""Training steps on an expert actor, from *prepared* to the update, and the runs that they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from actors.errors import StepAborted
from actors.expert.exchange import Attempt
from actors.expert.state import State
from actors.expert.updates import PendingUpdate
from actors.optim import OptimizerSettings
from actors.transport.message import Message


class Steps:
    """Called with the host's lock held."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.term = 0
        """Of the router that leads; commits of one before are refused."""
        self._merged_before = 0
        """Updates that had been merged when the last one was put."""

    def prepare(self, question: Message) -> Message:
        """Gradients of this actor are complete; the answer's `square_sum` is over the groups that have no copy.

        From here on only `reduce`, `commit` or `abort` is right.
        """
        state = self._state
        state.enter(question.fields)
        state.step.check_complete()
        while state.step.do_deferred(state.holdings.stacks):
            pass
        state.copies.compress(question.fields)
        state.copies.send_partial_sums(state.holdings, state.step.touched, state.step.attempt)
        state.step.prepare()
        spread, state.step.spread.merged = state.step.spread, state.updates.num_merged - self._merged_before
        return self._norm_of(state.copies.alone(state.groups), spread.fields())

    def reduce(self, question: Message) -> Message:
        """All have prepared: the sums of the groups owned here go to their copies."""
        state = self._state
        attempt = state.step.check_prepared("reduce", question.fields)
        pending = state.copies.reduce(state.holdings, attempt)
        answer = self._norm_of(state.copies.shared(state.groups))
        state.exchange.settle(pending)
        return answer

    def commit(self, question: Message) -> Message:
        """The update is made, or left to be made, and the version is the step. It may be repeated."""
        fields: Any = question.fields
        state, step = self._state, int(fields["step"])
        if step == state.version:
            return Message("ok", {"version": state.version})  # repeated: already done
        if (term := int(fields.get("term", 0))) < self.term:
            raise StepAborted(f"commit of step {step} by a router of term {term}, now is {self.term}")
        state.copies.take_sums(state.holdings, state.step.check_prepared("commit", fields))
        state.copies.keep()
        self._update(step, float(fields["lr"]), float(fields["scale"]))
        state.version = step
        state.end_attempt()
        if state.holdings.leaving:
            state.drained().free_leaving()
        state.arrivals.catch_up()
        if not state.updates.max_lag:
            state.measure()
        return Message("ok", {"version": state.version})

    def _update(self, step: int, lr: float, scale: float) -> None:
        state = self._state
        state.followers.tell(state.holdings, step, lr, scale)
        if state.staleness:
            self._put_update(step, lr, scale)
        else:
            with state.updates.making():
                state.holdings.update(lr, scale)

    def _put_update(self, step: int, lr: float, scale: float) -> None:
        """The gradients of this step go; those of the next begin at zero."""
        state = self._state
        own = frozenset(group for group in state.groups if state.is_own(group))
        then = dict(state.step.weights) if state.holdings.settings.delay_correction else {}
        self._merged_before = state.updates.num_merged
        state.updates.put(PendingUpdate(step, lr, scale, state.holdings.take_gradients(), own, then))

    def abort(self, question: Message) -> Message:
        state = self._state
        if state.step.aborts(Attempt.of(question.fields), state.version):
            state.drop_gradients()
        return Message("ok", {"version": state.version})

    def fence(self, fields: Mapping[str, Any]) -> None:
        """A router has taken over: the version is what it is now, whatever the one before has sent."""
        self.term = max(self.term, int(fields["term"]))

    def begin_run(self, question: Message) -> Message:
        """A new job: its optimizer settings, fresh moments. Groups on their way here have the old ones: dropped."""
        fields: Any = question.fields
        state, settings = self._state, OptimizerSettings(**fields["optimizer"])
        state.loader.check_settings(settings)
        state.updates.drain()
        state.new_run(int(fields.get("run", state.run + 1)))
        state.step.attempt = Attempt(state.version, 0)  # a router before may have left one open
        state.drop_gradients()
        state.holdings.begin_run(settings)
        return Message("ok", {"version": state.version})

    def _norm_of(self, groups: Sequence[int], more: Mapping[str, Any] | None = None) -> Message:
        square = self._state.holdings.square_sum(groups)
        return Message("ok", {"square_sum": square if math.isfinite(square) else None, **(more or {})})
