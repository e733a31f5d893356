"""How a family draws the weights of fresh experts, as plain data.

transformers has it as code, `_init_weights`, which for most families fills each parameter from one distribution.
Whoever has the model on the meta device writes down what that code does there, and an expert actor does the same
without importing transformers, which takes longer than all else it does to start.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from actors.errors import InvalidInput

if TYPE_CHECKING:
    from actors.trunk.model import Skeleton

FILLS = frozenset(("normal_", "uniform_", "zero_", "fill_"))
"""Methods of a tensor that overwrite all of it, given nothing but numbers."""


@dataclass(frozen=True)
class Draw:
    """One parameter is filled."""

    parameter: str
    fill: str
    """A name in `FILLS`."""
    numbers: tuple[float, ...]
    """Its arguments."""

    def __post_init__(self) -> None:
        """It comes from another process, and says what is called here."""
        if self.fill not in FILLS:
            raise InvalidInput("fills no tensor", field="draws.fill", value=self.fill)


_drawing = threading.RLock()


@contextmanager
def drawn_from(*seed: int) -> Iterator[None]:
    """torch's global generator seeded by a tuple inside, as it was before outside. One thread at a time: it is the
    process's only one."""
    mixed = 0
    for part in seed:
        mixed = (mixed * 1_000_003 + part + 1) % (1 << 62)
    with _drawing, torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed)
        yield


def draws_of(skeleton: Skeleton) -> list[tuple[Draw, ...] | None]:
    """What `_init_weights` does to fresh experts of each layer, in order. None where it is something without a name
    here, or depends on how many experts are drawn at once: then it takes the family's own code."""
    tried: dict[tuple[Draw, ...], bool] = {}
    found: list[tuple[Draw, ...] | None] = []
    for layer in range(len(skeleton.layers)):
        draws, of_three = (_watched(skeleton, layer, num_experts) for num_experts in (1, 3))
        if draws is not None and draws not in tried:
            tried[draws] = _are_the_bits(draws, skeleton, layer)
        found.append(draws if draws is not None and draws == of_three and tried[draws] else None)
    return found


def replay(draws: Sequence[Draw], parameters: Mapping[str, Tensor]) -> None:
    """In place, from torch's global generator: the bits that the family's code would give."""
    for draw in draws:
        getattr(parameters[draw.parameter], draw.fill)(*draw.numbers)


def let_family_draw(skeleton: Skeleton, layer: int, parameters: Mapping[str, Tensor]) -> None:
    """As `replay`, by `_init_weights` itself. `parameters` [experts, ...] of one layer."""
    module: Any = copy.copy(skeleton.layers[layer].template)
    module._parameters = dict(parameters)
    module.num_experts = len(next(iter(parameters.values())))
    skeleton.model._init_weights(module)


def blank_experts(
    shapes: Mapping[str, tuple[int, ...]], num_experts: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """Parameters [num_experts, ...] of one layer, to be drawn. `shapes`: of one expert's parts, by name."""
    return {
        name: nn.Parameter(torch.zeros(num_experts, *shape, dtype=dtype, device=device))
        for name, shape in shapes.items()
    }


def _watched(skeleton: Skeleton, layer: int, num_experts: int) -> tuple[Draw, ...] | None:
    parameters = blank_experts(skeleton.layers[layer].shapes(), num_experts, skeleton.dtype, "meta")
    with torch.no_grad(), _Watch(parameters) as watch:
        let_family_draw(skeleton, layer, parameters)
    return None if watch.is_lost else tuple(watch.seen)


@torch.no_grad()
def _are_the_bits(draws: Sequence[Draw], skeleton: Skeleton, layer: int) -> bool:
    """Found by trying it on one expert: some of torch's initialisations do nothing on the meta device."""
    ours, theirs = (blank_experts(skeleton.layers[layer].shapes(), 1, skeleton.dtype) for _ in range(2))
    with drawn_from(0):
        replay(draws, ours)
    with drawn_from(0):
        let_family_draw(skeleton, layer, theirs)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


class _Watch(TorchDispatchMode):
    """Writes down what is done to these tensors inside."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self.seen: list[Draw] = []
        self.is_lost = False
        """Something else was done than to fill one of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor, *numbers = args or (None,)
        fill = func.overloadpacket.__name__
        name = self._names.get(id(tensor))
        given = {key for key, value in (kwargs or {}).items() if value is not None}
        if name is None or fill not in FILLS or given or not all(isinstance(n, int | float) for n in numbers):
            self.is_lost = True
        else:
            self.seen.append(Draw(name, fill, tuple(numbers)))
        return func(*args, **(kwargs or {}))
