"""Passes that are captured together with a router's: both replay their graphs at once, and tokens go from the one to
the other and back in every layer without a word about them (`actors.transport.payload.contract.Way`).

    router   arrange {rows, epoch, ...}  ->  pass 7   once
             play {pass 7, version}  ->  played       then both launch
             layer 0 tokens  =>  experts  =>  sums    on the devices alone
             layer 1 ...

A router that asks has its graph launched once everybody has said `played`. Who refuses, since something has moved, says
so; then the router plays to the end with those that have begun, and sends the tokens as messages.

On the device a pass waits for what was begun here before it, and nothing waits for a pass but what changes weights: a
training forward that did could keep another actor from its part of the very same pass.

A pass whose router dies in the middle never ends by itself. As a rule the thread that serves the links sees the link
end, and ends the way; but it may just be waiting for the device, and that for an update behind this very pass. So
passes have a deadline, which a thread of its own watches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.errors import InvalidInput
from actors.expert.state import State
from actors.moe.experts import Weights
from actors.moe.layer_bytes import LayerShape, from_bytes
from actors.moe.static import StaticPart, static_experts
from actors.transport.message import DTYPES, Message
from actors.transport.payload.contract import Way

logger = logging.getLogger(__name__)

MAX_PASSES = 8
"""Of a link; the oldest goes."""
MAX_LINKS = 4
"""With passes: each has a stream of its own, and a device keeps only so many streams apart."""
DROP_TIMEOUT_S = 10.0
"""For what is under way on a link that has ended."""
_POLL_S = 1e-3
WATCH_EVERY_S = 1.0


@dataclass(frozen=True)
class _Pass:
    """With everything that its graph reads, which nobody else may keep."""

    graph: Any
    room_N: Tensor
    """Where tokens arrive."""
    parts: Sequence[StaticPart]
    groups: tuple[int, ...]
    weights: Sequence[Weights]
    """By layer."""


class _Player:
    """All passes of one link, which are played one after the other."""

    def __init__(self, way: Way, device: torch.device) -> None:
        self.way = way
        self.passes: dict[int, _Pass] = {}
        self.stream: Any = torch.cuda.Stream(device)
        self.ended: Any = torch.cuda.Event()
        self.is_begun = False
        """Whether anything was played, so that `ended` is meant."""
        self.begun_at = 0.0
        """The last time, a `time.monotonic` value."""

    def is_done(self) -> bool:
        return not self.is_begun or bool(self.ended.query())


class Playing:
    """`arrange`, `play` and `settle` are called with the host's lock held."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._players: dict[int, _Player] = {}
        """By `id` of the way, which is kept with it."""
        self._last = 0
        self._watch: threading.Thread | None = None
        self._is_closed = threading.Event()

    # -- what a router asks -------------------------------------------------------------------------------------------

    def arrange(self, question: Message) -> Message:
        """`experts`: of each layer, which this host is to compute by the placement of `epoch`. Answers the number of
        the pass; 0: as things are here, none can be captured."""
        fields: Any = question.fields
        way = question.via.way() if question.via is not None else None
        weights = self._state.at_rest()
        shape = self._shape(fields)
        is_placed = fields.get("epoch") == self._state.copies.placement.epoch
        if way is None or way.is_over or weights is None or not is_placed or not shape.is_aligned:
            return Message("ok", {"pass": 0})
        player = self._player(way)
        if player is None:
            return Message("ok", {"pass": 0})
        room_N = shape.room(self._state.quarters.device)
        parts = self._parts(fields)
        graph = self._captured(player, shape, room_N, parts)
        self._last += 1
        player.passes[self._last] = _Pass(graph, room_N, parts, self._state.groups, weights)
        if len(player.passes) > MAX_PASSES:
            self._wait(player)
            del player.passes[next(iter(player.passes))]
        return Message("ok", {"pass": self._last})

    def play(self, question: Message) -> Message:
        """Launches the pass and answers whether it did."""
        fields: Any = question.fields
        way = question.via.way() if question.via is not None else None
        player = self._players.get(id(way))
        wanted = player.passes.get(fields["pass"]) if player is not None else None
        state = self._state
        is_fit = (
            wanted is not None
            and state.version == fields["version"]
            and fields["epoch"] == state.copies.placement.epoch
            and wanted.groups == state.groups
            and (now := state.at_rest()) is not None
            and all(mine is theirs for mine, theirs in zip(now, wanted.weights, strict=True))
        )
        if not is_fit or player is None or wanted is None or player.way.is_over:
            return Message("ok", {"played": False})
        player.stream.wait_stream(torch.cuda.current_stream(state.quarters.device))
        player.begun_at = time.monotonic()  # first: who watches it must not take it for the one before
        with torch.cuda.stream(player.stream):
            wanted.graph.replay()
            player.ended.record(player.stream)
        player.is_begun = True
        if self._watch is None:
            self._watch = threading.Thread(target=self._end_late, name=f"passes-{state.name}", daemon=True)
            self._watch.start()
        return Message("ok", {"played": True})

    # -- beside other work --------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Before weights change or move: on the device that waits for what is being played."""
        for player in self._players.values():
            if player.is_begun:
                torch.cuda.current_stream(self._state.quarters.device).wait_event(player.ended)

    def close(self) -> None:
        self._is_closed.set()
        for player in list(self._players.values()):
            self._drop(player)

    def _end_late(self) -> None:
        """Without the host's lock, which may be held by who waits for them."""
        timeout_s = self._state.exchange.timeout_s
        while not self._is_closed.wait(min(WATCH_EVERY_S, timeout_s)):
            for player in list(self._players.values()):
                if not player.is_done() and time.monotonic() - player.begun_at > timeout_s and not player.way.is_over:
                    logger.warning("a pass has not ended in %.0f s: its way is given up", timeout_s)
                    player.way.end()

    def _player(self, way: Way) -> _Player | None:
        """None where there are too many already."""
        if id(way) not in self._players:
            if len(self._players) >= MAX_LINKS:
                return None
            player = self._players[id(way)] = _Player(way, self._state.quarters.device)
            way.when_over(lambda: self._drop(player))
        return self._players[id(way)]

    def _drop(self, player: _Player) -> None:
        """From any thread, once its way is over: what it waits for on the device ends then."""
        self._wait(player)
        with self._state.lock:
            player.passes.clear()
            self._players.pop(id(player.way), None)

    @staticmethod
    def _wait(player: _Player) -> None:
        until = time.monotonic() + DROP_TIMEOUT_S
        while not player.is_done() and time.monotonic() < until:
            time.sleep(_POLL_S)

    # -- capturing ----------------------------------------------------------------------------------------------------

    def _shape(self, fields: Any) -> LayerShape:
        numbers = {}
        for name in ("rows", "top_k"):
            value = fields.get(name)
            if type(value) is not int or value < 1:
                raise InvalidInput("must be a number above 0", field=name, value=value)
            numbers[name] = value
        if (weight_dtype := DTYPES.get(str(fields.get("weight_dtype")))) is None:
            raise InvalidInput("no dtype of gate weights", field="weight_dtype", value=fields.get("weight_dtype"))
        state = self._state
        width = state.holdings.stacks[0].width
        return LayerShape(numbers["rows"], width, numbers["top_k"], state.quarters.layout.dtype, weight_dtype)

    def _parts(self, fields: Any) -> list[StaticPart]:
        holdings, wanted = self._state.holdings, list(fields["experts"])
        rows = holdings.rows()
        if missing := [expert for expert in wanted if expert not in rows]:
            raise InvalidInput("experts that are not here", field="experts", value=missing)
        mine = {expert: rows[expert] for expert in wanted}
        return [StaticPart.of(stack, mine, self._state.num_experts) for stack in holdings.stacks]

    def _captured(self, player: _Player, shape: LayerShape, room_N: Tensor, parts: Sequence[StaticPart]) -> Any:
        device = self._state.quarters.device
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        with torch.cuda.device(device), torch.cuda.stream(player.stream), torch.no_grad():
            for part in parts:  # what libraries do when they are first used must not be captured
                static_experts([part], *from_bytes(room_N, shape))
            torch.cuda.synchronize(device)
            graph.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
            try:
                for part in parts:
                    player.way.receive(room_N).wait()
                    y_TD = static_experts([part], *from_bytes(room_N, shape))
                    player.way.send(y_TD).wait()
            finally:
                graph.capture_end()
        torch.cuda.synchronize(device)
        return graph
