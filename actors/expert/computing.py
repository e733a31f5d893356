"""Forward and backward of an expert actor, layer by layer: weighted sums of the experts' outputs, and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from actors.errors import InvalidInput, StepAborted
from actors.expert.admission import Admission
from actors.expert.state import State
from actors.moe.experts import Work
from actors.moe.fp8 import unpacked
from actors.transport.message import Message


class Computing:
    """Called with the host's lock held."""

    def __init__(self, state: State, admission: Admission) -> None:
        self._state, self._admission = state, admission
        self.tokens = 0
        """Computed since the start."""
        self.pairs = 0
        """Of a token and an expert, the same."""

    def forward(self, question: Message) -> Message:
        """Tokens of one layer -> weighted sums. `keep` (training) saves what backward needs, by micro-batch, layer.

        `used` of the answer is the version of the weights, `version` that of the last commit.
        """
        fields: Any = question.fields
        if "pin" in fields:
            return self._forward_pinned(question)
        state = self._state
        layer, keep = state.layer_of(fields), bool(fields.get("keep"))
        self._check_epoch(fields)
        if keep:
            state.enter(fields)
        state.check_version(int(fields.get("min_version", 0)))
        x_TD, work = self._work(question, len(state.holdings.experts))
        state.holdings.catch_up(layer, work.counts_E)
        placed = Work(work.token_P, state.holdings.by_place(work.counts_E), work.weight_P)
        state.updates.check()
        weights, lag = state.updates.read(layer)
        if keep and lag > (may_lag := self._admission.may_lag(fields)):
            raise StepAborted(f"layer {layer} of {state.name} is {lag} updates behind, {may_lag} may be")
        y_TD, saved = state.holdings.stacks[layer](x_TD, placed, keep=keep, weights=weights)
        if saved is not None:
            state.step.keep(int(fields["microbatch"]), layer, saved)
            state.step.weights[layer] = weights
            state.step.spread.note(lag, sum(count > 0 for count in work.counts_E))
            self._touch(layer, work.counts_E)
        return self._sums(y_TD, work, state.version, state.version - lag)

    def _forward_pinned(self, question: Message) -> Message:
        """The same of a version that is kept, by the placement of that time."""
        fields: Any = question.fields
        kept, layer = self._state.kept.get(str(fields["pin"])), self._state.layer_of(fields)
        x_TD, work = self._work(question, len(kept.experts))
        stack = self._state.holdings.stacks[layer]
        y_TD, _ = stack(x_TD, kept.placed(work), keep=False, weights=kept.layers[layer])
        return self._sums(y_TD, work, kept.version, kept.version)

    def _sums(self, y_TD: Tensor, work: Work, version: int, used: int) -> Message:
        self.tokens += y_TD.shape[0]
        self.pairs += len(work.token_P)
        return Message("ok", {"version": version, "used": used, "pairs": self.pairs}, (y_TD,))

    def _work(self, question: Message, num_experts: int) -> tuple[Tensor, Work]:
        """Tokens and what is to be done with them, checked, on the device."""
        fields: Any = question.fields
        quarters = self._state.quarters
        *rows, token_P, weight_P = question.tensors
        x_TD = unpacked([part.to(quarters.device) for part in rows], quarters.skeleton.dtype)
        self._check_tokens(x_TD)
        work = Work(token_P, list(fields["counts_E"]), weight_P)
        work.check(x_TD.shape[0], num_experts)
        return x_TD, work.to(quarters.device)

    def backward(self, question: Message) -> Message:
        """Gradient of the sums -> gradients of the tokens and of their weights; those of the experts stay here."""
        state = self._state
        state.enter(question.fields)
        layer = state.layer_of(question.fields)
        saved = state.step.take(int(question.fields["microbatch"]), layer)  # type: ignore[arg-type]
        (grad_y_TD,) = question.tensors
        self._check_tokens(grad_y_TD)
        stack = state.holdings.stacks[layer]
        grad_x_TD, grad_weight_P, part = stack.backward(saved, grad_y_TD.to(state.quarters.device))
        if part is not None:
            state.step.defer(layer, part)
        return Message("ok", {}, (grad_x_TD, grad_weight_P))

    def _touch(self, layer: int, counts_E: Sequence[int]) -> None:
        if self._state.copies.placement.has_copies:
            size = self._state.group_size
            self._state.step.touched |= {
                (g, layer) for i, g in enumerate(self._state.groups) if any(counts_E[i * size : (i + 1) * size])
            }

    def _check_epoch(self, fields: Mapping[str, Any]) -> None:
        """A message that was routed by another placement counts experts that are not these."""
        now = self._state.copies.placement.epoch
        if (epoch := fields.get("epoch", now)) != now:
            raise StepAborted(f"message of placement epoch {epoch}, here it is {now}")

    def _check_tokens(self, x_TD: Tensor) -> None:
        width, dtype = self._state.holdings.stacks[0].width, self._state.quarters.skeleton.dtype
        if x_TD.ndim != 2 or x_TD.shape[1] != width or x_TD.dtype != dtype:
            raise InvalidInput(f"need [T, {width}] of {dtype}", field="x_TD", value=(tuple(x_TD.shape), x_TD.dtype))
