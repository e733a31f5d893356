"""A router's training steps: each a transaction over the expert actors and all routers, tried again after a fault."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from actors.errors import LinkError, NonFinite, StepAborted
from actors.expert.exchange import Attempt
from actors.optim import square_sum
from actors.router.accumulation import Accumulation
from actors.router.buckets import Buckets
from actors.router.division import Part
from actors.router.placing import Placing
from actors.router.replicas import Tally
from actors.router.state import State
from actors.staleness import Spread
from actors.transport.contract import Pending
from actors.values import StepReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What a step does with the gradients."""

    lr: float
    scale: float
    """Of the gradients, after clipping."""
    bias_speed: float
    """Gamma of the loss-free balance (S13)."""


class Steps:
    """One thread at a time."""

    def __init__(self, state: State, placing: Placing, *, in_flight: int, max_retries: int) -> None:
        self._state, self._placing, self._max_retries = state, placing, max_retries
        self.accumulation = Accumulation(state.learner, state.training, in_flight)
        self.sample: Tensor | None = None
        """Tokens [B, S] of the last step."""

    @property
    def load_LE(self) -> Tensor:
        """Pairs routed to each expert in the step at hand."""
        return self._state.training.load_LE

    # -- as the router that leads -------------------------------------------------------------------------------------

    def train(self, microbatches: Sequence[Tensor], lr: float, clip_norm: float, bias_speed: float) -> StepReport:
        """See `Router.train_step`."""
        self.sample = microbatches[-1]
        state, started = self._state, time.monotonic()
        for retries in range(self._max_retries + 1):
            try:
                if retries:
                    self._recover()
                report = self._attempt(microbatches, lr, clip_norm, bias_speed, retries)
                return replace(report, seconds=time.monotonic() - started)
            except NonFinite as error:
                self._abort()
                dropped = f"the step was dropped, weights are those of version {state.version}"
                raise NonFinite(f"{error}; {dropped}", step=state.version + 1) from error
            except (LinkError, StepAborted) as error:
                logger.warning("step %d attempt %d aborted: %s", state.version + 1, state.attempt, error)
                self._abort()
                if retries == self._max_retries:
                    raise
        raise AssertionError("unreachable")

    def _attempt(
        self, microbatches: Sequence[Tensor], lr: float, clip_norm: float, bias_speed: float, retries: int
    ) -> StepReport:
        state, learner = self._state, self._state.learner
        attempt = Attempt(state.version + 1, state.attempt)
        num_tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in microbatches)
        own, total = self._accumulate_all(attempt, microbatches, num_tokens)
        square = square_sum(learner.parameters())
        state.last_commit.confirm()
        told = self._ask_to_prepare(attempt)
        norm = _norm(square, told)
        if not math.isfinite(norm):
            raise NonFinite(f"gradient norm is {norm}", step=attempt.step)
        scale = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm > 0 else 1.0
        spread = Spread.of(told)
        report = StepReport(
            attempt.step,
            total.loss,
            norm,
            num_tokens,
            own.seconds,
            retries,
            self.load_LE.tolist(),
            total.balance,
            staleness_mean=spread.mean,
            staleness_max=spread.max,
            merged_updates=spread.merged,
        )
        update = Update(lr, scale, bias_speed)
        state.replicas.prepare(attempt, asdict(update), report, learner.pieces, self.load_LE)
        self.commit(attempt, update)
        return report

    def _accumulate_all(self, attempt: Attempt, microbatches: Sequence[Tensor], num_tokens: int) -> tuple[Tally, Tally]:
        """Forward and backward, here and on every replica. -> tallies of this router's part, and of the whole."""
        replicas, pieces = self._state.replicas, self._state.learner.pieces
        self.load_LE.zero_()
        mine = replicas.start(attempt, microbatches, num_tokens, len(pieces))
        own = self.accumulation.run(attempt, mine, num_tokens, len(microbatches))
        total = replicas.collect(own, pieces, self.load_LE)
        if len(replicas):
            pieces.squeeze()
        else:
            pieces.forget()
        return own, total

    def _ask_to_prepare(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """Every expert actor is prepared. -> what they said."""
        compression = self._state.learner.compression.for_copies()
        fields = {"step": attempt.step, "attempt": attempt.number, **compression}
        phases = ("prepare", "reduce") if self._placing.roster.placement.has_copies else ("prepare",)
        answers = [self._state.training.links.ask_all(phase, fields) for phase in phases]
        return [answer.fields for phase in answers for answer in phase.values()]

    def commit(self, attempt: Attempt, update: Update) -> None:
        """Between steps serving sees either all of the old version or, through `min_version`, all of the new one."""
        with self._state.serving.pausing():
            started = self.apply(attempt, update)
        self._state.replicas.confirm(started)

    def _abort(self) -> None:
        state = self._state
        state.learner.drop_gradients()
        state.last_commit.ask_again()  # its answers are forgotten with all others that are open
        state.training.links.tell_living("abort", state.attempt_at_next())
        state.replicas.abort(Attempt(state.version + 1, state.attempt))
        state.attempt += 1

    def _recover(self) -> None:
        """Before another attempt: every actor there, the last commit done, leftovers of the failed attempt dropped."""
        state = self._state
        self._placing.reach_all()
        state.training.links.ask_all("abort", {"step": state.version + 1, "attempt": state.attempt - 1})

    # -- as any router ------------------------------------------------------------------------------------------------

    def apply(self, attempt: Attempt, update: Update) -> Mapping[str, Pending | None]:
        """Tells every actor and applies the trunk's part. Nobody waits for an answer: the queue of each link keeps the
        order. Serving waits already. -> what replicas were asked.

        All are prepared, so the step counts from here on, even where the message is lost.
        """
        state = self._state
        state.last_commit.send(attempt, lr=update.lr, scale=update.scale, term=state.replicas.term)
        started = state.replicas.start_commit(attempt)
        state.learner.update(update.lr, update.scale)
        state.learner.routing.update_bias(self.load_LE, update.bias_speed)
        state.learner.routing.open_further()
        state.version = attempt.step
        state.attempt = 0
        return started

    # -- as a replica, and when one is promoted -----------------------------------------------------------------------

    def accumulate(
        self,
        attempt: Attempt,
        parts: Sequence[Part],
        num_tokens: int,
        num_microbatches: int,
        should_stop: Callable[[], bool],
        buckets: Buckets,
    ) -> Tally:
        """A replica's part of a step; its gradients and load stay here. `buckets` tells which pieces are complete."""
        state = self._state
        state.reopen()
        state.attempt = attempt.number
        self.load_LE.zero_()
        tally = self.accumulation.run(
            attempt, parts, num_tokens, num_microbatches, should_stop=should_stop, watching=buckets.watching
        )
        buckets.close()
        state.last_commit.confirm()
        return tally

    def fence(self, term: int) -> dict[str, dict[str, Any]]:
        """Expert actors refuse every commit of an earlier term from now on. -> status of those that can be reached."""
        state = self._state
        state.replicas.term = term
        state.last_commit.of_term(term)
        state.training.links.forget()
        state.last_commit.ask_again()
        state.training.reopen()
        found = {}
        for name in list(state.training.links):
            try:
                answers = state.training.links.ask_all("fence", {"term": term}, among=[name])
                found[name] = dict(answers[name].fields)
            except LinkError as error:  # dead at the same time: the next step finds out
                logger.warning("%s cannot be asked for its version: %s", name, error)
        return found

    def settle_anew(self, attempt: int) -> None:
        """After the router that led is gone: what it left half done, of the next step and of a placement, is undone
        everywhere. `attempt`: the last that anybody knows of."""
        self._state.attempt = attempt
        self._abort()
        try:
            self._placing.settle_anew()
        except (LinkError, StepAborted) as error:
            logger.warning("the next step settles what could not be now: %s", error)


def _norm(square: float, told: Sequence[Mapping[str, Any]]) -> float:
    """Of all gradients, from the sum of squares of the trunk's and what expert actors say of theirs, in their order;
    None is not finite."""
    for fields in told:
        part = fields["square_sum"]
        square += math.nan if part is None else float(part)
    return math.sqrt(square)
