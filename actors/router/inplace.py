"""Experts that live in the router's own process and on its device: where they are, for who computes them itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from actors.expert.host import ExpertHost
from actors.moe.static import StaticPart, static_experts
from actors.router.captured import Done, Standing
from actors.router.dispatcher import Dispatcher
from actors.transport.local import LocalLink
from actors.trunk.shared import Meanwhile


class InPlace:
    """Inside one graph."""

    is_here = True

    def __init__(self, parts: Sequence[Sequence[StaticPart]]) -> None:
        """`parts` of each layer."""
        self._parts = parts

    def arrange(self, num_layers: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> bool:
        # Whatever libraries do when they are first used must not be captured.
        for parts in self._parts:
            static_experts(parts, x_TD, ids_TK, weights_TK)
        return True

    def layer(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, meanwhile: Meanwhile) -> Tensor:
        return static_experts(self._parts[layer], x_TD, ids_TK, weights_TK)

    def begin(self) -> bool:
        return True

    def finish(self, done: Done) -> None:
        """Nobody else has a part in it."""


class ExpertsInPlace:
    """Behind the links of a dispatcher, all of which must be local."""

    def __init__(self, dispatcher: Dispatcher, device: torch.device) -> None:
        self._dispatcher, self._device = dispatcher, device

    @contextmanager
    def holding(self) -> Iterator[Standing | None]:
        """After `Dispatcher.begin`: inside, weights neither move nor change. None where not all are here, or are not of
        the version that is asked for."""
        hosts = self._hosts()
        version = self._dispatcher.purpose.min_version
        with ExitStack() as held:
            found = [held.enter_context(host.in_place(version, self._device)) for host in hosts]
            whole = [weights for weights in found if weights is not None]
            if not whole or len(whole) < len(found):
                yield None
                return
            placement = self._dispatcher.epoch, tuple(host.groups for host in hosts)
            weights = [weights for layer in zip(*whole, strict=True) for weights in layer]
            yield Standing(placement, weights, lambda: InPlace(self.parts()))

    def parts(self) -> list[list[StaticPart]]:
        """Of each layer, inside `holding`. An expert with copies is computed by the first that has it."""
        hosts, taken = self._hosts(), set[int]()
        rows_of: list[dict[int, int]] = []
        for host in hosts:
            rows_of.append({e: row for e, row in host.rows().items() if e not in taken})
            taken |= set(rows_of[-1])
        num_experts = self._dispatcher.num_experts
        assert len(taken) == num_experts
        layers = range(len(hosts[0].holdings.stacks))
        return [
            [
                StaticPart.of(host.holdings.stacks[i], rows, num_experts)
                for host, rows in zip(hosts, rows_of, strict=True)
            ]
            for i in layers
        ]

    def _hosts(self) -> list[ExpertHost]:
        """Empty unless they have every expert together."""
        found, experts = [], set[int]()
        for name, link in self._dispatcher.links.items():
            host = getattr(link.handler, "__self__", None) if isinstance(link, LocalLink) else None
            if not isinstance(host, ExpertHost) or link.closed or link.is_cut:
                return []
            found.append(host)
            experts |= set(self._dispatcher.held(name)) & set(host.experts)
        is_whole = len(experts) == self._dispatcher.num_experts and not self._dispatcher.links.lost
        return found if is_whole else []
