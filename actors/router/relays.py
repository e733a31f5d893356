"""A router's links to the relays of other nodes, and which of an actor's tokens take that way."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from actors.errors import LinkError, LinkTimeout, PeerLost
from actors.moe.dispatch import Share
from actors.relay.bundle import Member, named, raise_if_failed
from actors.router.parcels import Parcel, alone, joined
from actors.router.roster import LinkOpener, Peer, Relaying
from actors.transport.contract import CUT_NOTICED_S, Link, Pending
from actors.transport.message import Message

logger = logging.getLogger(__name__)


class Relays:
    """A node's relay is that of its first actor, by name, that lives. After a failure on its way a node is asked
    directly until another placement begins: the relay may be what has failed, and an actor that is found lost by its
    own link is lost for certain. As a rule a failure is a death, so that another placement comes soon.

    One thread at a time, but for `cut`.
    """

    def __init__(self) -> None:
        self._peers: dict[str, Relaying] = {}
        self._links: dict[str, Link] = {}
        """By actor whose relay it leads to."""
        self._failed: set[str] = set()
        """Nodes."""
        self._opening: tuple[str, Future[Link]] | None = None

    # -- actors come and go -------------------------------------------------------------------------------------------

    def connect(self, peers: Mapping[str, Peer]) -> None:
        """These can be relayed to, and no others. Links are opened when they are needed first."""
        relaying = {name: peer.relaying for name, peer in peers.items() if peer.relaying is not None}
        self.close([name for name in self._links if relaying.get(name) != self._peers.get(name)])
        self._peers = relaying

    def try_all(self) -> None:
        """Another placement begins."""
        self._failed.clear()

    def close(self, names: Collection[str] | None = None) -> None:
        """Those of these actors, or all."""
        for name in list(self._links if names is None else names):
            if (link := self._links.pop(name, None)) is not None:
                link.close()

    def cut(self, names: Collection[str]) -> None:
        """From any thread."""
        if (opening := self._opening) is not None and opening[0] in names:
            opening[1].cancel()
        for name in names:
            if (link := self._links.get(name)) is not None:
                link.cut()

    def ways(self) -> dict[str, str]:
        """Actor -> another whose relay there is an open link to, which it is reached over. From any thread."""
        peers = self._peers  # replaced, never changed
        open_at = {peers[name].node: name for name in list(self._links) if name in peers}
        nodes = {name: peer.node for name, peer in peers.items() if peer.node not in self._failed}
        return {name: open_at[node] for name, node in nodes.items() if node in open_at}

    def forget(self) -> None:
        """Nobody waits for the open questions any more."""
        for link in self._links.values():
            link.forget()

    # -- a layer ------------------------------------------------------------------------------------------------------

    def parcels(
        self,
        names: Sequence[str],
        shares: Sequence[Share],
        row_bytes: int,
        lost: Collection[str],
        may_relay: Callable[[str], bool],
    ) -> list[Parcel]:
        """`names[a]`: actor number a. `row_bytes` of a token. Each actor has a way of its own that is lost, so that
        its own link tells it, or that `may_relay` says no to, and each of a node with which too little would be saved.
        """
        if not self._peers:
            return [alone(names[share.actor], share) for share in shares]
        by_way: dict[object, list[Share]] = {}
        for share in shares:
            name = names[share.actor]
            peer = self._peers.get(name)
            relayed = peer is not None and peer.node not in self._failed and name not in lost and may_relay(name)
            by_way.setdefault(peer.node if peer is not None and relayed else share.actor, []).append(share)
        parcels: list[Parcel] = []
        for together in by_way.values():
            own = [names[share.actor] for share in together]
            parcel = joined(own, together) if len(together) > 1 else None
            if parcel is not None and self._may_cross(parcel, row_bytes, lost):
                parcels.append(parcel)
            else:
                parcels += [alone(name, share) for name, share in zip(own, together, strict=True)]
        return parcels

    def start(self, parcel: Parcel, question: Message, direct: Sequence[Link]) -> Pending:
        """Of a parcel of several shares, as `parcels` has made it. `direct`: the actors' own links, which are cut when
        nobody is to wait for these actors. `PeerLost` names the actor whose relay it is."""
        node = self._peers[parcel.names[0]].node
        link = self._link_to(node)
        members = [Member(name, self._peers[name].address) for name in parcel.names]

        def note_failure(error: LinkError) -> None:
            if node not in self._failed:
                logger.warning(
                    "actors of node %s are asked directly, since the way over its relay failed: %s", node, error
                )
            self._failed.add(node)

        try:
            pending = link.start(named(question, members))
        except LinkError as error:
            note_failure(error)
            raise
        return RelayedPending(link, pending.id, tuple(direct), note_failure)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _may_cross(self, parcel: Parcel, row_bytes: int, lost: Collection[str]) -> bool:
        return self._is_worth_it(parcel, row_bytes) and self._open(parcel, lost) and self._fits(parcel, row_bytes)

    def _is_worth_it(self, parcel: Parcel, row_bytes: int) -> bool:
        return parcel.num_saved * row_bytes >= self._peers[parcel.names[0]].worth_bytes

    def _fits(self, parcel: Parcel, row_bytes: int) -> bool:
        """Shares that do one by one may not together."""
        limit = self._link_to(self._peers[parcel.names[0]].node).max_bytes
        return limit is None or parcel.num_bytes(row_bytes) <= limit

    def _link_to(self, node: str) -> Link:
        """That is open."""
        return next(self._links[name] for name in self._of_node(node) if name in self._links)

    def _of_node(self, node: str) -> list[str]:
        return sorted(name for name, peer in self._peers.items() if peer.node == node)

    def _open(self, parcel: Parcel, lost: Collection[str]) -> bool:
        """Whether there is a link to the node's relay."""
        node = self._peers[parcel.names[0]].node
        name = next(name for name in self._of_node(node) if name not in lost)
        if name in self._links and not self._links[name].closed and not self._links[name].is_cut:
            return True
        for other in self._of_node(node):
            self.close([other])
        try:
            self._links[name] = self._opened(name)
        except LinkError as error:
            logger.warning("actors of node %s are asked directly, since its relay cannot be reached: %s", node, error)
            self._failed.add(node)
            return False
        return True

    def _opened(self, name: str) -> Link:
        """By a thread of its own, since it is in the middle of a layer: a frozen actor may be cut off meanwhile."""
        opening: Future[Link] = Future()
        self._opening = name, opening
        opener = self._peers[name].open
        threading.Thread(target=_open_for, args=(opening, opener), name=f"reach-{name}", daemon=True).start()
        try:
            return opening.result()
        except CancelledError:
            raise PeerLost("it was cut off", peer=name) from None
        finally:
            self._opening = None


def _open_for(opening: Future[Link], open_link: LinkOpener) -> None:
    try:
        link = open_link()
    except Exception as error:
        with suppress(InvalidStateError):
            opening.set_exception(error)
        return
    try:
        opening.set_result(link)
    except InvalidStateError:  # nobody wants it any more
        link.close()


@dataclass(frozen=True)
class RelayedPending(Pending):
    """A question on its way over a relay."""

    direct: tuple[Link, ...] = ()
    """The own links of the actors it is for."""
    note_failure: Callable[[LinkError], None] = field(default=lambda error: None)

    def result(self, timeout_s: float) -> Message:
        """Errors are those of the actors' own links, and name the actor."""
        try:
            return self._result(timeout_s)
        except LinkError as error:
            self.note_failure(error)
            raise

    def _result(self, timeout_s: float) -> Message:
        deadline = time.monotonic() + timeout_s
        while not self.link.look(self.id, min(CUT_NOTICED_S, max(0.0, deadline - time.monotonic()))):
            for link in self.direct:
                if link.is_cut:
                    self.drop()
                    raise PeerLost("the link is closed", peer=link.peer)
            if time.monotonic() >= deadline:
                self.drop()
                raise LinkTimeout("no answer before the deadline", peer=self.link.peer)
        return raise_if_failed(self.link.wait(self.id, 0.0))
