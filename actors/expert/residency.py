"""Where the tensors of an expert actor's groups are, and what computes with them: all on the device, or at home behind
it with a cache on the device.

A place is room for one group in every layer. Who keeps groups in places (`Holdings`) does not see the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from actors.errors import InvalidInput
from actors.expert.homes import FileStore, Home, MemoryStore, Store
from actors.moe.cache import CacheSettings
from actors.moe.cached import CachedExperts
from actors.moe.device import experts_on
from actors.moe.experts import MAX_PAIRS, ExpertStack
from actors.moe.shelf import Loader
from actors.trunk.layout import Layer, Layout

Stacked = Callable[[int], Mapping[str, Tensor]]
"""Layer -> parameters of the experts of all places, [places * group_size, ...]."""


@dataclass(frozen=True)
class Quarters:
    """What an actor's experts are, and the room that there is for them, however many it has."""

    layout: Layout
    group_size: int
    device: torch.device
    cache: CacheSettings | None = None
    """None: all are on the device."""
    max_pairs: int = 0
    """Of a token and an expert, that are computed at a time; 0: what suits the device."""


class Residency(Protocol):
    @property
    def stacks(self) -> Sequence[ExpertStack]:
        """By layer: what computes."""

    def weight(self, place: int, layer: int, name: str) -> Tensor:
        """[group_size, ...], as a view. Before it is written: `settle`; after that: `changed`."""

    def gradient(self, place: int, layer: int, name: str) -> Tensor:
        """As a view, of what was accumulated since `drop_gradients`."""

    def moments(self, place: int, layer: int, name: str) -> tuple[Tensor, Tensor]:
        """Memory for AdamW's first and second moment, all zeros."""

    def drop_gradients(self) -> None: ...

    def take_gradients(self) -> list[dict[str, Tensor]]:
        """By layer, of all places: the caller's, while others are accumulated. `InvalidInput` where there is one
        memory for them."""

    def resize(self, num_places: int) -> None:
        """Room for more, also in the middle of a step. Views are others afterwards. After an error nothing changed."""

    def room_for(self, layer: int, num_places: int) -> list[Tensor]:
        """Of one layer, to make `resize` shorter by `widen`; may be empty. From any thread."""

    def widen(self, layer: int, num_places: int, room: Sequence[Tensor]) -> None:
        """One layer has the room that `resize` will make. Its views are others afterwards."""

    def keep(self, places: Sequence[int]) -> None:
        """Gives up all other places, between two steps. Views are others afterwards."""

    def clear(self, place: int) -> None:
        """What is there will not be used again; its gradients are zero."""

    def train(self) -> None:
        """Room for gradients and moments, where that is not taken for granted. `CacheFull` if there is none."""

    def settle(self) -> None:
        """Nobody reads the weights until the next forward or `changed`."""

    def changed(self, places: Iterable[int]) -> None:
        """Their weights were written."""

    def num_bytes(self) -> int:
        """Of weights and gradients."""

    def counters(self) -> dict[str, Any]:
        """Of the cache; empty without one. From any thread."""

    def close(self) -> None:
        """Nothing is computed any more; what is not referred to elsewhere is given back at once."""


def residency(quarters: Quarters, num_places: int, load: Stacked) -> Residency:
    if quarters.cache is None:
        return OnDevice(quarters, num_places, load)
    return Cached(quarters, quarters.cache, num_places, load)


class OnDevice:
    """One stack of weights a layer, for grouped products over all experts."""

    def __init__(self, quarters: Quarters, num_places: int, load: Stacked) -> None:
        self._size = quarters.group_size
        layout, device = quarters.layout, quarters.device

        def stack(number: int, layer: Layer) -> ExpertStack:
            tensors = (
                {name: tensor.to(device) for name, tensor in load(number).items()}
                if num_places
                else _no_experts(layer.shapes(), layout.dtype, device)
            )
            num_layers, max_pairs = len(layout.layers), quarters.max_pairs
            return experts_on(device, layer.template, tensors, num_layers=num_layers, max_pairs=max_pairs)

        layers: Sequence[Layer] = layout.layers
        self.stacks = [stack(number, layer) for number, layer in enumerate(layers)]

    def weight(self, place: int, layer: int, name: str) -> Tensor:
        return self.stacks[layer].weight(name)[self._span(place)]

    def gradient(self, place: int, layer: int, name: str) -> Tensor:
        return self.stacks[layer].gradient(name)[self._span(place)]

    def moments(self, place: int, layer: int, name: str) -> tuple[Tensor, Tensor]:
        weight = self.weight(place, layer, name)
        return torch.zeros_like(weight), torch.zeros_like(weight)

    def drop_gradients(self) -> None:
        for stack in self.stacks:
            stack.zero_gradients()

    def take_gradients(self) -> list[dict[str, Tensor]]:
        return [stack.take_gradients() for stack in self.stacks]

    def resize(self, num_places: int) -> None:
        for stack in self.stacks:
            stack.resize(num_places * self._size)

    def room_for(self, layer: int, num_places: int) -> list[Tensor]:
        return self.stacks[layer].room_for(num_places * self._size)

    def widen(self, layer: int, num_places: int, room: Sequence[Tensor]) -> None:
        self.stacks[layer].resize(num_places * self._size, room)

    def keep(self, places: Sequence[int]) -> None:
        for stack in self.stacks:
            stack.keep([place * self._size + i for place in places for i in range(self._size)])

    def clear(self, place: int) -> None:
        for parameter in (p for stack in self.stacks for p in stack.parameters()):
            if parameter.grad is not None:
                parameter.grad[self._span(place)] = 0

    def train(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def changed(self, places: Iterable[int]) -> None:
        pass

    def num_bytes(self) -> int:
        tensors = [t for stack in self.stacks for p in stack.parameters() for t in (p, p.grad) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def counters(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

    def _span(self, place: int) -> slice:
        return slice(place * self._size, (place + 1) * self._size)


class Cached:
    """All tensors at home, `cache.size` groups of each layer on the device. Updates are made at home, on the host's CPU
    beside the moments (as ZeRO-Offload, Ren et al. 2021), and what the device has is brought up to date after them."""

    def __init__(self, quarters: Quarters, cache: CacheSettings, num_places: int, load: Stacked) -> None:
        layout, device = quarters.layout, quarters.device
        self._layout, self._size = layout, quarters.group_size
        self._store: Store = FileStore(cache.directory) if cache.directory else MemoryStore(device)
        self._homes: list[Home] = []
        self.resize(num_places)
        for layer in range(len(layout.layers)) if num_places else ():
            for name, stacked in load(layer).items():
                for home, tensor in zip(self._homes, stacked.split(self._size), strict=True):
                    home.weights[layer][name].copy_(tensor)
        self._loader = Loader(device)
        layers: Sequence[Layer] = layout.layers
        self.stacks = [
            CachedExperts(
                layer.template,
                i,
                layer.shapes(),
                self._homes,
                group_size=self._size,
                capacity=cache.size,
                loader=self._loader,
                max_pairs=quarters.max_pairs or MAX_PAIRS,
            )
            for i, layer in enumerate(layers)
        ]
        # After the last layer comes the first one of the next pass.
        for stack, following in zip(self.stacks, [*self.stacks[1:], *self.stacks[:1]], strict=True):
            stack.after_forward = following.anticipate

    def weight(self, place: int, layer: int, name: str) -> Tensor:
        return self._homes[place].weights[layer][name]

    def gradient(self, place: int, layer: int, name: str) -> Tensor:
        return self._homes[place].training(layer)[name].gradient

    def moments(self, place: int, layer: int, name: str) -> tuple[Tensor, Tensor]:
        found = self._homes[place].training(layer)[name]
        return found.first.zero_(), found.second.zero_()

    def drop_gradients(self) -> None:
        for home in self._homes:
            home.zero_gradients()

    def take_gradients(self) -> list[dict[str, Tensor]]:
        raise beside_a_cache()

    def resize(self, num_places: int) -> None:
        shapes = [
            {name: (self._size, *shape) for name, shape in sorted(layer.shapes().items())}
            for layer in self._layout.layers
        ]
        here = len(self._homes)
        self._homes += [
            Home(self._store, shapes, self._layout.dtype, f"expert group {place + 1} of {num_places} here")
            for place in range(here, num_places)
        ]

    def room_for(self, layer: int, num_places: int) -> list[Tensor]:
        return []

    def widen(self, layer: int, num_places: int, room: Sequence[Tensor]) -> None:
        """Homes lie apart, and are made without a copy of the others."""

    def keep(self, places: Sequence[int]) -> None:
        for place in set(range(len(self._homes))) - set(places):
            self.clear(place)
        self._homes[:] = [self._homes[place] for place in places]

    def clear(self, place: int) -> None:
        self.settle()
        self._homes[place].zero_gradients()
        for stack in self.stacks:
            stack.drop(self._homes[place])

    def train(self) -> None:
        for home in self._homes:
            home.train()

    def settle(self) -> None:
        self._loader.settle()

    def changed(self, places: Iterable[int]) -> None:
        homes = [self._homes[place] for place in places]
        for stack in self.stacks:
            stack.reload(homes)

    def num_bytes(self) -> int:
        return sum(home.num_bytes() for home in self._homes)

    def counters(self) -> dict[str, Any]:
        return self._loader.counters.to_dict()

    def close(self) -> None:
        self._loader.close()
        for stack in self.stacks:
            stack.close()
        self._homes.clear()


def beside_a_cache() -> InvalidInput:
    """Homes are written in place, and have room for the gradients of one step."""
    return InvalidInput(
        "updates beside forwards need all expert groups on the device, and experts.expert_cache_size is set",
        field="optimizer.staleness",
        remedy="set optimizer.staleness to 0, or experts.expert_cache_size to 0",
    )


def _no_experts(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.zeros(0, *shape, dtype=dtype, device=device) for name, shape in shapes.items()}
