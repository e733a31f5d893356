"""Gradients of expert groups that have copies: every holder sends what it has accumulated to the group's owner, who
sends the sum back, and every copy commits the same update. Where the job wants it, both go compressed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from actors.compress.settings import CompressionSettings
from actors.expert.exchange import Attempt, Exchange
from actors.expert.holdings import Holdings
from actors.expert.squeezing import Squeezer
from actors.transport.contract import Pending
from actors.transport.message import Message
from actors.values import Placement


class Copies:
    """Called with the host's lock held."""

    def __init__(self, exchange: Exchange, group_size: int) -> None:
        self.placement = Placement(0, (), group_size)
        """None yet: until the first `place` everything here is owned here."""
        self._exchange = exchange
        self._name = exchange.name
        self._squeezer: Squeezer | None = None
        """None: gradients go as they are."""

    def use(self, placement: Placement) -> None:
        """From now on."""
        self.placement = placement
        if self._squeezer is not None:
            self._squeezer.forget_but(lambda group: self._name in self.holders(group) and not self.alone([group]))

    def holders(self, group: int) -> tuple[str, ...]:
        """Owner first."""
        return self.placement.holders[group] if self.placement.epoch else (self._name,)

    def owned(self, groups: Iterable[int]) -> list[int]:
        return [group for group in groups if self.holders(group)[0] == self._name]

    def alone(self, groups: Iterable[int]) -> list[int]:
        """Those without a copy elsewhere."""
        return [group for group in groups if len(self.holders(group)) == 1]

    def shared(self, groups: Iterable[int]) -> list[int]:
        """Those owned here that have copies elsewhere."""
        return [group for group in self.owned(groups) if len(self.holders(group)) > 1]

    # -- how they travel ----------------------------------------------------------------------------------------------

    def compress(self, fields: Mapping[str, Any]) -> None:
        """What the question that begins a sum says of it. The same as before changes nothing.

        `InvalidInput` for settings that cannot be used.
        """
        settings = CompressionSettings(**fields["compression"]) if "compression" in fields else None
        if settings != (self._squeezer and self._squeezer.settings):
            self._squeezer = None if settings is None else Squeezer(settings)

    def keep(self) -> None:
        """The step counts: what it has left out is remembered."""
        if self._squeezer is not None:
            self._squeezer.keep()

    def drop(self) -> None:
        """The attempt does not."""
        if self._squeezer is not None:
            self._squeezer.drop()

    def forget(self) -> None:
        """What is remembered is of another run, or of other weights."""
        if self._squeezer is not None:
            self._squeezer.forget_but(lambda group: False)

    def num_bytes(self) -> int:
        """Of what is remembered."""
        return 0 if self._squeezer is None else self._squeezer.num_bytes()

    # -- a step -------------------------------------------------------------------------------------------------------

    def send_partial_sums(self, holdings: Holdings, touched: Iterable[tuple[int, int]], attempt: Attempt) -> None:
        """What tokens that were sent here gave for groups that others own. `touched`: (group, layer)."""
        self._exchange.settle(
            [
                self._send("partial", owner, attempt, group, layer, self._packed(holdings, group, layer))
                for group, layer in sorted(touched)
                if (owner := self.holders(group)[0]) != self._name
            ]
        )

    def reduce(self, holdings: Holdings, attempt: Attempt) -> list[Pending]:
        """Sums the gradients of the groups owned here and sends the sums to their copies; to be settled.

        Always in the order of the placement, so that a repeated step gives the same bits.
        """
        pending: list[Pending] = []
        for group in self.shared(holdings.groups):
            copies = self.holders(group)[1:]
            for layer in range(len(holdings.stacks)):
                gradients = holdings.gradients(group, layer)
                parts = self._exchange.gradients("partial", attempt, group, layer)
                for sender in sorted(parts, key=copies.index):
                    self._add(gradients, parts[sender], group, layer)
                packed = self._packed(holdings, group, layer)
                if self._squeezer is not None:  # the owner's update is that of its copies
                    self._squeezer.write((group, layer), gradients, packed)
                pending += [self._send("sum", copy, attempt, group, layer, packed) for copy in copies]
        return pending

    def take_sums(self, holdings: Holdings, attempt: Attempt) -> None:
        """The owners' sums take the place of what was accumulated here."""
        for group in holdings.groups:
            owner = self.holders(group)[0]
            for layer in range(len(holdings.stacks)) if owner != self._name else ():
                sums = self._exchange.gradients("sum", attempt, group, layer)[owner]
                gradients = holdings.gradients(group, layer)
                if self._squeezer is not None:
                    self._squeezer.write((group, layer), gradients, sums)
                    continue
                for gradient, total in zip(gradients, sums, strict=True):
                    gradient.copy_(total)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _packed(self, holdings: Holdings, group: int, layer: int) -> Sequence[Tensor]:
        gradients = holdings.gradients(group, layer)
        if self._squeezer is not None:
            return self._squeezer.pack((group, layer), gradients)
        # Copies: this side writes into its gradients before the other has used what was sent.
        return [gradient.clone() for gradient in gradients]

    def _add(self, gradients: Sequence[Tensor], part: Sequence[Tensor], group: int, layer: int) -> None:
        if self._squeezer is not None:
            self._squeezer.add((group, layer), gradients, part)
            return
        for gradient, added in zip(gradients, part, strict=True):
            gradient += added.to(gradient.device)

    def _send(
        self, kind: str, peer: str, attempt: Attempt, group: int, layer: int, tensors: Sequence[Tensor]
    ) -> Pending:
        fields = {"step": attempt.step, "attempt": attempt.number, "group": group, "layer": layer, "sender": self._name}
        return self._exchange.start(peer, Message(kind, fields, tuple(tensors)))
