"""From the gate's choices to what each expert actor is sent, and back.

Each token goes once to every actor that owns at least one of its experts; only the pairs an actor owns go along,
already sorted by its local experts, so that the actor does no sorting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OwnerTable:
    """Where each of the E experts of a layer lives: index of its actor, and its place among that actor's experts."""

    actor_E: Tensor
    slot_E: Tensor
    num_slots: tuple[int, ...]
    """Experts each actor owns."""

    @staticmethod
    def of(owned: list[list[int]]) -> OwnerTable:
        """`owned[a]` lists the experts of actor a, in its local order."""
        num_experts = sum(len(experts) for experts in owned)
        actor_E = torch.full((num_experts,), -1)
        slot_E = torch.full((num_experts,), -1)
        for actor, experts in enumerate(owned):
            actor_E[experts] = actor
            slot_E[experts] = torch.arange(len(experts))
        assert int(actor_E.min()) >= 0, "an expert without an owner, or with two"
        return OwnerTable(actor_E, slot_E, tuple(len(experts) for experts in owned))


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


def plan(topk_ids_TK: Tensor, owners: OwnerTable) -> list[Share]:
    """Shares of the actors that are needed; actors without a pair are left out. Every pair is in exactly one share,
    but for unused places (expert -1), which are in none."""
    num_tokens, top_k = topk_ids_TK.shape
    first_slot_A = torch.tensor((0, *owners.num_slots[:-1])).cumsum(0)
    place_E = first_slot_A[owners.actor_E] + owners.slot_E
    # Expert -1 takes the last entry: a place behind every actor's.
    place_E = torch.cat((place_E, torch.tensor([sum(owners.num_slots)])))
    place_N = place_E[topk_ids_TK.reshape(-1)]
    order_N = torch.argsort(place_N, stable=True)
    counts = torch.bincount(place_N, minlength=sum(owners.num_slots)).tolist()
    shares: list[Share] = []
    first_pair = first_slot = 0
    for actor, slots in enumerate(owners.num_slots):
        counts_E = counts[first_slot : first_slot + slots]
        num_pairs = sum(counts_E)
        if num_pairs:
            pair_P = order_N[first_pair : first_pair + num_pairs]
            shares.append(_share(actor, pair_P, counts_E, num_tokens, top_k))
        first_pair += num_pairs
        first_slot += slots
    return shares


def _share(actor: int, pair_P: Tensor, counts_E: list[int], num_tokens: int, top_k: int) -> Share:
    global_P = pair_P.div(top_k, rounding_mode="floor")
    needed_T = torch.zeros(num_tokens, dtype=torch.bool)
    needed_T[global_P] = True
    tokens_T = needed_T.nonzero().squeeze(1)
    row_T = needed_T.cumsum(0, dtype=torch.int32) - 1
    return Share(actor, tokens_T, row_T.index_select(0, global_P), counts_E, pair_P)
