"""The owner's side of groups on their way to other actors: who follows a group gets every update that is made to it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.errors import LinkError, MoeClusterError
from actors.expert.exchange import Exchange
from actors.expert.holdings import Holdings
from actors.transport.contract import Link, Pending
from actors.transport.message import Message
from actors.values import Address

logger = logging.getLogger(__name__)

MAX_UNCONFIRMED = 64
"""Updates sent to a follower before the first of them must be confirmed: it bounds what waits in its box."""


@dataclass(frozen=True)
class _Follower:
    address: Address
    """Where it listens."""
    version: int
    """That it was sent: it makes every update after it."""


@dataclass(frozen=True)
class _Sent:
    """An update on its way to a follower."""

    group: int
    version: int
    pending: Pending


class Followers:
    """Called with the host's lock held."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._followed: dict[tuple[int, int], dict[str, _Follower]] = {}
        """(group, layer) -> who has been sent it."""
        self._links: dict[str, tuple[Link, deque[_Sent]]] = {}
        """With the updates that are unconfirmed, oldest first."""

    @property
    def groups(self) -> set[int]:
        """That somebody follows."""
        return {group for (group, _), followers in self._followed.items() if followers}

    def add(self, group: int, layer: int, name: str, address: Address, version: int) -> None:
        self._followed.setdefault((group, layer), {})[name] = _Follower(address, version)

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
            key: {name: follower for name, follower in followers.items() if follows(key[0], name)}
            for key, followers in self._followed.items()
        }
        self._followed = {key: followers for key, followers in kept.items() if followers}

    def tell(self, holdings: Holdings, version: int, lr: float, scale: float) -> None:
        """Of the update that is about to be made. Not waited for: a follower that cannot be reached, or has given the
        group up, is struck off; it notices itself that updates fail."""
        self._hear()
        for (group, layer), followers in self._followed.items():
            if not followers:
                continue
            gradients = tuple(g.clone() for g in holdings.gradients(group, layer))
            fields = {"group": group, "layer": layer, "version": version, "lr": lr, "scale": scale}
            for name in list(followers):
                try:
                    self._send(name, followers, Message("update", fields, gradients))
                except MoeClusterError as error:
                    logger.warning("%s follows group %d no longer: %s", name, group, error)
                    followers.pop(name, None)

    def _send(self, name: str, followers: Mapping[str, _Follower], update: Message) -> None:
        """Without waiting, unless many are unconfirmed. Raises `LinkError` if it cannot be reached."""
        fields: Any = update.fields
        link, unconfirmed = self._links.get(name, (None, deque[_Sent]()))
        if link is None or link.closed:
            link, unconfirmed = self._exchange.open(name, followers[name].address), deque()
            self._links[name] = link, unconfirmed
        try:
            unconfirmed.append(_Sent(fields["group"], fields["version"], link.start(update)))
            while len(unconfirmed) > MAX_UNCONFIRMED:
                self._confirm(name, unconfirmed.popleft())
        except BaseException:
            link.close()
            raise

    def _hear(self) -> None:
        """What has been answered by now, of which nobody waits."""
        for name, (link, unconfirmed) in self._links.items():
            try:
                while unconfirmed and not link.closed and link.look(unconfirmed[0].pending.id):
                    self._confirm(name, unconfirmed.popleft())
            except LinkError as error:  # whoever sends the next one finds out
                logger.info("no answer of %s: %s", name, error)

    def _confirm(self, name: str, sent: _Sent) -> None:
        """A follower may have given the group up, and may follow it anew since. Raises `LinkError`."""
        try:
            if sent.pending.result(self._exchange.timeout_s).fields["wanted"]:
                return
        except LinkError:
            raise
        except MoeClusterError as error:
            logger.warning("%s could not take an update of group %d: %s", name, sent.group, error)
        for (group, _), followers in self._followed.items():
            if group == sent.group and name in followers and followers[name].version < sent.version:
                del followers[name]

    def close(self) -> None:
        for link, _ in self._links.values():
            link.close()
