"""What a dispatcher does with rows of tokens: planned where the gate's choices are, taken out and put back.

T tokens   K choices of a token   P pairs of one actor   R rows of one actor   D model width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.moe.balance import expert_load
from actors.moe.device_dispatch import load_of, plan_there
from actors.moe.dispatch import HolderTable, Share, plan
from actors.moe.passes import add_at


def plan_where(
    ids_TK: Tensor, holders: HolderTable, backlog_A: Sequence[float], turn: int, weights_TK: Tensor | None = None
) -> tuple[list[Share], bool]:
    """The shares, made where the choices are, and whether the gate's weights are finite: without, there are none."""
    if ids_TK.device.type == "cuda":
        sound = None if weights_TK is None else torch.isfinite(weights_TK).all()
        return plan_there(ids_TK, holders, backlog_A, turn, sound=sound)
    if weights_TK is not None and not torch.isfinite(weights_TK).all():
        return [], False
    return plan(ids_TK, holders, backlog_A, turn), True


def load_where(ids_TK: Tensor, shares: Sequence[Share], holders: HolderTable) -> Tensor:
    """int64 [E] on the host: pairs of each expert. On a GPU by what the host knows of the shares."""
    if ids_TK.device.type == "cuda":
        return load_of(shares, holders)
    return expert_load(ids_TK, holders.num_experts)


def rows_of(x_TD: Tensor, tokens_T: Tensor) -> Tensor:
    """[R, D] of these tokens, ascending; the tokens themselves, not a copy, where they are all."""
    if len(tokens_T) == len(x_TD):
        return x_TD.contiguous()
    return x_TD.index_select(0, tokens_T.to(x_TD.device))


def add_rows(into_TD: Tensor, tokens_T: Tensor, part_RD: Tensor) -> None:
    """Adds rows to those of their tokens."""
    add_at(into_TD, tokens_T.to(into_TD.device), part_RD.to(into_TD.device))
