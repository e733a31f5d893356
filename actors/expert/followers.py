"""The owner's side of groups on their way to other actors: who follows a group gets every update that is made to it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from actors.errors import MoeClusterError
from actors.expert.exchange import Exchange
from actors.expert.holdings import Holdings
from actors.transport.contract import Link, Pending
from actors.transport.message import Message
from actors.values import Address

logger = logging.getLogger(__name__)

MAX_UNCONFIRMED = 64
"""Updates sent to a follower before the first of them must be confirmed: it bounds what waits in its box."""


class Followers:
    """Called with the host's lock held."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._followed: dict[tuple[int, int], dict[str, Address]] = {}
        """(group, layer) -> who has been sent it, and where they listen."""
        self._links: dict[str, tuple[Link, deque[Pending]]] = {}

    @property
    def groups(self) -> set[int]:
        """That somebody follows."""
        return {group for (group, _), followers in self._followed.items() if followers}

    def add(self, group: int, layer: int, name: str, address: Address) -> None:
        self._followed.setdefault((group, layer), {})[name] = address

    def clear(self) -> None:
        self._followed.clear()
        self.let_go()

    def let_go(self) -> None:
        """Ends the links to those that follow nothing any more, dead or alive. Not before they have what they were
        sent, as they have when everybody uses the placement in which they hold it."""
        followed = {name for followers in self._followed.values() for name in followers}
        for name in [name for name in self._links if name not in followed]:
            self._links.pop(name)[0].close()

    def keep(self, follows: Callable[[int, str], bool]) -> None:
        """Strikes off all of whom `follows(group, name)` is false."""
        kept = {
            key: {name: address for name, address in followers.items() if follows(key[0], name)}
            for key, followers in self._followed.items()
        }
        self._followed = {key: followers for key, followers in kept.items() if followers}

    def tell(self, holdings: Holdings, version: int, lr: float, scale: float) -> None:
        """Of the update that is about to be made. Not waited for: a follower that cannot be reached is struck off, and
        notices itself that updates fail."""
        for (group, layer), followers in self._followed.items():
            gradients = tuple(g.clone() for g in holdings.gradients(group, layer))
            fields = {"group": group, "layer": layer, "version": version, "lr": lr, "scale": scale}
            for name in list(followers):
                try:
                    self._send(name, followers[name], Message("update", fields, gradients))
                except MoeClusterError as error:
                    logger.warning("%s follows group %d no longer: %s", name, group, error)
                    del followers[name]

    def _send(self, follower: str, address: Address, update: Message) -> None:
        """Without waiting, unless many are unconfirmed. Raises `LinkError` if it cannot be reached."""
        link, unconfirmed = self._links.get(follower, (None, deque[Pending]()))
        if link is None or link.closed:
            link, unconfirmed = self._exchange.open(follower, address), deque()
            self._links[follower] = link, unconfirmed
        try:
            unconfirmed.append(link.start(update))
            while len(unconfirmed) > MAX_UNCONFIRMED:
                unconfirmed.popleft().result(self._exchange.timeout_s)
        except BaseException:
            link.close()
            raise

    def close(self) -> None:
        for link, _ in self._links.values():
            link.close()
