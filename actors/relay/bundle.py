"""What crosses to a node in one message: a layer's questions to several of its expert actors, with each token once.

A question `relay` has the fields `op` (`forward` or `backward`), `fields` (those that the actors' own questions share),
`members` (name and address of each actor), `sizes` (its rows) and, forward, `counts` (its `counts_E`). Its tensors:

    forward    rows [U, D], or FP8 [U, D] and scales [U]; int32 rows of U [R]; token_P; weight_P, each over all members
    backward   gradient of the sums [U, D]; int32 rows of U [R]

The answer has the fields of the members' answers under `answers`, and the tensors: sums [U, D], or gradients of tokens
[U, D] and of gate weights [P]. It is `failed` instead where a member did not answer as it should, and names it.

    M members   U tokens that at least one member needs   R rows of a member   P its pairs   D model width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from actors.errors import (
    InvalidInput,
    LinkTimeout,
    MoeClusterError,
    PeerLost,
    ProtocolError,
    RemoteError,
    StepAborted,
    VersionGone,
)
from actors.transport.message import Message
from actors.values import Address

OP = "relay"
Op = Literal["forward", "backward"]


@dataclass(frozen=True)
class Member:
    """An expert actor that a question is for, and where its neighbours reach it."""

    name: str
    address: Address


# -- the router's end -------------------------------------------------------------------------------------------------


def bundled(
    op: Op,
    fields: Mapping[str, Any],
    rows: Sequence[Tensor],
    row_M: Sequence[Tensor],
    *,
    counts_M: Sequence[Sequence[int]] = (),
    pairs: Sequence[Tensor] = (),
) -> Message:
    """`rows`: [U, ...] each. `row_M[m]`: int32 [R], rows of them that member m gets. Forward: `counts_M[m]` is its
    `counts_E`, `pairs` are token_P and weight_P over all members. The members are still to be named, by `named`."""
    described: dict[str, Any] = {"op": op, "fields": dict(fields), "sizes": [len(row_R) for row_R in row_M]}
    if op == "forward":
        described["counts"] = [list(counts_E) for counts_E in counts_M]
    return Message(OP, described, (*rows, torch.cat(tuple(row_M)), *pairs))


def named(question: Message, members: Sequence[Member]) -> Message:
    """The same for these actors, in the order of the question's parts."""
    told = [[member.name, *astuple(member.address)] for member in members]
    return Message(question.op, {**question.fields, "members": told}, question.tensors)


_KINDS: Mapping[str, type[MoeClusterError]] = {
    "step_aborted": StepAborted,
    "version_gone": VersionGone,
    "invalid_input": InvalidInput,
}
_LINK_KINDS = {"lost": PeerLost, "late": LinkTimeout, "protocol": ProtocolError}


def raise_if_failed(answer: Message) -> Message:
    """What a member's own link would have raised, naming it."""
    if answer.op != "failed":
        return answer
    kind, text, peer = (str(answer.fields.get(key)) for key in ("kind", "text", "peer"))
    if kind in _KINDS:
        raise _KINDS[kind](text)
    raise _LINK_KINDS.get(kind, RemoteError)(text, peer=peer)  # type: ignore[call-arg]


# -- the relay's end --------------------------------------------------------------------------------------------------


def failed(peer: str, error: MoeClusterError) -> Message:
    """What a link to this member raised, for `raise_if_failed`."""
    named_kinds = {**_KINDS, **_LINK_KINDS}
    kind = next((kind for kind, cls in named_kinds.items() if isinstance(error, cls)), "remote")
    return Message("failed", {"peer": peer, "kind": kind, "text": str(error).removesuffix(f" (peer {peer})")})


@dataclass(frozen=True)
class Bundle:
    """A question to a node, taken apart."""

    op: str
    members: tuple[Member, ...]
    row_M: tuple[Tensor, ...]
    num_tokens: int
    """U"""
    questions: tuple[Message, ...]
    """Of each member."""

    @staticmethod
    def of(question: Message) -> Bundle:
        """`InvalidInput` if it does not fit together."""
        try:
            return _taken_apart(question)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise InvalidInput(f"does not fit together: {error}", field=OP) from error

    def gathered(self, answers: Sequence[Message]) -> Message:
        """The answer to the node's question. Sums are made in the order of the members. `ProtocolError` names the
        member whose answer does not fit."""
        for member, row_R, answer in zip(self.members, self.row_M, answers, strict=True):
            self._check(member.name, len(row_R), answer)
        parts = [answer.tensors[0] for answer in answers]
        sum_UD = parts[0].new_zeros((self.num_tokens, parts[0].shape[1]))
        for row_R, part_RD in zip(self.row_M, parts, strict=True):
            sum_UD.index_add_(0, row_R, part_RD)
        fields = {"answers": [dict(answer.fields) for answer in answers]}
        rest = [torch.cat([answer.tensors[1] for answer in answers])] if self.op == "backward" else []
        return Message("ok", fields, (sum_UD, *rest))

    def _check(self, name: str, num_rows: int, answer: Message) -> None:
        need = 2 if self.op == "backward" else 1
        if len(answer.tensors) != need or answer.tensors[0].ndim != 2 or len(answer.tensors[0]) != num_rows:
            shapes = [tuple(tensor.shape) for tensor in answer.tensors]
            raise ProtocolError(f"answer of {shapes}, need {need} tensors and {num_rows} rows", peer=name)


def _taken_apart(question: Message) -> Bundle:
    told: Any = question.fields
    op, fields, sizes = str(told["op"]), dict(told["fields"]), [int(size) for size in told["sizes"]]
    members = tuple(Member(str(name), Address(*map(str, address))) for name, *address in told["members"])
    if not members or len(sizes) != len(members) or op not in ("forward", "backward"):
        raise ValueError(f"{op!r} with {len(sizes)} parts for {len(members)} actors")
    if max(sizes) > len(question.tensors[0]):  # before memory is taken: an index is short, a row is not
        raise ValueError(f"{max(sizes)} rows for one actor, of {len(question.tensors[0])}")
    if op == "backward":
        grad_y_UD, row = question.tensors
        row_M = row.split(sizes)
        questions = [Message(op, fields, (taken(grad_y_UD, row_R),)) for row_R in row_M]
        return Bundle(op, members, row_M, len(grad_y_UD), tuple(questions))
    *rows, row, token, weight = question.tensors
    counts_M = [[int(n) for n in counts_E] for counts_E in told["counts"]]
    row_M, pairs = row.split(sizes), [sum(counts_E) for counts_E in counts_M]
    questions = [
        Message(op, {**fields, "counts_E": counts_E}, (*(taken(part, row_R) for part in rows), token_P, weight_P))
        for counts_E, row_R, token_P, weight_P in zip(
            counts_M, row_M, token.split(pairs), weight.split(pairs), strict=True
        )
    ]
    return Bundle(op, members, row_M, len(rows[0]), tuple(questions))


def taken(rows_U: Tensor, row_R: Tensor) -> Tensor:
    """Rows [R, ...] of [U, ...]; the same tensor where it is all of them."""
    if len(row_R) == len(rows_U) and torch.equal(row_R, torch.arange(len(row_R), dtype=row_R.dtype)):
        return rows_U
    if rows_U.dtype.itemsize == 1:  # FP8 cannot be selected from in every torch
        return rows_U.view(torch.uint8).index_select(0, row_R).view(rows_U.dtype)
    return rows_U.index_select(0, row_R)
