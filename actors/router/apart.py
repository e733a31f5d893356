"""Experts of other processes whose devices this one's reaches directly: their part of a captured step is captured there
(`actors.expert.playing`), and tokens go there and back inside the graphs of both."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from actors.errors import LinkTimeout, MoeClusterError, PeerLost
from actors.moe.layer_bytes import LayerShape, to_bytes
from actors.router.captured import Done, Standing
from actors.router.dispatcher import Dispatcher
from actors.transport.contract import Link, Pending
from actors.transport.message import NAMES, Message
from actors.transport.payload.contract import Way
from actors.trunk.shared import Meanwhile

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.02
"""While the device computes, how often it is seen whether everybody lives."""
POLL_S = 5e-5
ABORT_TIMEOUT_S = 10.0


class ExpertsApart:
    """Behind the links of a dispatcher, all of which must have a way."""

    def __init__(self, dispatcher: Dispatcher, device: torch.device) -> None:
        self._dispatcher, self._device = dispatcher, device

    @contextmanager
    def holding(self) -> Iterator[Standing | None]:
        """After `Dispatcher.begin`. Nothing is held: whether all is still there is asked before each replay."""
        ways = self._ways()
        held = {name: self._dispatcher.held(name) for name in ways}
        if not ways or len(set().union(*held.values())) < self._dispatcher.num_experts:
            yield None
            return
        # With the epoch it is known who holds what.
        placement = self._dispatcher.epoch, tuple(ways)
        yield Standing(
            placement,
            list(ways.values()),
            lambda: Ensemble(self._dispatcher, ways, held, self._device),
            lambda: any(way.is_over for way in ways.values()),
        )

    def _ways(self) -> dict[str, Way]:
        """Empty unless every actor is there and has one."""
        links = self._dispatcher.links
        if links.lost:
            return {}
        found = {name: way for name, link in links.items() if not link.is_cut and (way := link.way) is not None}
        return found if len(found) == len(links) and not any(way.is_over for way in found.values()) else {}


def divided(held: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Each expert to one that holds it, as evenly as copies allow; always in the same way."""
    shares: dict[str, list[int]] = {name: [] for name in held}
    holders: dict[int, list[str]] = {}
    for name, experts in held.items():
        for expert in experts:
            holders.setdefault(expert, []).append(name)
    for expert in sorted(holders, key=lambda expert: (len(holders[expert]), expert)):
        shares[min(holders[expert], key=lambda name: len(shares[name]))].append(expert)
    return {name: sorted(experts) for name, experts in shares.items() if experts}


class Ensemble:
    """The actors that compute the experts of one captured step, each its own."""

    is_here = False

    def __init__(
        self, dispatcher: Dispatcher, ways: Mapping[str, Way], held: Mapping[str, Sequence[int]], device: torch.device
    ) -> None:
        """`held`: experts of each actor; of those with copies one computes."""
        self._shares = divided(held)
        self._ways = {name: ways[name] for name in self._shares}
        self._dispatcher, self._epoch, self._device = dispatcher, dispatcher.epoch, device
        self._links: dict[str, Link] = {name: dispatcher.links[name] for name in self._shares}
        self._numbers: dict[str, int] = {}
        """Of the pass, as each actor has answered."""
        self._num_layers = 0
        self._bytes_N = torch.empty(0)
        self._sums_TD = torch.empty(0)
        """For what is played to the end: what is sent, and what comes."""

    # -- once ---------------------------------------------------------------------------------------------------------

    def arrange(self, num_layers: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> bool:
        """Tensors as those of each layer. False where somebody cannot now."""
        (num_tokens, width), top_k = x_TD.shape, ids_TK.shape[1]
        shape = LayerShape(num_tokens, width, top_k, x_TD.dtype, weights_TK.dtype)
        self._num_layers = num_layers
        self._bytes_N, self._sums_TD = shape.room(self._device), torch.empty_like(x_TD)
        sizes = {"rows": shape.num_tokens, "top_k": shape.top_k, "weight_dtype": NAMES[shape.weight_dtype]}
        fields = {**sizes, "epoch": self._epoch}
        for name, experts in self._shares.items():
            question = Message("arrange", {**fields, "experts": list(experts)})
            (answer,) = self._dispatcher.links.answers([self._dispatcher.links.start(name, question)])
            self._numbers[name] = int(answer.fields["pass"]) if answer is not None else 0  # type: ignore[arg-type]
            if not self._numbers[name]:
                return False
        return True

    def layer(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, meanwhile: Meanwhile) -> Tensor:
        """While it is captured: sums [T, D] over all experts."""
        bytes_N = to_bytes(x_TD, ids_TK, weights_TK)
        sent = [way.send(bytes_N) for way in self._ways.values()]
        parts = [torch.empty_like(x_TD) for _ in self._ways]
        come = [way.receive(part) for way, part in zip(self._ways.values(), parts, strict=True)]
        meanwhile()
        for arrival in (*sent, *come):
            arrival.wait()
        y_TD = parts[0]
        for part in parts[1:]:
            y_TD = y_TD + part
        return y_TD

    # -- before and after each replay ---------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Everybody has launched their part. False where somebody has not, and those that have are through."""
        fields = {"version": self._dispatcher.purpose.min_version, "epoch": self._epoch}
        asked = {name: self._asked(name, {**fields, "pass": number}) for name, number in self._numbers.items()}
        deadline = time.monotonic() + self._dispatcher.links.timeout_s
        begun = [
            name for name, question in asked.items() if question is not None and self._has_begun(question, deadline)
        ]
        if len(begun) < len(asked):
            self._play_out(begun)
        return len(begun) == len(asked)

    def _asked(self, name: str, fields: Mapping[str, Any]) -> Pending | None:
        try:
            return self._links[name].start(Message("play", fields))
        except MoeClusterError as error:
            logger.info("%s does not play: %s", name, error)
            return None

    def _has_begun(self, question: Pending, deadline: float) -> bool:
        try:
            return bool(question.result(max(0.001, deadline - time.monotonic())).fields["played"])
        except MoeClusterError as error:
            logger.info("%s does not play: %s", question.link.peer, error)
            if isinstance(error, LinkTimeout):
                question.link.close()  # or it would begin when nobody plays with it any more
            return False

    def _play_out(self, names: Sequence[str]) -> None:
        """With zeros, what they have begun."""
        ways = [self._ways[name] for name in names]
        self._bytes_N.zero_()
        for _ in range(self._num_layers if ways else 0):
            sent = [way.send(self._bytes_N) for way in ways]
            for way in ways:
                way.receive(self._sums_TD).wait()
            for arrival in sent:
                arrival.wait()

    def finish(self, done: Done) -> None:
        """Until the device has done its part. `PeerLost`, `LinkTimeout` if it has not: then the step counts nothing,
        and the links of those who are to blame are closed."""
        started = time.monotonic()
        look_at = started + LOOK_EVERY_S
        lost: MoeClusterError | None = None
        while not done.query():
            now = time.monotonic()
            if now >= look_at:
                look_at = now + LOOK_EVERY_S
                lost = self._look(now - started) or lost
            if lost is not None and now - started > self._dispatcher.links.timeout_s + ABORT_TIMEOUT_S:
                break
            time.sleep(POLL_S)
        # Whoever was cut off by another thread since then has left the device going on without what it waited for.
        if lost is None:
            lost = self._ended()
        if lost is not None:
            raise lost

    def _ended(self) -> PeerLost | None:
        """The first whose way is over."""
        over = (name for name, way in self._ways.items() if way.is_over)
        return next((PeerLost("the way to it has ended", peer=name) for name in over), None)

    def _look(self, waited_s: float) -> MoeClusterError | None:
        """The first that is gone. Its link is closed, which ends what waits for it on the device."""
        found: MoeClusterError | None = None
        for link in self._links.values():
            if link.closed:
                continue
            try:
                link.check()
                if waited_s > self._dispatcher.links.timeout_s:
                    raise LinkTimeout("it has not played its part", peer=link.peer)
            except (PeerLost, LinkTimeout) as error:
                link.close()
                found = found or error
        return found
