"""From the gate's choices to what each expert actor is sent, and back.

Each token goes once to every actor that computes at least one of its experts; only the pairs (token, expert) computed
there go along, already sorted by the actor's local experts, so that the actor does no sorting. Where several actors
hold an expert, the router spreads the expert's pairs over them, batch by batch, by what it knows alone.

Letters: T tokens, K choices of a token, N = T * K pairs, P pairs of one actor, E experts, A actors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.errors import StepAborted

AWAY = 0.25
"""How much fuller a near actor may get than a far one, as a part of an actor's mean pairs. A token that stays in its
node is cheaper, yet a near actor must not drown while a far one idles."""

MIN_PART = 16
"""Pairs of one expert. Fewer are not worth a message of their own, nor another reading of the expert's weights: a
holder gets none rather than a smaller part, and AWAY is never less than this, so that few tokens stay in their node."""

NUM_REFILLED = 16
"""The largest experts with copies are placed first, so their places are looked at again when the others are known:
in 3,000 Zipf loads the fullest actor was at worst 6 % above the optimum then, instead of 39 %."""


@dataclass(frozen=True)
class HolderTable:
    """Where each of the E experts of a layer can be computed.

    A slot is the place of an expert among its actor's, a place counts through the slots of all actors.
    """

    num_slots: tuple[int, ...]
    """Local experts of each actor A."""
    slot_AE: Tensor
    """int64 [A, E]: slot of the expert at that actor, -1 where it holds none."""
    near_A: tuple[bool, ...]
    """Whether the actor is on the router's own node."""

    @staticmethod
    def of(held: Sequence[Sequence[int]], num_experts: int, near: Sequence[bool] | None = None) -> HolderTable:
        """`held[a]` lists the experts of actor a, in its local order. Without `near`, all actors are equally near."""
        slot_AE = torch.full((len(held), num_experts), -1)
        for actor, experts in enumerate(held):
            assert len(set(experts)) == len(experts), f"actor {actor} holds an expert twice"
            slot_AE[actor, list(experts)] = torch.arange(len(experts))
        near_A = (True,) * len(held) if near is None else tuple(near)
        assert len(near_A) == len(held)
        return HolderTable(tuple(len(experts) for experts in held), slot_AE, near_A)

    @property
    def num_experts(self) -> int:
        return self.slot_AE.shape[1]

    @cached_property
    def missing(self) -> tuple[int, ...]:
        """Experts that nobody holds."""
        return tuple(expert for expert, places in enumerate(self.places_E) if not places)

    @cached_property
    def has_copies(self) -> bool:
        return any(len(places) > 1 for places in self.places_E)

    @cached_property
    def places_E(self) -> tuple[dict[int, int], ...]:
        """Actor -> place, of every holder of each expert, by actor number."""
        first_slot_A = np.cumsum((0, *self.num_slots))
        places_E: tuple[dict[int, int], ...] = tuple({} for _ in range(self.num_experts))
        for actor, expert in (self.slot_AE >= 0).nonzero().tolist():
            places_E[expert][actor] = int(first_slot_A[actor] + self.slot_AE[actor, expert])
        return places_E

    @cached_property
    def only_place_E(self) -> Tensor:
        """int16 [E + 1]: place of each expert, where none has copies; then a place behind all, for expert -1."""
        behind = sum(self.num_slots)
        return torch.tensor([*(min(p.values(), default=behind) for p in self.places_E), behind], dtype=torch.int16)

    def without(self, actors: Collection[int]) -> HolderTable:
        """These actors hold nothing any more. Actor numbers and slots keep their meaning."""
        slot_AE = self.slot_AE.clone()
        slot_AE[list(actors)] = -1
        return replace(self, slot_AE=slot_AE)


@dataclass(frozen=True)
class Share:
    """One actor's part of a layer."""

    actor: int
    tokens_T: Tensor
    """Rows of the layer's input it needs, ascending."""
    token_P: Tensor
    """int32 row in `tokens_T` of each pair, sorted by the actor's local expert."""
    counts_E: list[int]
    pair_P: Tensor
    """Place of each pair in the flattened [T * K] choices."""


def plan(
    topk_ids_TK: Tensor, holders: HolderTable, backlog_A: Sequence[float] | None = None, turn: int = 0
) -> list[Share]:
    """Shares of the actors that are needed; actors without a pair are left out. Every pair is in exactly one share,
    but for unused places (expert -1), which are in none.

    `backlog_A` is what each actor still has to do for others, in pairs. `turn`, best another one for each router,
    decides between equals. Both matter for experts with copies only. Equal arguments give equal shares.
    Raises `StepAborted` if nobody holds an expert that is needed.
    """
    num_tokens, top_k = topk_ids_TK.shape
    ids_N = topk_ids_TK.reshape(-1)
    if holders.missing:
        refuse_missing(ids_N, holders)
    if holders.has_copies:
        order_N, counts = _spread(ids_N, holders, backlog_A, turn)
    else:
        place_N = holders.only_place_E[ids_N]
        order_N = _stable_order(place_N)
        counts = torch.bincount(place_N, minlength=sum(holders.num_slots)).tolist()
    shares: list[Share] = []
    first_pair = first_slot = 0
    for actor, slots in enumerate(holders.num_slots):
        counts_E = counts[first_slot : first_slot + slots]
        num_pairs = sum(counts_E)
        if num_pairs:
            pair_P = torch.from_numpy(order_N[first_pair : first_pair + num_pairs])
            shares.append(_share(actor, pair_P, counts_E, num_tokens, top_k))
        first_pair += num_pairs
        first_slot += slots
    return shares


def refuse_missing(ids_N: Tensor, holders: HolderTable) -> None:
    needed = set(ids_N.unique().tolist())
    lost = [expert for expert in holders.missing if expert in needed]
    if lost:
        raise StepAborted(f"no expert actor holds expert {', '.join(map(str, lost))}")


def _stable_order(number_N: Tensor) -> np.ndarray:
    """Stable argsort of int16. Numpy sorts 16-bit integers by their digits: 4 times as fast as torch at 4,096 pairs."""
    return number_N.numpy().argsort(kind="stable")


def _spread(
    ids_N: Tensor, holders: HolderTable, backlog_A: Sequence[float] | None, turn: int
) -> tuple[np.ndarray, list[int]]:
    """-> pairs [N] in the order of their places, in token order within; pairs of each place."""
    num_unused, *counts_E = torch.bincount(ids_N + 1, minlength=holders.num_experts + 1).tolist()
    counts = fill(counts_E, holders, backlog_A, turn)
    shift = np.repeat(block_shifts(counts_E, counts, holders, num_unused), counts)
    return _stable_order(ids_N.to(torch.int16))[np.arange(len(shift)) + shift], counts


def block_shifts(
    counts_E: Sequence[int], counts: Sequence[int], holders: HolderTable, num_unused: int
) -> npt.NDArray[np.int64]:
    """[S]: how far the pairs of each place are behind where they belong, once all are sorted by expert.

    They are one block then: the holders of an expert share its pairs in token order. What is left is to bring the
    blocks from the order of experts into that of places.
    """
    start = np.zeros(len(counts), dtype=np.int64)
    next_pair = num_unused
    for count, places in zip(counts_E, holders.places_E, strict=True):
        if count:
            for place in places.values():
                start[place] = next_pair
                next_pair += counts[place]
    result: npt.NDArray[np.int64] = start - np.cumsum([0, *counts[:-1]])
    return result


def fill(counts_E: list[int], holders: HolderTable, backlog_A: Sequence[float] | None, turn: int) -> list[int]:
    """-> pairs of each place. Experts without a choice come first, then the largest; each fills up its holders' levels
    as water would. An actor's level is its backlog and what this batch gave it so far, in pairs."""
    num_actors = len(holders.num_slots)
    away = max(AWAY * sum(counts_E) // num_actors, MIN_PART)
    backlog_A = [0.0] * num_actors if backlog_A is None else backlog_A
    level_A = [backlog + (0 if near else away) for backlog, near in zip(backlog_A, holders.near_A, strict=True)]
    # Of equal levels, the near ones first, from actor number `turn` on.
    rank_A = [(actor - turn) % num_actors + (0 if near else num_actors) for actor, near in enumerate(holders.near_A)]
    counts = [0] * sum(holders.num_slots)
    shared = []
    for expert, (count, places) in enumerate(zip(counts_E, holders.places_E, strict=True)):
        if count and len(places) == 1:
            ((actor, place),) = places.items()
            counts[place] = count
            level_A[actor] += count
        elif count:
            shared.append(expert)
    shared.sort(key=counts_E.__getitem__, reverse=True)
    largest = [expert for expert in shared[:NUM_REFILLED] if counts_E[expert] >= 2 * MIN_PART]
    for expert in shared + largest + largest:
        places = holders.places_E[expert]
        for actor, place in places.items():
            level_A[actor] -= counts[place]
            counts[place] = 0
        order = sorted([(level_A[actor], rank_A[actor], actor) for actor in places])
        parts = _parts(counts_E[expert], [level for level, _, _ in order])
        for (_, _, actor), part in zip(order, parts, strict=False):
            counts[places[actor]] = part
            level_A[actor] += part
    return counts


def _parts(count: int, levels: list[float]) -> list[int]:
    """Splits `count` over the first n of the ascending `levels` so that these become equal: (count + their sum) / n.
    n is as large as it can be with MIN_PART left for the n-th, which gets least."""
    total, n = count + levels[0], 1
    while n < len(levels) and total - n * levels[n] >= (n + 1) * MIN_PART:
        total, n = total + levels[n], n + 1
    if n == 1:
        return [count]
    parts = [int(total / n - level) for level in levels[1:n]]
    return [count - sum(parts), *parts]


def _share(actor: int, pair_P: Tensor, counts_E: list[int], num_tokens: int, top_k: int) -> Share:
    """In numpy: a few short calls, of which torch's take two to three times as long."""
    global_P = pair_P.numpy() // top_k
    needed_T = np.zeros(num_tokens, dtype=np.bool_)
    needed_T[global_P] = True
    (tokens_T,) = needed_T.nonzero()
    row_T = needed_T.cumsum(dtype=np.int32) - 1
    return Share(actor, torch.from_numpy(tokens_T), torch.from_numpy(row_T[global_P]), counts_E, pair_P)
