"""Groups on their way to this actor, while the actor that owns them goes on with its steps.

A layer is sent as it is at some version; from then on the owner sends every update it makes to that layer, and it is
made here too, in order. So each layer may come at a version of its own, nothing has to stop, and what has arrived
equals the owner's bit for bit, weights and moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from actors.errors import LinkTimeout, StepAborted
from actors.expert.exchange import Exchange
from actors.expert.holdings import Holdings
from actors.fairlock import FairLock
from actors.optim import OptimizerSettings
from actors.transport.contract import Link
from actors.transport.message import Message
from actors.values import Address

ASK_AGAIN_S = 0.005


@dataclass
class _Arrival:
    run: int | None = None
    """Job whose moments these are."""
    versions: dict[int, int] = field(default_factory=dict)
    """Layer -> version, of those that are here."""


class Arrivals:
    """The host's lock is held around every call but `bring`."""

    def __init__(self, exchange: Exchange, holdings: Callable[[], Holdings]) -> None:
        self._exchange, self._holdings = exchange, holdings
        self._arriving: dict[int, _Arrival] = {}
        self._turn = FairLock()
        """One group at a time waits for the host's lock: a question to the host then waits for one piece of a group,
        however many arrive."""

    def bring(self, lock: FairLock, group: int, owner: str, address: Address, here: Address, timeout_s: float) -> int:
        """-> bytes that came. On an error nothing of the group is left here."""
        deadline = time.monotonic() + timeout_s
        num_bytes = 0
        with lock:
            self.drop(group)
            arrival = self._arriving[group] = _Arrival()
            self._exchange.expect_updates(group)
        link = self._exchange.open(owner, address)
        try:
            for layer in range(len(self._holdings().stacks)):
                fields = {"group": group, "layer": layer, "follower": self._exchange.name, "address": astuple(here)}
                answer = _ask(link, Message("follow", fields), deadline)
                num_bytes += answer.num_bytes
                with self._turn:
                    if layer == 0:
                        self._widen(lock)
                    with lock:
                        self._write(arrival, group, layer, answer)
        except BaseException:
            with lock:
                if self._arriving.get(group) is arrival:  # else it was given up, and may be on its way again
                    self.drop(group)
            raise
        finally:
            link.close()
        return num_bytes

    def _write(self, arrival: _Arrival, group: int, layer: int, answer: Message) -> None:
        fields: Any = answer.fields
        if self._arriving.get(group) is not arrival or arrival.run not in (None, fields["run"]):
            raise StepAborted(f"group {group} was given up on its way: another job began, or another placement")
        if arrival.run is None:
            self._holdings().reserve(group, OptimizerSettings(**fields["optimizer"]), len(self.coming))
            arrival.run = int(fields["run"])
        self._holdings().write(group, layer, answer.tensors, int(fields["updates"]))
        arrival.versions[layer] = int(fields["version"])
        self.catch_up()

    def _widen(self, lock: FairLock) -> None:
        """Room for all that are to come, layer by layer: what takes long of it beside the host's questions."""
        with lock:
            holdings = self._holdings()
            num_places = holdings.places_with(len(self.coming))
            is_wanted = num_places > holdings.places_with(0)
        for layer in range(len(holdings.stacks)) if is_wanted else ():
            room = holdings.room_for(layer, num_places)
            with lock:
                self._holdings().widen(layer, num_places, room)

    @property
    def coming(self) -> list[int]:
        """Groups that have no place yet."""
        return [group for group, arrival in self._arriving.items() if arrival.run is None]

    def catch_up(self) -> None:
        """Makes every update that has come."""
        for group, arrival in self._arriving.items():
            for layer in arrival.versions:
                while (update := self._exchange.update(group, layer, arrival.versions[layer] + 1)) is not None:
                    self._holdings().update_layer(group, layer, update.gradients, update.lr, update.scale)
                    arrival.versions[layer] += 1

    def behind(self, groups: Sequence[int], version: int, run: int) -> list[int]:
        """Those that are not wholly here in this version of this run."""
        layers = range(len(self._holdings().stacks))

        def is_here(arrival: _Arrival | None) -> bool:
            return (
                arrival is not None and arrival.run == run and all(arrival.versions.get(i) == version for i in layers)
            )

        return [group for group in groups if not is_here(self._arriving.get(group))]

    def arrived(self, group: int) -> None:
        """It is held now, and takes part in the steps."""
        self._arriving.pop(group, None)
        self._exchange.forget_updates(group)

    def drop(self, group: int) -> None:
        self.arrived(group)
        if group in self._holdings().arriving:
            self._holdings().free(group)


def _ask(link: Link, question: Message, deadline: float) -> Message:
    while (remaining := deadline - time.monotonic()) > 0:
        answer = link.call(question, remaining)
        if answer.op != "busy":
            return answer
        time.sleep(ASK_AGAIN_S)
    raise LinkTimeout("a layer was not sent before the deadline", peer=link.peer)
