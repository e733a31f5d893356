"""A router among several: does what the one that leads asks over a link, and takes its place when that one dies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from actors.errors import InvalidInput, LinkError, NonFinite, PeerLost, StepAborted
from actors.expert.exchange import Attempt
from actors.optim import OptimizerSettings
from actors.router.buckets import Buckets, Work
from actors.router.likeness import check_alike, facts_of
from actors.router.pinning import of_fields
from actors.router.replicas import Tally, parts_in
from actors.router.roster import LinkOpener, Peer, Roster
from actors.router.router import Router
from actors.router.saving import rules_of
from actors.router.steps import Update
from actors.transport.contract import answered
from actors.transport.message import Message
from actors.values import Placement, Promotion, StepReport

logger = logging.getLogger(__name__)

PeerFinder = Callable[[str, Mapping[str, Any]], Peer]
"""(name of an expert actor, `Peer.contact` as the leader has it) -> the same actor, reached from here."""


@dataclass(frozen=True)
class Prepared:
    """An update that is here in full; it waits for the leader's word."""

    attempt: Attempt
    update: Update
    report: StepReport


class Replica:
    """`handle` serves the leader, one question at a time, from a thread of its own; `promote` is called by any other.

    The router is one without a roster, or, of the first leader, one that has one and leads from the start.
    """

    def __init__(self, name: str, router: Router, find_peer: PeerFinder, *, leads: bool = False) -> None:
        self.name, self.router = name, router
        self._find_peer = find_peer
        self._lock = threading.Lock()
        self._leads, self._has_joined = leads, leads
        self._term = 0
        self._give_up = threading.Event()
        self._attempt = Attempt(0, 0)
        """That the gradients here are of."""
        self._work: Work | None = None
        """That computes the part at hand, or did so last."""
        self._buckets: Buckets | None = None
        self._tally: Tally | None = None
        self._prepared: Prepared | None = None
        self._missing: set[int] = set()
        """Pieces of the summed gradients that have not come yet."""
        self._committed: Prepared | None = None
        self._pause = ExitStack()
        """While serving waits for the leader's word."""
        self._is_paused = False
        self._incoming: list[Tensor] = []
        self._handlers: dict[str, Callable[[Message], Message]] = {
            "accumulate": self._accumulate,
            "gradients": self._gradients,
            "tally": self._told,
            "prepare": self._prepare,
            "sum": self._sum,
            "commit": self._commit,
            "abort": self._abort,
            "hold": self._hold,
            "release": self._release,
            "adopt": self._adopt,
            "begin_run": self._begin_run,
            "continue_run": self._continue_run,
            "compare": self._compare,
            "state": self._state,
            "fence": self._fence,
            "pin": self._pin,
            "keep_pins": self._keep_pins,
        }

    @property
    def leads(self) -> bool:
        return self._leads

    @property
    def has_joined(self) -> bool:
        """Whether it has the trunk, its own or that of a leader."""
        return self._has_joined

    @property
    def term(self) -> int:
        """The highest that it has heard of."""
        return max(self._term, self.router.replicas.term)

    def handle(self, peer: str, question: Message) -> Message:
        """Never raises: errors are answers too."""

        def handle() -> Message:
            handler = self._handlers.get(question.op)
            if handler is None:
                raise InvalidInput("unknown operation", field="op", value=question.op)
            self._check_term(question)
            return handler(question)

        with self._lock:
            return answered(self.name, peer, question, handle)

    def promote(self, others: Mapping[str, LinkOpener], term: int) -> Promotion:
        """The router that led is dead: this one leads these others from now on. `term` is higher than any before.

        A step that anybody has committed is committed by all, and no other: nothing that was reported is lost. Others
        that cannot follow are left out.
        """
        self._give_up.set()
        with self._lock:
            self._end_work()
            self._give_up.clear()
            if not self._has_joined:
                raise StepAborted(f"{self.name} has no trunk yet, it cannot lead")
            self._leads, self._term = True, max(term, self._term + 1)
            experts = self.router.steps.fence(self._term)
            followers = self._take_in(others)
            everybody = [*experts.values(), *followers.values()]
            self._finish_step(max([self.router.version, *(int(told["version"]) for told in everybody)]))
            self._bring_to_version(followers)
            self._keep_alike(followers)
            attempts = [int(told["attempt"]) for told in everybody if int(told["version"]) == self.router.version]
            self._resume()
            self._prepared = None
            self.router.steps.settle_anew(max([self._attempt_of_next(), *attempts]))
            committed = self._committed
            report = committed.report if committed and committed.attempt.step == self.router.version else None
            num_parameters = self.router.learner.skeleton.num_parameters
            return Promotion(self.router.version, report, self.router.placement, num_parameters)

    # -- a step -------------------------------------------------------------------------------------------------------

    def _accumulate(self, question: Message) -> Message:
        """Only begins it: the leader asks for pieces of the gradients and for the tally at once, and each is answered
        when it is there."""
        fields: Any = question.fields
        attempt = self._expect_next(fields)
        self._drop()
        self._attempt = attempt
        parts, num_tokens, num_microbatches = parts_in(question), int(fields["num_tokens"]), fields["num_microbatches"]
        buckets = self._buckets = Buckets(self.router.learner.parameters(), self.router.learner.pieces)

        def compute(should_stop: Callable[[], bool]) -> None:
            def should_end() -> bool:
                return should_stop() or self._give_up.is_set()

            try:
                self._tally = self.router.steps.accumulate(
                    attempt, parts, num_tokens, int(num_microbatches), should_end, buckets
                )
            except BaseException as error:
                buckets.close(f"{attempt} failed on {self.name}: {error}")
                raise

        self._work = Work(compute, f"{self.name}-step")
        return Message("ok")

    def _gradients(self, question: Message) -> Message:
        piece = self._piece(question)
        self._expect_work(question).wait(piece)
        return Message("ok", {}, (self.router.learner.pieces.pack(piece),))

    def _told(self, question: Message) -> Message:
        """Answers load [L, E], and which parameters have a gradient [P]."""
        self._expect_work(question)
        assert self._work is not None
        try:
            self._work.result()
        except NonFinite as error:
            return Message("ok", {"non_finite": str(error), "step": self._attempt.step})
        except PeerLost as error:
            return Message("ok", {"lost": [error.peer]})
        except LinkError as error:
            raise StepAborted(str(error)) from error
        tally = self._tally
        assert tally is not None
        told = {"loss": tally.loss, "balance": tally.balance, "num_tokens": tally.num_tokens, "seconds": tally.seconds}
        return Message("ok", told, (self.router.steps.load_LE.clone(), self.router.learner.pieces.present_P()))

    def _expect_work(self, question: Message) -> Buckets:
        attempt = Attempt.of(question.fields)
        if self._buckets is None or attempt != self._attempt:
            raise StepAborted(f"{question.op} of {attempt}, {self.name} has those of {self._attempt}")
        return self._buckets

    def _end_work(self) -> None:
        """Nothing computes any more."""
        if self._work is not None:
            self._work.end()
        self._work = self._buckets = self._tally = None

    def _prepare(self, question: Message) -> Message:
        """From here on serving waits: what other routers commit must not be seen in the middle of a forward."""
        fields: Any = question.fields
        attempt = self._expect_next(fields)
        load_LE, present_P, first = question.tensors
        self.router.learner.pieces.make_exactly(present_P)
        self.router.learner.pieces.write(0, first)
        self.router.steps.load_LE.copy_(load_LE)
        self._missing = set(range(1, len(self.router.learner.pieces)))
        report = StepReport(**fields["report"], load_LE=load_LE.tolist())
        update = Update(*(float(fields[name]) for name in ("lr", "scale", "bias_speed")))
        self._hold(question)
        self._attempt = attempt
        self._prepared = Prepared(attempt, update, report)
        return Message("ok")

    def _sum(self, question: Message) -> Message:
        piece = self._piece(question)
        if self._prepared is None or self._prepared.attempt != Attempt.of(question.fields):
            raise StepAborted(f"gradients of {Attempt.of(question.fields)}, prepared is {self._prepared}")
        self.router.learner.pieces.write(piece, *question.tensors)
        self._missing.discard(piece)
        return Message("ok")

    def _commit(self, question: Message) -> Message:
        attempt = Attempt.of(question.fields)
        if attempt.step != self.router.version:  # else it is repeated
            if self._prepared is None or self._prepared.attempt != attempt or self._missing:
                raise StepAborted(f"commit of {attempt}, prepared is {self._prepared}")
            self.router.replicas.term = self._term
            self._apply(self._prepared)
        self._resume()
        return Message("ok", {"version": self.router.version})

    def _apply(self, prepared: Prepared) -> None:
        """Serving waits already."""
        started = self.router.steps.apply(prepared.attempt, prepared.update)
        self.router.replicas.confirm(started)
        self._committed, self._prepared = prepared, None

    def _abort(self, question: Message) -> Message:
        if Attempt.of(question.fields).step == self.router.version + 1:
            self._drop()
        return Message("ok", {"version": self.router.version})

    # -- between steps ------------------------------------------------------------------------------------------------

    def _hold(self, question: Message) -> Message:
        if not self._is_paused:
            self._pause.enter_context(self.router.serving.pausing())
            self._is_paused = True
        if (shut := question.fields.get("shut")) is not None:
            if shut:
                self.router.serving.shut()
            else:
                self.router.serving.open()
        return Message("ok")

    def _release(self, question: Message) -> Message:
        if self._prepared is None:
            self._resume()
        return Message("ok")

    def _adopt(self, question: Message) -> Message:
        self._hold(question)
        self._drop_gradients()
        self._place(question.fields)
        self._resume()
        return Message("ok")

    def _begin_run(self, question: Message) -> Message:
        fields: Any = question.fields
        settings = OptimizerSettings(**fields["optimizer"])
        self.router.follow_run(int(fields["run"]), settings, *rules_of(fields))
        return Message("ok")

    def _continue_run(self, question: Message) -> Message:
        self.router.learner.follow_rules(*rules_of(question.fields))
        return Message("ok")

    def _compare(self, question: Message) -> Message:
        leaders: Any = question.fields["facts"]
        check_alike(facts_of(self.router.learner.source, self.router.learner.gate), leaders)
        return Message("ok")

    def _state(self, question: Message) -> Message:
        """A piece of all that the leader is; with the last one it is what this router is too."""
        fields: Any = question.fields
        if int(fields["piece"]) == 0:
            self._incoming.clear()
        if int(fields["piece"]) != len(self._incoming):
            raise StepAborted(f"piece {fields['piece']} of the trunk, {len(self._incoming)} have come")
        self._incoming.append(question.tensors[0])
        if (ticket := fields["ticket"]) is not None:
            content = torch.cat(self._incoming).numpy().tobytes()
            self._incoming.clear()
            tensors = safetensors.torch.load(content)
            if (pin := ticket.get("pin")) is not None:
                self.router.pinning.take(pin, tensors, self._find_peer)
            else:
                self._take(tensors, ticket)
        return Message("ok")

    def _take(self, tensors: Mapping[str, Tensor], ticket: Mapping[str, Any]) -> None:
        self._hold(Message("hold"))
        self._drop_gradients()
        self.router.saving.take(tensors, ticket)
        self._place(ticket)
        self._committed, self._has_joined = None, True
        self._resume()

    def _place(self, fields: Mapping[str, Any]) -> None:
        held = tuple(tuple(names) for names in fields["holders"])
        placement = Placement(int(fields["epoch"]), held, int(fields["group_size"]))
        peers = {name: self._find_peer(name, contact) for name, contact in fields["contacts"].items()}
        self.router.placing.follow(Roster(placement, peers), fields["held"])

    def _pin(self, question: Message) -> Message:
        pinned = of_fields(question.fields)
        if pinned.version != self.router.version:
            raise StepAborted(f"version {pinned.version} is to be pinned, {self.router.version} is here")
        self.router.pinning.follow(pinned, self.router.peers)
        return Message("ok")

    def _keep_pins(self, question: Message) -> Message:
        fields: Any = question.fields
        self.router.serving.pins.keep(set(fields["names"]))
        return Message("ok")

    def _fence(self, question: Message) -> Message:
        """Another replica leads now; what is left of the leader before was refused by the term already."""
        here = {"num_experts": self.router.learner.skeleton.num_experts}
        return Message("ok", {"version": self.router.version, "attempt": self._attempt_of_next(), **here})

    # -- promoted -----------------------------------------------------------------------------------------------------

    def _take_in(self, others: Mapping[str, LinkOpener]) -> dict[str, Mapping[str, Any]]:
        """-> what each of the others says of itself."""
        replicas = self.router.replicas
        replicas.close()
        for name, open_link in others.items():
            try:
                replicas.add(name, open_link())
            except LinkError as error:
                logger.warning("%s does not follow: %s", name, error)
        return {name: answer.fields for name, answer in replicas.ask("fence", {}).items()}

    def _finish_step(self, newest: int) -> None:
        """Commits what is prepared here if anybody has: it was said then, or soon would have been, that it counts."""
        if newest <= self.router.version:
            return
        prepared = self._prepared
        if prepared is None or self._missing or prepared.attempt.step != newest:
            raise StepAborted(f"{self.name} cannot lead: it is at version {self.router.version}, others at {newest}")
        self._hold(Message("hold"))
        self._apply(prepared)

    def _bring_to_version(self, followers: Mapping[str, Mapping[str, Any]]) -> None:
        replicas, version = self.router.replicas, self.router.version
        behind = [name for name, told in followers.items() if int(told["version"]) < version]
        # Who has done it meanwhile just says so.
        if behind and self._committed is not None:
            replicas.confirm(replicas.start_commit(self._committed.attempt))
        elif behind:
            for name in behind:
                replicas.leave_out(name, f"it is behind version {version}")

    def _keep_alike(self, followers: Mapping[str, Mapping[str, Any]]) -> None:
        """The leader before may have died in a growth, when some had it: all are as this router is."""
        num_experts = self.router.learner.skeleton.num_experts
        for name, told in followers.items():
            if int(told["num_experts"]) != num_experts:
                self.router.replicas.leave_out(name, f"it has {told['num_experts']} experts a layer, not {num_experts}")

    def _attempt_of_next(self) -> int:
        return self._attempt.number if self._attempt.step == self.router.version + 1 else 0

    # -- inside -------------------------------------------------------------------------------------------------------

    def _check_term(self, question: Message) -> None:
        term = int(question.fields.get("term", 0))  # type: ignore[call-overload]
        if term < self._term or (self._leads and term <= self._term):
            raise StepAborted(f"{question.op} of a router of term {term}, now is {self._term}")
        self._term, self._leads = term, False

    def _expect_next(self, fields: Mapping[str, Any]) -> Attempt:
        attempt = Attempt.of(fields)
        if not self._has_joined or attempt.step != self.router.version + 1:
            raise StepAborted(f"{attempt}, the version of {self.name} is {self.router.version}")
        return attempt

    def _piece(self, question: Message) -> int:
        piece, count = question.fields.get("piece"), len(self.router.learner.pieces)
        if type(piece) is not int or not 0 <= piece < count:
            raise InvalidInput(f"must be 0 to {count - 1}", field="piece", value=piece)
        return piece

    def _drop(self) -> None:
        self._drop_gradients()
        self._resume()

    def _drop_gradients(self) -> None:
        self._end_work()
        self._prepared = None
        self._missing.clear()
        self.router.learner.drop_gradients()

    def _resume(self) -> None:
        """Serving goes on."""
        self._pause.close()
        self._is_paused = False
