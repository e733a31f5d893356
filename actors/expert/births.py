"""Expert groups that a growth of the model makes: where they are made, and of what.

Every actor that holds a new group's source makes the group itself, between two steps; equal weights, moments and seeds
give equal bits, so that copies of a new group are copies from the start and nothing travels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.expert.holdings import Holdings
from actors.moe.growth import perturbed
from actors.trunk.draws import drawn_from
from actors.trunk.init import initial_experts
from actors.values import Growth, Placement

if TYPE_CHECKING:
    from actors.trunk.layout import Layout


@dataclass(frozen=True)
class Births:
    """New groups with their sources: the groups they are copies of, or for fresh ones, beside which they are made."""

    growth: Growth
    source_of: Mapping[int, int]

    def fields(self) -> dict[str, Any]:
        """Of the message that tells expert actors their part."""
        return {"growth": asdict(self.growth), "births": [list(pair) for pair in self.source_of.items()]}

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Births | None:
        if "births" not in fields:
            return None
        pairs = {int(group): int(source) for group, source in fields["births"]}
        return Births(Growth(**fields["growth"]), pairs)

    def placed(self, placement: Placement) -> Placement:
        """The next epoch, in which each new group is where its source is."""
        added = tuple(placement.holders[source] for _, source in sorted(self.source_of.items()))
        return replace(placement, epoch=placement.epoch + 1, holders=placement.holders + added)


def copies_in_turn(num_groups: int, num_new: int) -> dict[int, int]:
    """New group -> source, so that expert e is a copy of expert e modulo the old number."""
    return {num_groups + i: i % num_groups for i in range(num_new)}


def evenly_spread(placement: Placement, num_new: int) -> dict[int, int]:
    """New group -> source, so that actors hold as even a number of groups as the sources' holders allow."""
    load = Counter(actor for held in placement.holders for actor in held)
    used: Counter[int] = Counter()
    source_of = {}
    for group in range(placement.num_groups, placement.num_groups + num_new):
        source = min(
            range(placement.num_groups),
            key=lambda g: (max(load[actor] for actor in placement.holders[g]), used[g], g),
        )
        source_of[group] = source
        used[source] += 1
        load.update(placement.holders[source])
    return source_of


def give_birth(
    holdings: Holdings, fresh: Callable[[], Layout], group_size: int, births: Births, groups: Sequence[int]
) -> None:
    """Makes these new groups, to be held next. One that is here already, from a growth that failed, is made anew.

    `fresh`: what fresh ones are drawn by, asked for only then.
    """
    for group in groups:
        if group in holdings:
            holdings.free(group)
    holdings.make_room(len(groups))
    for group in groups:
        holdings.reserve(group, holdings.settings)
        for layer in range(len(holdings.stacks)):
            tensors, updates = holdings.read(births.source_of[group], layer)
            if births.growth.mode == "fresh":
                drawn = initial_experts(fresh(), layer, [group], group_size, births.growth.seed)
                made = _fresh(tensors, [drawn[name] for name in holdings.stacks[layer].names])
            else:
                with drawn_from(births.growth.seed, layer, group):
                    made = _copied(tensors, births.growth.perturbation)
            holdings.write(group, layer, made, updates)


def _copied(tensors: Sequence[Tensor], perturbation: float) -> list[Tensor]:
    """As `Holdings.read` gives them. The moments stay those of the source: its gradients are the best guess."""
    made = list(tensors)
    made[::3] = [perturbed(weight, perturbation, torch.default_generator) for weight in tensors[::3]]
    return made


def _fresh(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Zero moments that count as many updates as all others: AdamW's first step with them is (1 - beta1) /
    sqrt(1 - beta2) of the learning rate, 0.45 of it with the betas that are the default here."""
    made = [torch.zeros_like(tensor) for tensor in tensors]
    made[::3] = list(weights)
    return made
