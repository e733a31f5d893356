"""Expert groups on their way to and from an expert actor, and the placement that says which of them it holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from actors.errors import InvalidInput, MoeClusterError, StepAborted
from actors.expert.births import Births, give_birth
from actors.expert.exchange import Attempt
from actors.expert.state import State
from actors.transport.message import Message, error_answer
from actors.values import Address, Placement


class Placing:
    """`place` and `retire` are called with the host's lock held; the others take it themselves, in whichever thread."""

    def __init__(self, state: State) -> None:
        self._state = state

    # -- beside steps -------------------------------------------------------------------------------------------------

    def arrive(self, group: int, owner: str, address: Address, here: Address, timeout_s: float) -> int:
        """Brings a group here, layer by layer, while its owner goes on with its steps, and follows its updates from
        then on, until `place` says that this actor holds it. Returns the bytes that came.

        Called from a thread of its own; `here` is where this host's exchange listens.
        """
        state = self._state
        with state.lock:
            state.check_groups([group])
            if group in state.groups:
                raise InvalidInput(f"{state.name} holds it already", field="group", value=group)
        return state.arrivals.bring(state.lock, group, owner, address, here, timeout_s)

    def leave_off(self, group: int) -> None:
        """Gives up a group that is on its way here, or had come for a placement that nobody uses."""
        state = self._state
        with state.lock:
            state.arrivals.drop(group)
            if group in state.groups and not state.step.under_way:
                state.holdings.hold([held for held in state.groups if held != group])

    def follow(self, peer: str, question: Message) -> Message:
        """One layer of a group for another actor, which gets every update of it from now on. In the exchange's
        thread; raises nothing that is an answer."""
        # Two hosts that ask each other must not wait for each other's locks; between prepare and commit the weights
        # are about to change by a sum that has been sent already.
        if not self._state.lock.acquire(timeout_s=0.05):
            return Message("busy")
        try:
            return Message("busy") if self._state.step.prepared is not None else self._follow(question)
        except MoeClusterError as error:
            return error_answer(error)
        finally:
            self._state.lock.release()

    def _follow(self, question: Message) -> Message:
        fields: Any = question.fields
        state = self._state
        group, layer = int(fields["group"]), state.layer_of(fields)
        if group not in state.owned:
            raise InvalidInput(f"{state.name} does not own it", field="group", value=group)
        tensors, updates = state.drained().read(group, layer)
        state.followers.add(group, layer, fields["follower"], Address(*fields["address"]), state.version)
        ticket = {"version": state.version, "updates": updates, "run": state.run}
        return Message("ok", {**ticket, "optimizer": state.holdings.settings.to_dict()}, tensors)

    def take_updates(self) -> None:
        """In the exchange's thread. A busy host does it itself later."""
        if self._state.lock.acquire(timeout_s=0):
            try:
                self._state.arrivals.catch_up()
            finally:
                self._state.lock.release()

    # -- between steps ------------------------------------------------------------------------------------------------

    def place(self, question: Message) -> Message:
        """The placement from now on; groups that are not held any more stay until `retire` or the next commit."""
        fields: Any = question.fields
        state = self._state
        if state.step.under_way:
            raise StepAborted("groups change between steps, and one is under way")
        state.updates.drain()
        held = tuple(tuple(names) for names in fields["holders"])
        placement = Placement(int(fields["epoch"]), held, state.group_size)
        version, run = int(fields["version"]), int(fields["run"])
        if not state.groups and version > state.version:
            state.version, state.run = version, run
            state.step.attempt = Attempt(version, 0)
        state.check_version(version)
        self._have(placement.held_by(state.name), Births.of(fields), version, run)
        state.num_experts = placement.num_experts
        state.copies.use(placement)
        state.exchange.connect({name: Address(*address) for name, address in fields["addresses"].items()})
        # Those that hold the group now take part in the steps, and those of groups owned elsewhere ask there.
        owned = state.owned
        state.followers.keep(lambda group, name: group in owned and name not in state.copies.holders(group))
        return Message("ok", {"experts": state.holdings.experts, "version": state.version})

    def _have(self, wanted: Sequence[int], births: Births | None, version: int, run: int) -> None:
        """Exactly these groups are held, and no longer arriving; those to be born are made."""
        state = self._state
        born = [group for group in wanted if births is not None and group in births.source_of]
        if births is not None:
            give_birth(state.holdings, state.loader.fresh, state.group_size, births, born)
        if lacking := [group for group in wanted if group not in state.holdings]:
            raise StepAborted(f"group {lacking[0]} is not here: {state.name} never had it, or has given it up")
        self._await_arrivals([g for g in wanted if g in state.holdings.arriving and g not in born], version, run)
        state.holdings.hold(wanted)
        for group in wanted:
            state.arrivals.arrived(group)

    def _await_arrivals(self, groups: Sequence[int], version: int, run: int) -> None:
        state = self._state
        deadline = time.monotonic() + state.exchange.timeout_s / 2
        while behind := state.arrivals.behind(groups, version, run):
            if time.monotonic() > deadline:
                raise StepAborted(f"group {behind[0]} has not arrived at {state.name} in version {version}")
            state.exchange.wait_for_update(0.05)
            state.arrivals.catch_up()

    def retire(self, question: Message) -> Message:
        """Every router uses the new placement: what is not held any more may go, and so may the ways to those who had
        it sent from here."""
        self._state.followers.let_go()
        if not self._state.step.under_way:
            self._state.drained().free_leaving()
            self._state.holdings.trim()
            self._state.measure()
        return Message("ok", {})
