"""Gradients of expert groups that have copies: every holder sends what it has accumulated to the group's owner, who
sends the sum back, and every copy commits the same update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from actors.expert.exchange import Attempt, Exchange
from actors.expert.holdings import Holdings
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

    def send_partial_sums(self, holdings: Holdings, touched: Iterable[tuple[int, int]], attempt: Attempt) -> None:
        """What tokens that were sent here gave for groups that others own. `touched`: (group, layer)."""
        self._exchange.settle(
            [
                self._send("partial", owner, attempt, group, layer, holdings.gradients(group, layer))
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
                    for gradient, part in zip(gradients, parts[sender], strict=True):
                        gradient += part.to(gradient.device)
                pending += [self._send("sum", copy, attempt, group, layer, gradients) for copy in copies]
        return pending

    def take_sums(self, holdings: Holdings, attempt: Attempt) -> None:
        """The owners' sums take the place of what was accumulated here."""
        for group in holdings.groups:
            owner = self.holders(group)[0]
            for layer in range(len(holdings.stacks)) if owner != self._name else ():
                sums = self._exchange.gradients("sum", attempt, group, layer)[owner]
                for gradient, total in zip(holdings.gradients(group, layer), sums, strict=True):
                    gradient.copy_(total)

    def _send(
        self, kind: str, peer: str, attempt: Attempt, group: int, layer: int, gradients: Sequence[Tensor]
    ) -> Pending:
        fields = {"step": attempt.step, "attempt": attempt.number, "group": group, "layer": layer, "sender": self._name}
        # Copies: this side writes into its gradients before the other has used what was sent.
        return self._exchange.start(peer, Message(kind, fields, tuple(g.clone() for g in gradients)))
