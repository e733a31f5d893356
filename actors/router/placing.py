"""The placement that a router uses: taken over from expert actors, switched between two steps, settled after faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from actors.errors import MoeClusterError, PeerLost
from actors.router.roster import Roster
from actors.router.state import State
from actors.transport.message import Message
from actors.values import Placement

RosterFinder = Callable[[Sequence[str]], Roster]
"""Asked when expert actors are gone, with their names: gives the roster to go on with, or raises."""
BIRTH_FACTOR = 10.0
"""Births copy and draw as many weights as they make: they may take so many times as long as another switch."""


class Placing:
    """One thread at a time."""

    def __init__(self, state: State, find_roster: RosterFinder | None) -> None:
        self._state, self._find_roster = state, find_roster
        self.roster = Roster(Placement(0, (), 1), {})
        """In use."""
        self._settled = True
        """Whether every expert actor has it."""

    def fields(self) -> dict[str, Any]:
        """What a replica needs to use the placement as it is here."""
        roster = self.roster
        held = {name: self._state.training.held(name) for name in roster.peers}
        contacts = {name: dict(peer.contact) for name, peer in roster.peers.items()}
        size = roster.placement.group_size
        return {**roster.fields(), "group_size": size, "held": held, "contacts": contacts}

    # -- another placement --------------------------------------------------------------------------------------------

    def begin(self, roster: Roster) -> None:
        """The first one. Version and run are those of the expert actors."""
        self._state.training.links.connect(roster.peers)
        self._take_over()
        self._switch(roster)

    def adopt(self, roster: Roster) -> float:
        """Another placement, with what links it needs, between two steps. An older one than that in use is ignored, as
        is one from before a growth.

        -> seconds that steps and requests waited. After an error the placement before is in use again.
        """
        now, training = self.roster.placement, self._state.training
        if roster.placement.epoch <= now.epoch or roster.placement.num_experts != now.num_experts:
            return 0.0
        self._state.last_commit.confirm_without(roster)
        # What arrives needs the last update of who leaves, so nobody leaves before the switch.
        leaving = {n: p for n, p in self.roster.peers.items() if n in training.links and n not in roster.peers}
        with self.or_back():
            training.links.connect({**roster.peers, **leaving})
            started = time.monotonic()
            self._state.reopen()
            self._switch_all(roster)
        waited = time.monotonic() - started
        training.links.connect(roster.peers)
        training.links.tell_living("retire", {})
        return waited

    @contextmanager
    def or_back(self) -> Iterator[None]:
        """After an error inside, everybody goes back to the placement in use."""
        try:
            yield
        except MoeClusterError:
            with suppress(MoeClusterError):  # whoever needs it next tries again
                self._settle()
            raise

    def place(self, roster: Roster, births: Mapping[str, Any] | None = None) -> None:
        """Tells every expert actor, and uses it. Serving waits already. `births`: groups that the actors make."""
        state = self._state
        self._settled = False
        fields = {**self._question(roster), **(births or {})}
        timeout_s = BIRTH_FACTOR * state.timeout_s if births else state.timeout_s
        answers = state.training.links.ask_all("place", fields, timeout_s, among=list(roster.peers))
        self._use(roster, {name: numbers(answer, "experts") for name, answer in answers.items()})

    def _question(self, roster: Roster) -> dict[str, Any]:
        return {**roster.fields(), "version": self._state.version, "run": self._state.run}

    def follow(self, roster: Roster, held: Mapping[str, list[int]]) -> None:
        """A replica's `adopt`: the expert actors have been told by the leader, and `held` is what they said. Serving
        waits already."""
        self._state.last_commit.seen_done()  # by the leader
        self._state.training.links.connect(roster.peers)
        self._use(roster, held)

    def _use(self, roster: Roster, held: Mapping[str, list[int]]) -> None:
        state = self._state
        state.requests.links.connect(roster.peers)
        for dispatcher in state.dispatchers:
            dispatcher.use(roster.placement.epoch, held, roster.placement.num_experts)
        state.last_commit.served(state.version)
        self.roster, self._settled = roster, True

    def _switch_all(self, roster: Roster) -> None:
        """Here and on every replica."""
        if not len(self._state.replicas):
            return self._switch(roster)
        with self._state.replicas.holding():
            self._switch(roster)
            self._state.replicas.ask("adopt", self.fields())
        return None

    def _switch(self, roster: Roster) -> None:
        """Serving waits meanwhile."""
        with self._state.serving.stopped():
            self.place(roster)

    # -- everybody there ----------------------------------------------------------------------------------------------

    def reach_all(self) -> None:
        """Every actor has an open link, the last commit and the placement in use. Those that are gone are left out by a
        new roster."""
        state = self._state
        deadline = time.monotonic() + state.timeout_s
        while gone := self._gone():
            # Right after a growth the coordinator may not have heard of it yet, and tell an earlier placement.
            if self._find_roster is None or time.monotonic() > deadline:
                raise PeerLost("the actor is gone", peer=gone[0])
            self.adopt(self._find_roster(gone))
        state.last_commit.confirm()
        self._settle()

    def _gone(self) -> list[str]:
        """Those of the placement in use that cannot be reached. One that was forgotten in a switch to another, which
        came to nothing, has no link."""
        links = self._state.training.links
        return [*links.open_missing(self.roster.peers), *self._state.training.reopen()]

    def confirm(self) -> None:
        """The same, but whoever is gone is an error."""
        self._state.reopen()
        self._state.last_commit.confirm()
        self._settle()

    def settle_anew(self) -> None:
        """Some actors may have a placement that a router before had begun to switch to."""
        self._settled = False
        self._state.last_commit.confirm()
        self._settle()

    def _settle(self) -> None:
        """After a switch that failed: some actors may have a newer placement than the one in use."""
        links, peers = self._state.training.links, self.roster.peers
        others = [name for name in links if name not in peers]
        if not self._settled:
            links.drop_closed(but=peers)
            if gone := self._gone():
                raise PeerLost("the actor is gone", peer=gone[0])
            for name in others:
                with suppress(MoeClusterError):  # else who asked for the switch tells it
                    links.ask_all("place", self._question(self.roster), among=[name])
            self._switch_all(self.roster)
        if others:
            links.connect(peers)

    def _take_over(self) -> None:
        """A step that a router before left half done is dropped by the expert actors."""
        state = self._state
        answers: list[Any] = [answer.fields for answer in state.training.links.ask_all("status", {}).values()]
        found = {(int(fields["version"]), int(fields["run"])) for fields in answers}
        if len(found) != 1:
            raise MoeClusterError(f"expert actors are at different (version, run): {sorted(found)}")
        state.version, state.run = found.pop()
        state.attempt = max(int(fields["attempt"]) for fields in answers)
        state.replicas.term = max(int(fields["term"]) for fields in answers)
        state.training.links.ask_all("abort", state.attempt_at_next())
        state.training.links.ask_all("keep_pins", {"names": []})  # their trunks are gone
        state.attempt += 1


def numbers(answer: Message, name: str) -> list[int]:
    """A field of an answer that is a list of numbers."""
    return [int(n) for n in answer.fields[name]]  # type: ignore[union-attr]
