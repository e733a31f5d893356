"""An expert actor's inside: holds expert groups, computes for routers, keeps gradients, applies its own optimizer.

Everything it is asked comes as a `Message` to `handle`, one at a time, whichever link brought it. A training step is a
transaction: forward and backward accumulate under (step, attempt); `prepare` says the gradients are complete; `commit`
applies the optimizer and makes the version the step; `abort` drops everything of that attempt.

Where groups have copies on other actors, `prepare` also sends what was accumulated here to each group's owner, and
`reduce` lets the owners send the sums back: every copy then commits the same update.

With a staleness above 0 `commit` leaves the update to a thread (`actors.expert.updates`), and a forward waits only if
its layer is further behind. Whatever reads or changes whole groups lets that thread finish first.

Who does what: `computing` a layer, `steps` what ends one, `placing` groups that come and go, `saving` state in and out.
They share a `State`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from actors.errors import InvalidInput, LinkError
from actors.expert.admission import Admission, lane
from actors.expert.computing import Computing
from actors.expert.exchange import Exchange, PeerOpener
from actors.expert.holdings import Holdings
from actors.expert.loader import Family, HoldingsLoader
from actors.expert.placing import Placing
from actors.expert.playing import Playing
from actors.expert.residency import Quarters
from actors.expert.saving import Saving
from actors.expert.state import State
from actors.expert.steps import Steps
from actors.expert.updates import Updates
from actors.moe.cache import CacheSettings
from actors.moe.experts import Weights
from actors.transport.contract import answered
from actors.transport.message import Message, error_answer
from actors.trunk.layout import Layout, ModelLayout, layout_of
from actors.trunk.source import ModelSource
from actors.values import Address

_CHANGE_WEIGHTS = frozenset(("commit", "place", "retire", "load"))
"""Questions that change weights or move them: they wait for what is being played. No others may: the next pass, of the
same version and placement, would wait for them, and two routers' passes for each other where two actors began them in
different orders."""


def _no_peers(name: str, address: Address) -> Any:
    raise LinkError("this host was given no way to reach others", peer=name)


class ExpertHost:
    """Holds `groups` (expert group numbers, in local order) of every MoE layer of the model.

    Thread-safe: a lock makes every question and every control call exclusive. `exchange.handle` is to be served beside
    `handle`, from another thread.
    """

    lane = staticmethod(lane)

    def __init__(
        self,
        name: str,
        source: ModelSource,
        groups: Sequence[int],
        *,
        group_size: int,
        device: str = "cpu",
        version: int = 0,
        open_peer: PeerOpener = _no_peers,
        timeout_s: float = 30.0,
        cache: CacheSettings | None = None,
        max_pairs: int = 0,
        layout: ModelLayout | None = None,
    ) -> None:
        """`max_pairs` of a token and an expert are computed at a time; 0: what suits the device. `layout`: of the
        source, from somebody who has it; without one transformers is imported to find out."""
        self.name = name
        self.group_size = group_size
        family = Family(source)
        known: Layout = layout or layout_of(family()) or family()
        quarters = Quarters(known, group_size, torch.device(device), cache, max_pairs)
        self.exchange = Exchange(name, open_peer, timeout_s=timeout_s)
        self.state = State(name, HoldingsLoader(source, quarters, family), groups, self.exchange, version=version)
        self._admission = Admission(self.state)
        self.computing = Computing(self.state, self._admission)
        self.steps = Steps(self.state)
        self.placing = Placing(self.state)
        self.saving = Saving(self.state)
        self.playing = Playing(self.state)
        self.exchange.on_follow = self.placing.follow
        self.exchange.on_update = self.placing.take_updates
        self._handlers: dict[str, Callable[[Message], Message]] = {
            "forward": self.computing.forward,
            "backward": self.computing.backward,
            "prepare": self.steps.prepare,
            "reduce": self.steps.reduce,
            "commit": self.steps.commit,
            "abort": self.steps.abort,
            "fence": self._fence,
            "begin_run": self.steps.begin_run,
            "place": self.placing.place,
            "retire": self.placing.retire,
            "status": self._status,
            "echo": self._echo,
            "export_layer": self.saving.export_layer,
            "snapshot": self.saving.take_snapshot,
            "load": self.saving.load_model,
            "pin": self.saving.pin,
            "keep_pins": self.saving.keep_pins,
            "arrange": self.playing.arrange,
            "play": self.playing.play,
        }

    @property
    def version(self) -> int:
        """Of the last commit."""
        return self.state.version

    @property
    def holdings(self) -> Holdings:
        return self.state.holdings

    @property
    def updates(self) -> Updates:
        return self.state.updates

    @property
    def groups(self) -> tuple[int, ...]:
        return self.state.groups

    @property
    def experts(self) -> list[int]:
        """In local order."""
        return self.holdings.experts

    def close(self) -> None:
        """Ends its links to other actors."""
        self.playing.close()
        self.state.close()

    # -- what routers ask ---------------------------------------------------------------------------------------------

    def handle(self, peer: str, question: Message) -> Message:
        """One question, one answer. Never raises: errors of the tree and unexpected ones are answers too."""
        handler = self._handlers.get(question.op)
        if handler is None:
            return error_answer(InvalidInput("unknown operation", field="op", value=question.op))

        def handle() -> Message:
            self._admission.wait(question)
            with self.state.lock, self._before_updates(question):
                if question.op in _CHANGE_WEIGHTS and not self._is_repeated(question):
                    self.playing.settle()
                return handler(question)

        return answered(self.name, peer, question, handle)

    def _is_repeated(self, question: Message) -> bool:
        """A commit that is done already: every router sends it, over each of its links."""
        return question.op == "commit" and question.fields.get("step") == self.version

    def _before_updates(self, question: Message) -> AbstractContextManager[None]:
        """Of what is made beside it: a router waits for these answers."""
        waited_for = question.op in ("forward", "backward", "prepare") and lane(question) == "training"
        return self.updates.first() if waited_for else nullcontext()

    def ready(self, question: Message) -> bool:
        """Whether `handle` would answer at once, and not wait for updates. From any thread."""
        return self._admission.is_ready(question)

    def idle(self) -> bool:
        """Does one piece of deferred work, between questions. False when none is left."""
        state = self.state
        with state.lock, state.updates.first():
            if not state.step.do_deferred(state.holdings.stacks):
                state.arrivals.catch_up()
            return state.step.has_deferred

    def _echo(self, question: Message) -> Message:
        """What a message costs without the experts' computation."""
        return Message("ok", {"version": self.version}, question.tensors[:1])

    def _fence(self, question: Message) -> Message:
        self.steps.fence(question.fields)
        return self._status(question)

    def _status(self, question: Message) -> Message:
        return Message("ok", self.status())

    def status(self) -> dict[str, Any]:
        """Cheap and without the lock: it is also the heartbeat of an actor that is busy."""
        state = self.state
        return {
            "version": state.version,
            "used": max(0, state.version - state.updates.max_lag),
            "merged": state.updates.num_merged,
            "groups": list(self.groups),
            "experts": self.experts,
            "tokens": self.computing.tokens,
            "run": state.run,
            "attempt": state.step.attempt.number,
            "term": self.steps.term,
            "memory_bytes": state.memory_bytes + self.exchange.keeper.num_bytes(),
            "pinned_bytes": state.pinned_bytes,
            "cache": state.holdings.cache_counters(),
        }

    # -- for a router of this process ---------------------------------------------------------------------------------

    @contextmanager
    def in_place(self, version: int, device: torch.device) -> Iterator[Sequence[Weights] | None]:
        """The weights of every layer, which inside neither move nor change, if they are whole, of this version and on
        that device."""
        state = self.state
        with state.lock:
            layers = state.at_rest()
            is_here = layers is not None and all(w.device == device for w in layers[0].values())
            yield layers if is_here and state.version == version else None

    def rows(self) -> dict[int, int]:
        """Expert -> its row in the stacks. Inside `in_place`."""
        return self.holdings.rows()
