"""Several routers, as the one that leads them sees them: every batch is divided over all, and all make the same update.

The others are replicas: they have the same trunk, bit for bit, links of their own to the expert actors, and serve
requests like the leader. A step: `accumulate` on every replica while the leader does its own part; `gradients` are
asked for at the same time, and each piece comes as soon as a replica's backward is done with it; the leader sums the
trunk's gradients; `prepare` gives every replica the sum, which it keeps and acknowledges, and from then on its serving
waits; only when all have, `commit`. Whoever does not answer in time is left out and must not serve any longer.

Every message carries the leader's term. A replica that is promoted after a leader's death begins a higher one, and what
the leader before had sent and nobody had read yet is refused from then on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from actors.errors import LinkError, MoeClusterError, NonFinite, StepAborted
from actors.expert.exchange import Attempt
from actors.router.division import Part, Speeds, divide, parts_of
from actors.router.pieces import PIECE_BYTES, GradientPieces
from actors.transport.contract import Link, Pending
from actors.transport.message import Message
from actors.values import StepReport

logger = logging.getLogger(__name__)

STEP_FACTOR = 10.0
"""A part of a step may take so many times as long as one message to an expert actor."""
_ME = ""


@dataclass(frozen=True)
class Tally:
    """Of the parts of a batch that were run, each a share of the whole batch: sums over routers are the batch's own."""

    loss: float
    balance: float
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class Asked:
    """What a replica was asked in a step."""

    gradients: Mapping[int, Pending]
    """By piece, in the order in which they are asked for: the last first, as backward goes."""
    tally: Pending


class Replicas:
    """One thread at a time, but for `cut` and `lost`."""

    def __init__(self, timeout_s: float, piece_bytes: int = PIECE_BYTES) -> None:
        self.term = 0
        self.on_experts_lost: Callable[[Sequence[str]], None] = lambda names: None
        self._timeout_s, self._piece_bytes = timeout_s, piece_bytes
        self._links: dict[str, Link] = {}
        self._lost: list[str] = []
        self._stumbled: set[str] = set()
        """Replicas of which an attempt at this step has failed that the leader itself had no trouble with."""
        self.speeds = Speeds()
        """What batches are divided by."""
        self._asked: dict[str, Asked] = {}

    def __len__(self) -> int:
        return len(self._links)

    # -- who is one ---------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self._links)

    @property
    def lost(self) -> list[str]:
        """Those that were left out since they did not answer or not as they should. They must be ended."""
        return list(self._lost)

    def add(self, name: str, link: Link) -> None:
        self.remove(name)
        self._links[name] = link
        self._lost = [n for n in self._lost if n != name]

    def remove(self, name: str) -> None:
        """On purpose. Nothing happens for one that is not there."""
        if (link := self._links.pop(name, None)) is not None:
            link.close()
            self.speeds.forget(name)

    def cut(self, names: Sequence[str]) -> None:
        """Nothing is waited for from these any longer. From any thread."""
        for name in names:
            if (link := self._links.get(name)) is not None:
                link.cut()

    def close(self) -> None:
        for name in self.names:
            self.remove(name)

    # -- a step -------------------------------------------------------------------------------------------------------

    def start(self, attempt: Attempt, microbatches: Sequence[Tensor], num_tokens: int, num_pieces: int) -> list[Part]:
        """Divides the batch, gives every replica its part and asks for its gradients. -> the part of the leader.

        What comes while the leader computes waits in its memory: up to the trunk's gradients of each replica, as sent.
        """
        sizes = [len(ids_BS) for ids_BS in microbatches]
        mine, *theirs = parts_of(microbatches, divide(sizes, self.speeds.of([_ME, *self._links])))
        whole = {**_fields(attempt), "num_tokens": num_tokens, "num_microbatches": len(microbatches)}
        self._asked = {}
        for name, parts in zip(self.names, theirs, strict=True):
            if parts:
                begin = Message("accumulate", {**whole, **_described(parts)}, (_flat(parts),))
                self._asked[name] = self._ask_for_part(name, attempt, begin, num_pieces)
        return mine

    def collect(self, own: Tally, pieces: GradientPieces, load_LE: Tensor) -> Tally:
        """Adds what the replicas have to the leader's gradients and load, always in the same order. -> over all.

        `StepAborted` if one of them could not do its part, `NonFinite` if it is not finite.
        """
        asked, self._asked = self._asked, {}
        self.speeds.note(_ME, own.num_tokens, own.seconds)
        deadline = time.monotonic() + STEP_FACTOR * self._timeout_s
        answers = {name: self._part_of(name, each.tally, deadline) for name, each in asked.items()}
        for name, answer in answers.items():
            part = _tally(answer)
            self.speeds.note(name, part.num_tokens, part.seconds)
            own = Tally(own.loss + part.loss, own.balance + part.balance, own.num_tokens + part.num_tokens, own.seconds)
            load_LE += answer.tensors[0]
            pieces.make_present(answer.tensors[1])
        for piece in range(len(pieces)):
            for name, each in asked.items():
                pieces.add(piece, self._required(name, each.gradients[piece]).tensors[0])
        return own

    def prepare(
        self,
        attempt: Attempt,
        update: Mapping[str, float],
        report: StepReport,
        pieces: GradientPieces,
        load_LE: Tensor,
    ) -> None:
        """Every replica has the summed gradients and what to do with them. `StepAborted` if one is lost instead."""
        if not self._links:
            return
        fields = {**_fields(attempt), **update, "report": _without_load(report)}
        first = Message("prepare", fields, (load_LE, pieces.present_P(), pieces.read(0)))
        started = [(name, self._start(name, first)) for name in self.names]
        for piece in range(1, len(pieces)):
            more = Message("sum", {**_fields(attempt), "piece": piece}, (pieces.read(piece),))
            started += [(name, self._start(name, more)) for name in self.names]
        for name, pending in started:
            self._required(name, pending)

    def start_commit(self, attempt: Attempt) -> dict[str, Pending | None]:
        return {name: self._start(name, Message("commit", _fields(attempt))) for name in self.names}

    def confirm(self, started: Mapping[str, Pending | None]) -> None:
        """The step counts whatever happens here: who does not say that it has done it is left out."""
        for name, pending in started.items():
            self._answer(name, pending, self._timeout_s)
        self._stumbled.clear()

    def abort(self, attempt: Attempt) -> None:
        """Expert actors were told before: a replica that computes is refused there, and so listens soon."""
        self._asked = {}
        for link in self._links.values():
            link.forget()
        self.ask("abort", _fields(attempt))

    # -- between steps ------------------------------------------------------------------------------------------------

    def ask(self, op: str, fields: Mapping[str, Any], tensors: tuple[Tensor, ...] = ()) -> dict[str, Message]:
        """The same question to every replica. Who does not answer it as it should is left out."""
        started = {name: self._start(name, Message(op, fields, tensors)) for name in self.names}
        answers = {name: self._answer(name, pending, self._timeout_s) for name, pending in started.items()}
        return {name: answer for name, answer in answers.items() if answer is not None}

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Inside, no replica serves: what is changed is changed for all of them."""
        self.ask("hold", {})
        try:
            yield
        finally:
            self.ask("release", {})

    def shut(self, is_shut: bool) -> None:
        """Inside `holding`: whether, whoever dies, no replica serves until it is given a trunk."""
        self.ask("hold", {"shut": is_shut})

    def give_state(self, names: Sequence[str], tensors: Mapping[str, Tensor], ticket: Mapping[str, Any]) -> None:
        """All that a trunk is, to these replicas, who begin with it. Who does not take it is left out."""
        if not names:
            return
        content = torch.frombuffer(bytearray(safetensors.torch.save(dict(tensors))), dtype=torch.uint8)
        parts = content.split(self._piece_bytes)
        for number, part in enumerate(parts):
            fields = {"piece": number, "ticket": dict(ticket) if number + 1 == len(parts) else None}
            started = {name: self._start(name, Message("state", fields, (part,))) for name in names}
            for name, pending in started.items():
                self._answer(name, pending, STEP_FACTOR * self._timeout_s)

    # -- inside -------------------------------------------------------------------------------------------------------

    def leave_out(self, name: str, reason: object) -> None:
        if name in self._links:
            logger.warning("%s is left out: %s", name, reason)
            self.remove(name)
            self._lost.append(name)

    def _ask_for_part(self, name: str, attempt: Attempt, begin: Message, num_pieces: int) -> Asked:
        """Nothing waits for an answer here: they come while the leader computes."""
        fields = _fields(attempt)
        pieces = {p: Message("gradients", {**fields, "piece": p}) for p in reversed(range(num_pieces))}
        started = [self._start(name, each) for each in (begin, *pieces.values(), Message("tally", fields))]
        pending = [each for each in started if each is not None]
        if len(pending) < len(started):
            raise StepAborted(f"{name} is lost")
        return Asked(dict(zip(pieces, pending[1:-1], strict=True)), pending[-1])

    def _start(self, name: str, question: Message) -> Pending | None:
        """None where it is lost with that."""
        if name not in self._links:
            return None
        fields = {"term": self.term, **question.fields}
        try:
            return self._links[name].start(Message(question.op, fields, question.tensors))
        except LinkError as error:
            self.leave_out(name, error)
            return None

    def _answer(self, name: str, pending: Pending | None, timeout_s: float) -> Message | None:
        if pending is None:
            return None
        try:
            return pending.result(max(0.001, timeout_s))
        except MoeClusterError as error:
            self.leave_out(name, error)
            return None

    def _required(self, name: str, pending: Pending | None) -> Message:
        answer = self._answer(name, pending, self._timeout_s)
        if answer is None:
            raise StepAborted(f"{name} is lost")
        return answer

    def _part_of(self, name: str, pending: Pending, deadline: float) -> Message:
        try:
            answer = pending.result(max(0.001, deadline - time.monotonic()))
        except StepAborted as error:
            if name in self._stumbled:
                self.leave_out(name, error)
            self._stumbled.add(name)
            raise
        except MoeClusterError as error:
            self.leave_out(name, error)
            raise StepAborted(f"{name} is lost: {error}") from error
        if gone := answer.fields.get("lost"):
            self.on_experts_lost(list(gone))
            raise StepAborted(f"{name} cannot reach {', '.join(gone)}")
        if text := answer.fields.get("non_finite"):
            raise NonFinite(str(text), step=int(answer.fields["step"]))
        return answer


def _fields(attempt: Attempt) -> dict[str, int]:
    return {"step": attempt.step, "attempt": attempt.number}


def _without_load(report: StepReport) -> dict[str, Any]:
    """Load may be too much for a header: it goes as a tensor."""
    return {field.name: getattr(report, field.name) for field in fields_of(report) if field.name != "load_LE"}


def _described(parts: Sequence[Part]) -> dict[str, Any]:
    return {"parts": [[part.number, *part.ids_BS.shape, part.share] for part in parts]}


def _flat(parts: Sequence[Part]) -> Tensor:
    return torch.cat([part.ids_BS.reshape(-1).to("cpu", torch.int32) for part in parts])


def parts_in(question: Message) -> list[Part]:
    """Of an `accumulate` question."""
    described: Any = question.fields["parts"]
    (flat,) = question.tensors
    pieces = flat.split([rows * length for _, rows, length, _ in described])
    return [
        Part(int(number), ids.long().view(rows, length), float(share))
        for (number, rows, length, share), ids in zip(described, pieces, strict=True)
    ]


def _tally(answer: Message) -> Tally:
    fields: Any = answer.fields
    return Tally(float(fields["loss"]), float(fields["balance"]), int(fields["num_tokens"]), float(fields["seconds"]))
