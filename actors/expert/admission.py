"""Which questions an expert actor answers at once, which wait for updates to be made, and whose turn each takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.expert.exchange import Attempt
from actors.expert.state import State
from actors.transport.message import Message
from actors.transport.turns import Lane


def lane(question: Message) -> Lane:
    """Whose turn it takes, where several questions wait."""
    is_asked = question.op in ("forward", "arrange", "play")
    return "serving" if is_asked and not question.fields.get("keep") else "training"


class Admission:
    """From any thread, without the host's lock."""

    def __init__(self, state: State) -> None:
        self._state = state

    def wait(self, question: Message) -> None:
        """Until it may be handled. Errors as of `Updates.wait`."""
        if (need := self._need(question)) is not None:
            self._state.updates.wait(*need)

    def is_ready(self, question: Message) -> bool:
        """Whether `wait` would not."""
        try:
            need = self._need(question)
        except (KeyError, TypeError, ValueError):  # who handles it says what is wrong with it
            return True
        return need is None or self._state.updates.admits(*need)

    def may_lag(self, fields: Mapping[str, Any]) -> int:
        """Committed updates that may be missing: the job's bound, or what the forward asks for."""
        return min(self._state.staleness, self._state.version - int(fields.get("min_version", 0)))

    def _need(self, question: Message) -> tuple[int, int] | None:
        """(layer, how many updates it may be behind) of a question that may have to wait: a forward.

        `prepare` is another, so that on an actor that gets no tokens no more updates are pending than elsewhere.
        """
        fields: Any = question.fields
        state, num_layers = self._state, len(self._state.holdings.stacks)
        if lane(question) == "serving":
            layer, max_behind = fields.get("layer"), fields.get("max_behind")
            is_known = type(layer) is int and 0 <= layer < num_layers
            return (layer, max_behind) if state.staleness and is_known and type(max_behind) is int else None
        waits = question.op == "prepare" or (question.op == "forward" and fields.get("keep"))
        if not waits or not state.staleness or fields.get("step") != state.version + 1:
            return None
        layer = fields["layer"] if question.op == "forward" else num_layers - 1
        if Attempt.of(fields) < state.step.attempt or layer not in range(num_layers):
            return None  # it will be refused
        return layer, self.may_lag(fields)
