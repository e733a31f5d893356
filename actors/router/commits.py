"""The last commit of a router: sent without waiting, and repeated until every expert actor has confirmed it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from actors.errors import LinkError, PeerLost
from actors.expert.exchange import Attempt
from actors.router.links import Links
from actors.router.roster import Roster
from actors.transport.contract import Pending

logger = logging.getLogger(__name__)


class LastCommit:
    """All actors had prepared, so the step counts even where the message was lost. Who has done it just says so."""

    def __init__(self, training: Links, reopen: Callable[[], None], timeout_s: float) -> None:
        """`reopen`: opens the links of `training` that are closed, or raises."""
        self._training, self._reopen, self._timeout_s = training, reopen, timeout_s
        self._fields: dict[str, Any] = {}
        self._unconfirmed: list[Pending | None] = []
        self._served = 0
        """The newest version that every expert actor has confirmed over the serving links."""

    def send(self, attempt: Attempt, *, lr: float, scale: float, term: int) -> None:
        """Nobody waits: the queue of each link keeps the order."""
        self._fields = {"step": attempt.step, "attempt": attempt.number, "lr": lr, "scale": scale, "term": term}
        self._unconfirmed = self._training.start_each("commit", self._fields)

    def confirm(self) -> None:
        """Reads the answers. If one is missing all actors are asked again."""
        answered = all(self._is_confirmed(pending) for pending in self._unconfirmed)
        if not answered:
            self._unconfirmed = [None]  # each answer comes once: whoever calls next must not wait for it
            self._reopen()
            self._training.ask_all("commit", self._fields)
        self._unconfirmed = []

    def confirm_without(self, staying: Roster) -> None:
        """The same, but for actors that are gone and not to stay. A link may tell only now that its peer has died."""
        while True:
            self._training.drop_closed(but=staying.peers)
            num_links = len(self._training)
            try:
                return self.confirm()
            except PeerLost:
                self._training.drop_closed(but=staying.peers)
                if len(self._training) == num_links:
                    raise

    def ask_again(self) -> None:
        """The answers that are open will not come."""
        if self._unconfirmed:
            self._unconfirmed = [None]

    def seen_done(self) -> None:
        """Another router has seen to it."""
        self._unconfirmed = []

    def forget(self) -> None:
        """It is of a state that is no more."""
        self._unconfirmed, self._fields = [], {}

    def of_term(self, term: int) -> None:
        """Whoever leads now repeats it in its own term."""
        if self._fields:
            self._fields["term"] = term

    def bring(self, serving: Links, version: int) -> None:
        """Once more over the serving links: there it may have overtaken the training links, or be the only one that
        arrives."""
        if self._served < version:
            serving.ask_all("commit", self._fields)
            self._served = version

    def doubt(self) -> None:
        """An actor can be reached again over the serving links that may not have heard of it."""
        if self._fields:
            self._served = 0

    def served(self, version: int) -> None:
        """Everybody has said over whichever link that it is at this version."""
        self._served = version

    def _is_confirmed(self, pending: Pending | None) -> bool:
        if pending is None:
            return False
        try:
            pending.result(self._timeout_s)
        except LinkError as error:
            if isinstance(error, PeerLost):
                pending.link.close()
            logger.warning("commit of step %s is not confirmed: %s", self._fields.get("step"), error)
            return False
        return True
