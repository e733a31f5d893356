"""The dispatch plan where the gate's choices are on a GPU: sorted, counted and cut up there.

The host learns numbers alone, in one transfer to pinned memory that it waits for by an event: how many pairs each
place gets and how many tokens each actor needs. Where experts have copies there is another before it, since whose pairs
go to which copy is the host's decision (`actors.moe.dispatch`). The shares are those of the plan on the host.

Letters as in `actors.moe.dispatch`; S places of all actors together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.moe.dispatch import HolderTable, Share, block_shifts, fill, refuse_missing


def plan_there(
    ids_TK: Tensor,
    holders: HolderTable,
    backlog_A: Sequence[float] | None = None,
    turn: int = 0,
    *,
    sound: Tensor | None = None,
) -> tuple[list[Share], bool]:
    """As `actors.moe.dispatch.plan`, with the tensors of the shares where `ids_TK` is.

    `sound`: a bool scalar there, which is brought along, so that nobody has to wait for it by itself; True without one.
    """
    num_tokens, top_k = ids_TK.shape
    ids_N = ids_TK.reshape(-1)
    if holders.missing:
        refuse_missing(ids_N, holders)
    if not len(ids_N) or not holders.num_slots:
        return [], True if sound is None else bool(sound)
    pairs = _spread(ids_N, holders, backlog_A, turn) if holders.has_copies else _by_place(ids_N, holders)
    if len(holders.num_slots) == 1 and (alone := _alone(pairs, num_tokens, top_k, sound)) is not None:
        return alone
    # Row of each pair's token among those its actor needs: the number of needed ones up to it.
    num_actors = len(holders.num_slots)
    token_N = pairs.order_N.div(top_k, rounding_mode="floor")
    cell_N = pairs.actor_N * num_tokens + token_N
    needed = torch.zeros((num_actors + 1) * num_tokens, dtype=torch.bool, device=ids_TK.device)
    needed.index_fill_(0, cell_N, True)
    row_AT = needed.view(num_actors + 1, num_tokens).cumsum(1, dtype=torch.int32)
    token_P = row_AT.view(-1).index_select(0, cell_N) - 1
    tokens_A = row_AT[:num_actors, -1]
    packed = _packed(needed[: num_actors * num_tokens], row_AT[:num_actors], tokens_A, len(ids_N))
    told, is_sound = _told(torch.cat((pairs.counts_S, tokens_A)), sound)
    counts, needs = told[:-num_actors], told[-num_actors:]
    shares: list[Share] = []
    first_pair = first_slot = first_token = 0
    for actor, (slots, num_needed) in enumerate(zip(holders.num_slots, needs, strict=True)):
        counts_E = counts[first_slot : first_slot + slots]
        part = slice(first_pair, first_pair + sum(counts_E))
        tokens_T = packed[first_token : first_token + num_needed]
        if num_needed:
            shares.append(Share(actor, tokens_T, token_P[part], counts_E, pairs.order_N[part]))
        first_pair, first_slot, first_token = part.stop, first_slot + slots, first_token + num_needed
    return shares, is_sound


def _alone(pairs: _Pairs, num_tokens: int, top_k: int, sound: Tensor | None) -> tuple[list[Share], bool] | None:
    """An actor that has all experts needs every token, unless some choices are unused: then None."""
    counts_E, is_sound = _told(pairs.counts_S, sound)
    if sum(counts_E) < len(pairs.order_N):
        return None
    tokens_T = torch.arange(num_tokens, device=pairs.order_N.device)
    token_P = pairs.order_N.div(top_k, rounding_mode="floor").to(torch.int32)
    return [Share(0, tokens_T, token_P, counts_E, pairs.order_N)], is_sound


def _told(numbers: Tensor, sound: Tensor | None) -> tuple[list[int], bool]:
    """These numbers on the host, and whether it is sound."""
    if sound is None:
        return to_host(numbers), True
    *told, is_sound = to_host(torch.cat((numbers, sound.reshape(1))))
    return told, bool(is_sound)


def load_of(shares: Sequence[Share], holders: HolderTable) -> Tensor:
    """int64 [E]: pairs of each expert over all shares, from what the host knows."""
    load_E = torch.zeros(holders.num_experts, dtype=torch.int64)
    for share in shares:
        slot_E = holders.slot_AE[share.actor]
        experts = (slot_E >= 0).nonzero().squeeze(1)
        load_E[experts] += torch.tensor(share.counts_E)[slot_E[experts]]
    return load_E


def to_host(numbers: Tensor) -> list[int]:
    """Waits for these numbers alone, not for what other threads have put on the device since."""
    if numbers.device.type != "cuda":
        result: list[int] = numbers.tolist()
        return result
    pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    pinned.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(numbers.device))
    event.synchronize()
    return pinned.tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Pairs:
    order_N: Tensor
    """Pairs in the order of their places; those of unused choices come last, or are left out."""
    actor_N: Tensor
    """Actor of each; of an unused choice the number of actors."""
    counts_S: Tensor


def _by_place(ids_N: Tensor, holders: HolderTable) -> _Pairs:
    """Every expert has one place: one stable sort by it."""
    device = ids_N.device
    place_N, order_N = (
        _on(holders, "only_place", device).index_select(0, ids_N % (holders.num_experts + 1)).sort(stable=True)
    )
    places_S = torch.arange(sum(holders.num_slots), dtype=place_N.dtype, device=device)
    ends_S = torch.searchsorted(place_N, places_S, right=True)
    counts_S = ends_S.diff(prepend=ends_S.new_zeros(1))
    return _Pairs(order_N, _on(holders, "actors", device).index_select(0, place_N.long()), counts_S)


def _spread(ids_N: Tensor, holders: HolderTable, backlog_A: Sequence[float] | None, turn: int) -> _Pairs:
    """The host says how many pairs each holder of an expert gets; sorted by expert, they are blocks to be moved."""
    device = ids_N.device
    sorted_N, order_N = ids_N.to(torch.int16).sort(stable=True)
    experts = torch.arange(-1, holders.num_experts, dtype=torch.int16, device=device)
    ends = torch.searchsorted(sorted_N, experts, right=True)
    num_unused, *counts_E = to_host(ends.diff(prepend=ends.new_zeros(1)))
    counts = fill(counts_E, holders, backlog_A, turn)
    shift_S = block_shifts(counts_E, counts, holders, num_unused)
    counts_S, shifts = _sent(np.stack([np.asarray(counts, dtype=np.int64), shift_S]), device)
    used = sum(counts)
    shift_N = torch.repeat_interleave(shifts, counts_S, output_size=used)
    actor_N = torch.repeat_interleave(_on(holders, "actors", device)[:-1], counts_S, output_size=used)
    from_N = shift_N + torch.arange(used, device=device)
    return _Pairs(order_N.index_select(0, from_N), actor_N, counts_S)


def _packed(needed_AT: Tensor, row_AT: Tensor, tokens_A: Tensor, num_pairs: int) -> Tensor:
    """Tokens that each actor needs, ascending, actor after actor. There are as many as pairs at most, so the place of
    each is known without the host: its actor's first, and its row there."""
    num_actors, num_tokens = row_AT.shape
    room = min(num_pairs, num_actors * num_tokens)
    first_A = tokens_A.cumsum(0) - tokens_A
    to_AT = (first_A.unsqueeze(1) + row_AT - 1).view(-1)
    packed = torch.empty(room + 1, dtype=torch.int64, device=row_AT.device)
    # What is not needed goes to the last place, which nobody reads.
    tokens_AT = torch.arange(num_tokens, device=row_AT.device).repeat(num_actors)
    return packed.scatter_(0, torch.where(needed_AT, to_AT, room), tokens_AT)


def _sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _on(holders: HolderTable, what: str, device: torch.device) -> Tensor:
    """Tables of the placement are brought to a device once."""
    known: dict[tuple[str, torch.device], Tensor] = holders.__dict__.setdefault("on_device", {})
    if (what, device) not in known:
        if what == "only_place":
            table = holders.only_place_E
        else:
            actors = torch.arange(len(holders.num_slots) + 1)
            table = actors.repeat_interleave(torch.tensor([*holders.num_slots, 1]))
        known[what, device] = table.to(device)
    return known[what, device]
