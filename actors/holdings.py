"""What an expert actor holds: expert groups of every MoE layer, their gradients, their optimizers.

    layer 0   [ group 4 | group 9 | (free) ]      one stack of experts a layer, for grouped products
    layer 1   [ group 4 | group 9 | (free) ]

The stacks are made of places, one group each. A group's parameters are views of its place, and its optimizer is its
own: groups come and go without touching the others, and copies of a group on several actors, stepped with the same
gradients, stay equal bit for bit. Where the memory of the places is, on the device or behind it, is known to their
residency alone. Not thread-safe: the host's lock is around every call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actors.errors import InvalidInput
from actors.moe.cache import CacheSettings
from actors.moe.experts import ExpertStack
from actors.optim import OptimizerSettings, adamw, scale_gradients, set_lr, square_sum
from actors.residency import residency
from actors.snapshots import KINDS, ExpertKey, SavedState, Snapshot, to_host
from actors.trunk.model import Skeleton

LoadLayer = Callable[[int, Sequence[int]], Mapping[str, Tensor]]
"""(layer, groups) -> stacked parameters of these groups' experts, in that order."""


@dataclass
class _Group:
    parameters: list[dict[str, nn.Parameter]]
    """By layer."""
    optimizer: torch.optim.AdamW
    state: Literal["held", "arriving", "leaving"] = "held"
    """Only what is held is computed with. What leaves is kept until nobody can ask for it any more."""


class Holdings:
    def __init__(
        self,
        skeleton: Skeleton,
        group_size: int,
        device: torch.device,
        groups: Sequence[int],
        load: LoadLayer,
        cache: CacheSettings | None = None,
    ) -> None:
        self._group_size = group_size
        self.settings = OptimizerSettings()
        self._places: list[int | None] = list(groups)
        """Group at each place of the stacks."""
        self._residency = residency(skeleton, group_size, device, len(groups), lambda i: load(i, groups), cache)
        self._groups = {group: self._new_group(group) for group in groups}

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

    def num_bytes(self) -> int:
        """Of parameters, gradients and optimizer state."""
        states = [state for group in self._groups.values() for state in group.optimizer.state.values()]
        tensors: list[Tensor] = [t for state in states for t in state.values()]
        return self._residency.num_bytes() + sum(t.numel() * t.element_size() for t in tensors)

    def cache_counters(self) -> dict[str, Any]:
        """Of the expert cache; empty without one. From any thread."""
        return self._residency.counters()

    # -- gradients and updates ----------------------------------------------------------------------------------------

    def gradients(self, group: int, layer: int) -> list[Tensor]:
        """Of the group's parameters by name, as views: what is written there is what the update uses.

        Experts without a token have a gradient too: zero. Without one the optimizer would pass them over, and neither
        their moments nor their weights would decay as they do in one process.
        """
        place, parameters = self._places.index(group), self._groups[group].parameters[layer]
        for name in parameters:
            parameters[name].grad = self._residency.gradient(place, layer, name)
        return [grad for name in parameters if (grad := parameters[name].grad) is not None]

    def square_sum(self, groups: Iterable[int]) -> float:
        """Of all gradients of these groups, for the global norm."""
        total = 0.0
        for group in groups:
            for layer in range(len(self.stacks)):
                self.gradients(group, layer)
            total += square_sum(self._parameters(group))
        return total

    def update(self, lr: float, scale: float) -> None:
        """One optimizer step of every held group with its gradients times `scale`; then they are zero."""
        self._residency.settle()
        for group in self.groups:
            for layer in range(len(self.stacks)):
                self.gradients(group, layer)
            self._step(group, lr, scale)
        self._residency.changed(self._places.index(group) for group in self.groups)
        self.drop_gradients()

    def update_layer(self, group: int, layer: int, gradients: Sequence[Tensor], lr: float, scale: float) -> None:
        """One optimizer step of one layer of an arriving group, with the gradients its owner stepped with."""
        parameters = self._groups[group].parameters
        for parameter in self._parameters(group):
            parameter.grad = None
        for name, gradient in zip(self.stacks[layer].names, gradients, strict=True):
            parameters[layer][name].grad = gradient.to(parameters[layer][name].device, copy=True)
        self._step(group, lr, scale)
        for name in self.stacks[layer].names:
            parameters[layer][name].grad = None

    def _step(self, group: int, lr: float, scale: float) -> None:
        optimizer = self._groups[group].optimizer
        for layer, parameters in enumerate(self._groups[group].parameters):
            for name, parameter in parameters.items():
                if parameter.grad is not None and parameter not in optimizer.state:
                    self._new_state(group, layer, name, 0)
        scale_gradients(self._parameters(group), scale)
        set_lr(optimizer, lr)
        optimizer.step()

    def _new_state(self, group: int, layer: int, name: str, updates: int) -> tuple[Tensor, Tensor]:
        """AdamW's of one parameter, as AdamW makes it. -> both moments, zeros."""
        held = self._groups[group]
        parameter = held.parameters[layer][name]
        first, second = self._residency.moments(self._places.index(group), layer, name)
        # The fused step wants the count on the parameter's device.
        step = torch.tensor(float(updates), dtype=torch.float32, device=parameter.device)
        held.optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        return first, second

    def drop_gradients(self) -> None:
        self._residency.drop_gradients()

    def begin_run(self, settings: OptimizerSettings) -> None:
        """Fresh moments. `InvalidInput` while a group is on its way, since its moments are those of the run before."""
        if self.arriving:
            raise InvalidInput("a group is on its way here", field="group", value=self.arriving)
        self._residency.train()
        self.free_leaving()
        self.settings = settings
        self.drop_gradients()
        for group in self._groups.values():
            group.optimizer = self._new_optimizer(group.parameters)

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
        updates = 0
        held = self._groups[group]
        for name in self.stacks[layer].names:
            parameter = held.parameters[layer][name]
            state = held.optimizer.state.get(parameter)
            zeros = torch.zeros_like(parameter)
            tensors += [parameter, *((state["exp_avg"], state["exp_avg_sq"]) if state else (zeros, zeros))]
            updates = int(state["step"]) if state else 0
        return tensors, updates

    def reserve(self, group: int, settings: OptimizerSettings) -> None:
        """A place for a group that is about to arrive."""
        self.settings = settings
        if group in self._in_state("leaving"):
            self.free(group)
        self.make_room(1)
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

    def write(self, group: int, layer: int, tensors: Sequence[Tensor], updates: int) -> None:
        """Counterpart of `read`."""
        held, names = self._groups[group], self.stacks[layer].names
        wanted = [held.parameters[layer][name].shape for name in names for _ in range(3)]
        if [t.shape for t in tensors] != wanted:
            raise InvalidInput("other tensors than a group of this model has", field="tensors")
        self._residency.settle()
        with torch.no_grad():
            for number, name in enumerate(names):
                weight, *moments = tensors[3 * number : 3 * number + 3]
                held.parameters[layer][name].copy_(weight)
                if updates:
                    for mine, moment in zip(self._new_state(group, layer, name, updates), moments, strict=True):
                        mine.copy_(moment)
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
        return _Group(parameters, self._new_optimizer(parameters))

    def _new_optimizer(self, parameters: list[dict[str, nn.Parameter]]) -> torch.optim.AdamW:
        return adamw([(f"{i}.{n}", p) for i, layer in enumerate(parameters) for n, p in layer.items()], self.settings)

    def _rebind(self) -> None:
        """The stacks lie elsewhere now; parameters stay the same objects, as the optimizers know them."""
        for number, group in self._groups.items():
            place = self._places.index(number)
            for layer, parameters in enumerate(group.parameters):
                for name, parameter in parameters.items():
                    parameter.data = self._residency.weight(place, layer, name)
                    parameter.grad = None

    def _parameters(self, group: int) -> list[nn.Parameter]:
        return [p for layer in self._groups[group].parameters for p in layer.values()]


def _keys(layer: int, expert: int, names: Sequence[str]) -> list[ExpertKey]:
    """In the order of `Holdings.read`."""
    return [ExpertKey(layer, expert, name, kind) for name in names for kind in KINDS]
