"""What of a layer crosses together: one actor's share, or those of several actors of a node with each token once.

U tokens of a parcel   R rows of one share
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.moe.dispatch import Share
from actors.moe.fp8 import Payload, packed
from actors.relay.bundle import bundled
from actors.router.rows import rows_of
from actors.transport.contract import Pending
from actors.transport.message import MAX_HEADER_BYTES, Message

INDEX_BYTES = 4
PAIR_BYTES = INDEX_BYTES + 8
"""With its weight."""


@dataclass(frozen=True)
class Parcel:
    names: tuple[str, ...]
    """Of the actors, one for each share."""
    shares: tuple[Share, ...]
    tokens_T: Tensor
    """Rows of the layer's input that any of them needs, ascending."""
    row_M: tuple[Tensor, ...] = ()
    """int32 [R] of each of several shares: where its rows are among those that cross."""

    @property
    def is_shared(self) -> bool:
        return len(self.shares) > 1

    @property
    def num_saved(self) -> int:
        """Rows that do not cross, which would if every share had a way of its own."""
        return sum(len(share.tokens_T) for share in self.shares) - len(self.tokens_T)

    def num_bytes(self, row_bytes: int) -> int:
        """At most, of a question with several shares."""
        rows = sum(len(row_R) for row_R in self.row_M)
        pairs = sum(len(share.token_P) for share in self.shares)
        return len(self.tokens_T) * row_bytes + rows * INDEX_BYTES + pairs * PAIR_BYTES + MAX_HEADER_BYTES

    def forward(self, fields: Mapping[str, Any], x_TD: Tensor, weights_N: Tensor, payload: Payload) -> Message:
        """The question with this part of the layer's tokens."""
        rows = packed(rows_of(x_TD, self.tokens_T), payload)
        if not self.is_shared:
            (share,) = self.shares
            pairs = share.token_P, _at(weights_N, share.pair_P)
            return Message("forward", {**fields, "counts_E": share.counts_E}, (*rows, *pairs))
        token_P = torch.cat([share.token_P for share in self.shares])
        weight_P = _at(weights_N, torch.cat([share.pair_P for share in self.shares]))
        counts_M = [share.counts_E for share in self.shares]
        return bundled("forward", fields, rows, self.row_M, counts_M=counts_M, pairs=(token_P, weight_P))

    def backward(self, fields: Mapping[str, Any], grad_y_TD: Tensor) -> Message:
        rows = (rows_of(grad_y_TD, self.tokens_T),)
        if self.is_shared:
            return bundled("backward", fields, rows, self.row_M)
        return Message("backward", fields, rows)

    def told(self, answer: Message) -> list[Mapping[str, Any]]:
        """What each actor says beside its tensors."""
        if not self.is_shared:
            return [answer.fields]
        return list(answer.fields["answers"])  # type: ignore[call-overload]


@dataclass(frozen=True)
class Asked:
    """A parcel that is with its actors."""

    parcel: Parcel
    pending: Pending | None
    """None where an actor was found lost with the question."""


def alone(name: str, share: Share) -> Parcel:
    return Parcel((name,), (share,), share.tokens_T)


def joined(names: Sequence[str], shares: Sequence[Share]) -> Parcel:
    """Several shares of one layer. On the host: their rows cross its memory anyway."""
    tokens_M = [share.tokens_T.cpu().numpy() for share in shares]
    num_tokens = 1 + max(int(tokens[-1]) for tokens in tokens_M)
    needed_T = np.zeros(num_tokens, dtype=np.bool_)
    for tokens in tokens_M:
        needed_T[tokens] = True
    row_T = needed_T.cumsum(dtype=np.int32) - 1
    rows = tuple(torch.from_numpy(row_T[tokens]) for tokens in tokens_M)
    return Parcel(tuple(names), tuple(shares), torch.from_numpy(needed_T.nonzero()[0]), rows)


def _at(weights_N: Tensor, pair_P: Tensor) -> Tensor:
    return weights_N.index_select(0, pair_P.to(weights_N.device))
