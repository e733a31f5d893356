"""What an expert actor holds: expert groups of every MoE layer, their gradients, their optimizers.

    layer 0   [ group 4 | group 9 | (free) ]      one stack of experts a layer, for grouped products
    layer 1   [ group 4 | group 9 | (free) ]

The stacks are made of places, one group each. A group's parameters are views of its place, and its optimizer is its
own: groups come and go without touching the others, and copies of a group on several actors, stepped with the same
gradients, stay equal bit for bit. Where the memory of the places is, on the device or behind it, is known to their
residency alone. Not thread-safe: the host's lock is around every call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actors.errors import InvalidInput
from actors.expert.residency import Quarters, residency
from actors.moe.experts import Between, ExpertStack, Weights, pieces_of
from actors.moe.optimizer import GroupOptimizer, catch_up_together, step_together
from actors.optim import OptimizerSettings, square_sum_of
from actors.snapshots import KINDS, ExpertKey, SavedState, Snapshot, to_host

LoadLayer = Callable[[int, Sequence[int]], Mapping[str, Tensor]]
"""(layer, groups) -> stacked parameters of these groups' experts, in that order."""


@dataclass(frozen=True)
class LayerStep:
    """One optimizer step of one layer of a group."""

    gradients: Sequence[Tensor]
    """By name. They are scaled in place."""
    lr: float
    scale: float
    merged: int = 1
    """Committed updates that it stands for."""
    then: Weights | None = None
    """Of the layer, that the gradients were computed with: for the delay correction."""


@dataclass(frozen=True)
class TakenGradients:
    """Of one layer."""

    groups: Mapping[int, list[Tensor]]
    """Of each held group by name, as views."""
    stacked: dict[str, Tensor]
    """Of all places."""


@dataclass
class _Group:
    parameters: list[dict[str, nn.Parameter]]
    """By layer."""
    optimizer: GroupOptimizer
    state: Literal["held", "arriving", "leaving"] = "held"
    """Only what is held is computed with. What leaves is kept until nobody can ask for it any more."""


class Holdings:
    def __init__(
        self,
        quarters: Quarters,
        groups: Sequence[int],
        load: LoadLayer,
        is_own: Callable[[int], bool] = lambda group: True,
    ) -> None:
        """`is_own`: whether nobody else has to update the group alike."""
        self._group_size = quarters.group_size
        self._is_own = is_own
        self.settings = OptimizerSettings()
        self._places: list[int | None] = list(groups)
        """Group at each place of the stacks."""
        self._residency = residency(quarters, len(groups), lambda i: load(i, groups))
        self._groups = {group: self._new_group(group) for group in groups}
        self._shared: set[int] = set()
        """Layers whose weights somebody else keeps: they are not written to, but copied first."""

    @property
    def stacks(self) -> Sequence[ExpertStack]:
        """What computes, by layer."""
        return self._residency.stacks

    def close(self) -> None:
        """Nothing is held any more."""
        self._residency.close()
        self._places, self._groups = [], {}

    # -- what is here -------------------------------------------------------------------------------------------------

    def __contains__(self, group: int) -> bool:
        """Also one that is on its way, or leaves."""
        return group in self._groups

    @property
    def groups(self) -> tuple[int, ...]:
        """That are computed with, in the order of their places."""
        return self._in_state("held")

    @property
    def arriving(self) -> tuple[int, ...]:
        return self._in_state("arriving")

    @property
    def leaving(self) -> tuple[int, ...]:
        return self._in_state("leaving")

    @property
    def experts(self) -> list[int]:
        """Numbers of the experts of `groups`, in that order: the local order of every message."""
        return self.experts_of(self.groups)

    def experts_of(self, groups: Iterable[int]) -> list[int]:
        return [g * self._group_size + i for g in groups for i in range(self._group_size)]

    def by_place(self, counts_E: Sequence[int]) -> list[int]:
        """Counts of `experts` -> counts of every expert place of the stacks."""
        size = self._group_size
        counts, rest = [0] * (size * len(self._places)), iter(counts_E)
        for place, group in enumerate(self._places):
            if group is not None and self._groups[group].state == "held":
                counts[place * size : (place + 1) * size] = [next(rest) for _ in range(size)]
        return counts

    def rows(self) -> dict[int, int]:
        """Expert -> its row in the stacks."""
        ordinals = self.by_place(range(1, len(self.experts) + 1))
        return {self.experts[n - 1]: row for row, n in enumerate(ordinals) if n}

    def share(self) -> list[Weights]:
        """By layer, the weights of all places as they are now, the caller's to keep: what is written from now on is
        written elsewhere, layer by layer, when it comes to that. Not with an expert cache."""
        for layer in range(len(self.stacks)):
            self._catch_up(layer, dict.fromkeys(self._groups))
        self._shared = set(range(len(self.stacks)))
        return [stack.weights for stack in self.stacks]

    def share_no_more(self, *, none: bool) -> None:
        """Somebody gave up what `share` gave: its memory goes. `none`: nobody keeps anything now."""
        if none:
            self._shared.clear()
        for stack in self.stacks:
            stack.drop_spares()

    def _own(self, layer: int) -> None:
        """Before weights are written in place."""
        if layer in self._shared:
            self._shared.discard(layer)
            self.stacks[layer].switch(self.stacks[layer].fresh())
            self._rebind()

    def num_bytes(self) -> int:
        """Of parameters, gradients and optimizer state."""
        return self._residency.num_bytes() + sum(group.optimizer.num_bytes() for group in self._groups.values())

    def cache_counters(self) -> dict[str, Any]:
        """Of the expert cache; empty without one. From any thread."""
        return self._residency.counters()

    # -- gradients and updates ----------------------------------------------------------------------------------------

    def gradients(self, group: int, layer: int) -> list[Tensor]:
        """Of the group's parameters by name, as views: what is written there is what the update uses.

        Experts without a token have a gradient too: zero. What an update does with those is the job's choice.
        """
        span = self._span(group)
        self.stacks[layer].touched.update(range(span.start, span.stop))  # the caller may write there
        return self._gradients(group, layer)

    def _gradients(self, group: int, layer: int) -> list[Tensor]:
        place = self._places.index(group)
        return [self._residency.gradient(place, layer, name) for name in self.stacks[layer].names]

    def square_sum(self, groups: Iterable[int]) -> float:
        """Of all gradients of these groups, for the global norm."""
        return square_sum_of(
            gradient for group in groups for layer in range(len(self.stacks)) for gradient in self._parts(group, layer)
        )

    def _parts(self, group: int, layer: int) -> list[Tensor]:
        """Gradients, or those parts of them that may be other than zero."""
        candidates, gradients = self._candidates(group, layer), self._gradients(group, layer)
        if candidates is None:
            return gradients
        return [gradient[expert] for gradient in gradients for expert in candidates]

    def update(self, lr: float, scale: float) -> None:
        """One optimizer step of every held group with its gradients times `scale`; then they are zero."""
        self._residency.settle()
        for layer in range(len(self.stacks)):
            self._own(layer)
        groups, changed = self.groups, set[int]()
        for layer in range(len(self.stacks)):
            if self.settings.sparse == "none":  # group by group a gradient is still in the cache when it is used
                are_changed = [self._step([group], layer, lr, scale)[0] for group in groups]
            else:
                are_changed = self._step(groups, layer, lr, scale)
            changed |= {
                self._places.index(group) for group, is_changed in zip(groups, are_changed, strict=True) if is_changed
            }
        self._residency.changed(changed)
        self._drop_used()

    def update_layer(self, group: int, layer: int, gradients: Sequence[Tensor], lr: float, scale: float) -> None:
        """One optimizer step of one layer of an arriving group, with the gradients its owner stepped with."""
        self._own(layer)
        held = self._groups[group]
        parameters = held.parameters[layer].items()
        own = {name: g.to(p.device, copy=True) for g, (name, p) in zip(gradients, parameters, strict=True)}
        held.optimizer.step(layer, own, lr, scale)

    def _step(self, groups: Sequence[int], layer: int, lr: float, scale: float) -> list[bool]:
        """-> whether weights of each were changed."""
        names = self.stacks[layer].names
        wanted = [
            (
                self._groups[group].optimizer,
                dict(zip(names, self._gradients(group, layer), strict=True)),
                self._candidates(group, layer),
            )
            for group in groups
        ]
        return step_together(wanted, layer, lr, scale)

    def _candidates(self, group: int, layer: int) -> list[int] | None:
        """Experts of the group that may have a gradient; None: no matter."""
        if self.settings.sparse == "none":
            return None
        span, touched = self._span(group), self.stacks[layer].touched
        return [i - span.start for i in range(span.start, span.stop) if i in touched]

    def _drop_used(self) -> None:
        """All gradients are zero then, and those that were are not written."""
        if self.settings.sparse == "none":
            self.drop_gradients()
            return
        used: list[Tensor] = []
        for layer, stack in enumerate(self.stacks):
            for place, rows in itertools.groupby(sorted(stack.touched), lambda i: i // self._group_size):
                gradients = [self._residency.gradient(place, layer, name) for name in stack.names]
                used += [gradient[i % self._group_size] for i in rows for gradient in gradients]
            stack.touched.clear()
        if used:
            torch._foreach_zero_(used)

    def catch_up(self, layer: int, counts_E: Sequence[int]) -> None:
        """Before tokens are sent to `experts`, so many to each: makes the steps that were put off for want of them."""
        if self.settings.sparse != "exact":
            return
        size = self._group_size
        wanted = {
            group: [e for e, n in enumerate(counts_E[i * size : (i + 1) * size]) if n]
            for i, group in enumerate(self.groups)
        }
        self._catch_up(layer, wanted)

    def _catch_up(self, layer: int, wanted: Mapping[int, Sequence[int] | None]) -> None:
        """These experts of each group; None: all."""
        optimizers = {group: self._groups[group].optimizer for group in wanted}
        behind = [group for group, experts in wanted.items() if optimizers[group].is_behind(layer, experts)]
        if behind:
            self._residency.settle()
            self._own(layer)
            catch_up_together([(optimizers[group], wanted[group]) for group in behind], layer)
            self._residency.changed([self._places.index(group) for group in behind])

    def take_gradients(self) -> list[TakenGradients]:
        """By layer, of each held group: the caller's until `give_back`. What comes from now on is accumulated
        elsewhere.

        `InvalidInput` with an expert cache, which has one memory for them.
        """
        taken = self._residency.take_gradients()
        for stack in self.stacks:
            stack.touched.clear()
        spans = {group: self._span(group) for group in self.groups}
        return [
            TakenGradients(
                {group: [stacked[name][span] for name in stack.names] for group, span in spans.items()}, stacked
            )
            for stack, stacked in zip(self.stacks, taken, strict=True)
        ]

    def give_back(self, layer: int, taken: TakenGradients, between: Between | None = None) -> None:
        """They have been used. From any thread."""
        for gradient in taken.stacked.values():
            for (part,) in pieces_of((gradient,), between):
                part.zero_()
        self.stacks[layer].give_back(taken.stacked)

    def updated(self, layer: int, steps: Mapping[int, Sequence[LayerStep]], between: Between | None = None) -> Weights:
        """Copy-on-write: the layer's weights after these steps of each group, one after the other, in new tensors.

        Forwards and backwards may go on beside it, in other threads, with the weights of before: until the caller lets
        the stack `switch`, which has to be next. Nothing else may touch the layer's weights and moments meanwhile.
        `between` is called between pieces of the work.
        """
        stack = self.stacks[layer]
        self._shared.discard(layer)
        old, fresh = stack.weights, stack.room()
        for group, held in self._groups.items():  # also those that arrive or leave
            for name, parameter in held.parameters[layer].items():
                parameter.data = fresh[name][self._span(group)]
        stepped = {self._places.index(group) for group, ordered in steps.items() if ordered}
        for place in set(range(len(self._places))) - stepped:
            span = slice(place * self._group_size, (place + 1) * self._group_size)
            for name in stack.names:
                fresh[name][span].copy_(old[name][span])
        for group, ordered in steps.items():
            span = self._span(group)
            source: Weights | None = {name: old[name][span] for name in stack.names}
            for step in ordered:
                then = None if step.then is None else {name: step.then[name][span] for name in stack.names}
                gradients = dict(zip(stack.names, step.gradients, strict=True))
                self._groups[group].optimizer.step(
                    layer,
                    gradients,
                    step.lr,
                    step.scale,
                    num_updates=step.merged,
                    then=then,
                    source=source,
                    between=between,
                )
                source = None
        return fresh

    def _span(self, group: int) -> slice:
        place = self._places.index(group)
        return slice(place * self._group_size, (place + 1) * self._group_size)

    def drop_gradients(self) -> None:
        self._residency.drop_gradients()
        for stack in self.stacks:
            stack.touched.clear()

    def begin_run(self, settings: OptimizerSettings) -> None:
        """Fresh moments. `InvalidInput` while a group is on its way, since its moments are those of the run before."""
        if self.arriving:
            raise InvalidInput("a group is on its way here", field="group", value=self.arriving)
        self._residency.train()
        self.free_leaving()
        for layer in range(len(self.stacks)):
            self._catch_up(layer, dict.fromkeys(self._groups))
        self.settings = settings
        self.drop_gradients()
        for stack in self.stacks:
            stack.drop_spares()
        for number, group in self._groups.items():
            group.optimizer = self._new_optimizer(number, group.parameters)

    # -- groups come and go -------------------------------------------------------------------------------------------

    def read(self, group: int, layer: int) -> tuple[tuple[Tensor, ...], int]:
        """Copies of weight, first and second moment of each parameter by name; number of updates so far."""
        tensors, updates = self._tensors(group, layer)
        return tuple(tensor.detach().clone() for tensor in tensors), updates

    def snapshot(self, groups: Iterable[int], version: int, run: int) -> Snapshot[ExpertKey]:
        """Of these groups, in host memory."""
        tensors: dict[ExpertKey, Tensor] = {}
        counts = set()
        for layer, stack in enumerate(self.stacks):
            for group in groups:
                stacked, updates = self._tensors(group, layer)
                counts.add(updates)
                copies = [to_host(tensor) for tensor in stacked]
                for i, expert in enumerate(self.experts_of([group])):
                    keys = _keys(layer, expert, stack.names)
                    tensors |= {key: copy[i] for key, copy in zip(keys, copies, strict=True)}
        assert len(counts) <= 1, "all groups take part in every step of a run"
        return Snapshot(version, run, max(counts, default=0), self.settings, tensors)

    def load(self, saved: SavedState[ExpertKey]) -> None:
        """Counterpart of `snapshot`, for all that is held here: weights and moments become those."""
        self.begin_run(saved.optimizer)
        for layer, stack in enumerate(self.stacks):
            for group in self.groups:
                keys = [key for expert in self.experts_of([group]) for key in _keys(layer, expert, stack.names)]
                found = saved.read(keys)
                width = 3 * len(stack.names)
                # [expert][parameter and kind] -> one stack of the group's experts for each parameter and kind
                stacked = [torch.stack(list(found[i::width])) for i in range(width)]
                self.write(group, layer, stacked, saved.updates)

    def _tensors(self, group: int, layer: int) -> tuple[list[Tensor], int]:
        tensors: list[Tensor] = []
        self._catch_up(layer, {group: None})
        held = self._groups[group]
        for name, parameter in held.parameters[layer].items():
            zeros = torch.zeros_like(parameter)
            tensors += [parameter, *(held.optimizer.moments(layer, name) or (zeros, zeros))]
        return tensors, held.optimizer.updates(layer)

    def reserve(self, group: int, settings: OptimizerSettings, coming: int = 1) -> None:
        """A place for a group that is about to arrive, the first of so many."""
        self.settings = settings
        if group in self._in_state("leaving"):
            self.free(group)
        self.make_room(coming)
        self._residency.train()
        self._places[self._places.index(None)] = group
        self._groups[group] = self._new_group(group)
        self._groups[group].state = "arriving"

    def make_room(self, count: int) -> None:
        """Free places for as many groups, made in one go: the stacks are copied for it."""
        missing = count - self._places.count(None)
        if missing > 0:
            self._residency.resize(len(self._places) + missing)  # first: it may find no room
            self._places += [None] * missing
            self._rebind()

    def places_with(self, count: int) -> int:
        """Places that there will be with as many free ones."""
        return len(self._places) + max(0, count - self._places.count(None))

    def room_for(self, layer: int, num_places: int) -> list[Tensor]:
        """For `widen`. From any thread, as long as no other makes room."""
        return self._residency.room_for(layer, num_places)

    def widen(self, layer: int, num_places: int, room: Sequence[Tensor]) -> None:
        """One layer is ready for so many places: `make_room` then finds little left to do."""
        self._residency.widen(layer, num_places, room)
        self._rebind_layer(layer)

    def write(self, group: int, layer: int, tensors: Sequence[Tensor], updates: int) -> None:
        """Counterpart of `read`."""
        held, names = self._groups[group], self.stacks[layer].names
        wanted = [held.parameters[layer][name].shape for name in names for _ in range(3)]
        if [t.shape for t in tensors] != wanted:
            raise InvalidInput("other tensors than a group of this model has", field="tensors")
        self._residency.settle()
        self._own(layer)
        with torch.no_grad():
            for name, weight in zip(names, tensors[::3], strict=True):
                held.parameters[layer][name].copy_(weight)
        moments = {name: tensors[3 * i + 1 : 3 * i + 3] for i, name in enumerate(names)}
        held.optimizer.set(layer, moments, updates)
        self._residency.changed([self._places.index(group)])

    def hold(self, groups: Collection[int]) -> None:
        """From now on exactly these are computed with. `InvalidInput` if one is not here."""
        if unknown := set(groups) - set(self._groups):
            raise InvalidInput("is not here", field="group", value=min(unknown))
        for number, group in self._groups.items():
            if number in groups:
                group.state = "held"
            elif group.state == "held":
                group.state = "leaving"

    def free_leaving(self) -> None:
        for group in self._in_state("leaving"):
            self.free(group)

    def free(self, group: int) -> None:
        """Its place may be taken by another."""
        place = self._places.index(group)
        self._residency.clear(place)
        self._places[place] = None
        del self._groups[group]

    def trim(self) -> None:
        """Gives back the memory of free places, but for one: groups often leave in exchange for others."""
        free = [place for place, group in enumerate(self._places) if group is None]
        if len(free) < 2 or len(free) == len(self._places):
            return
        kept = [place for place in range(len(self._places)) if place not in free[1:]]
        self._places = [self._places[place] for place in kept]
        self._residency.keep(kept)
        self._rebind()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _in_state(self, state: str) -> tuple[int, ...]:
        return tuple(g for g in self._places if g is not None and self._groups[g].state == state)

    def _new_group(self, group: int) -> _Group:
        place, weight = self._places.index(group), self._residency.weight
        parameters = [
            {name: nn.Parameter(weight(place, layer, name)) for name in stack.names}
            for layer, stack in enumerate(self.stacks)
        ]
        return _Group(parameters, self._new_optimizer(group, parameters))

    def _new_optimizer(self, group: int, parameters: list[dict[str, nn.Parameter]]) -> GroupOptimizer:
        def new_moments(layer: int, name: str) -> tuple[Tensor, Tensor]:
            return self._residency.moments(self._places.index(group), layer, name)

        return GroupOptimizer(self.settings, parameters, new_moments, lambda: self._is_own(group))

    def _rebind(self) -> None:
        """The stacks lie elsewhere now; parameters stay the same objects, as the optimizers know them."""
        for layer in range(len(self.stacks)):
            self._rebind_layer(layer)

    def _rebind_layer(self, layer: int) -> None:
        for number, group in self._groups.items():
            place = self._places.index(number)
            for name, parameter in group.parameters[layer].items():
                parameter.data = self._residency.weight(place, layer, name)


def _keys(layer: int, expert: int, names: Sequence[str]) -> list[ExpertKey]:
    """In the order of `Holdings.read`."""
    return [ExpertKey(layer, expert, name, kind) for name in names for kind in KINDS]
