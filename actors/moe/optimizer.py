"""How the parameters of one expert group are updated: AdamW or Muon, all experts or only those with a gradient.

`sparse` of the job says what becomes of an expert whose gradient is zero in a step, since no token came to it:
`none`: it is stepped like the others. `exact`: its steps are put off until its state is wanted, and then made as few
that do the same (`actors.moe.missed`): weights differ from those of `none` by their last digits. Where other actors
make the same updates they are the very steps of `none`, one after the other in pieces that stay in the processor's
cache, so that copies stay equal to the bit, whenever each of them makes the steps. `skip`: weights and moments are left
alone, and AdamW's correction of the moments counts the steps of the run, as `torch.optim.SparseAdam` does.

Not thread-safe.

    E experts of the group
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from actors.moe.delay import compensate_
from actors.moe.experts import Between, experts_in_a_piece
from actors.moe.missed import Owed, Row, Step, lowered
from actors.moe.muon import muon_
from actors.optim import OptimizerSettings, decays

NewMoments = Callable[[int, str], tuple[Tensor, Tensor]]
"""(layer, name) -> memory for both, zeros."""

PROBE = 64
"""Elements of a gradient that are looked at first: where they are not zero nobody need read on."""
LEAST_SEEN = 1e-15
"""Of one element: its square is a number in float32 too."""
CACHE_LINE_BYTES = 64
"""AdamW computes the elements of a whole one together; what is left over it rounds otherwise."""
MAX_BEHIND = 256
"""Steps that are put off at most."""


@dataclass
class _Layer:
    behind_E: list[int]
    """Steps that each expert has still to make, all with a gradient of zero."""
    updates: int = 0
    """So far, with those that were put off."""
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By name, once there was an update. Muon uses the first alone."""
    lrs: list[float] = field(default_factory=list)
    """Of the last steps, as many as the expert that is furthest behind has to make."""
    floors: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """By name, of each expert: no second moment of its was smaller after so many updates. Whatever the gradients are,
    none is smaller than `beta2` times itself after the next."""


class _Late(NamedTuple):
    """An expert's part of a parameter that has steps to make."""

    row: Row
    floor_E: list[tuple[float, int]]
    """Of the parameter's second moments."""
    expert: int

    def floor(self, steps: Owed) -> float:
        """Before them."""
        floor, updates = self.floor_E[self.expert]
        return lowered(floor, steps.settings.beta2, steps.before - updates, self.row[2].dtype)


class _Part(NamedTuple):
    """A parameter [E, ...] with all that belongs to it, or one expert's [1, ...], or a piece of that [N]."""

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    then: Tensor | None
    source: Tensor | None
    """That the weight is to be a copy of first."""
    decays: bool
    is_muon: bool

    def of(self, expert: int) -> _Part:
        return self._of(slice(expert, expert + 1))

    def _of(self, row: slice) -> _Part:
        then, source = (None if tensor is None else tensor[row] for tensor in (self.then, self.source))
        tensors = self.weight[row], self.gradient[row], self.first[row], self.second[row], then, source
        return _Part(*tensors, self.decays, self.is_muon)

    def pieces(self) -> Iterator[_Part]:
        """Of some experts each, where that changes no bit."""
        size = len(self.weight) if self.is_muon else experts_in_a_piece(self.weight)
        if self.weight[:1].nbytes % CACHE_LINE_BYTES or size >= len(self.weight):
            yield self
            return
        for first in range(0, len(self.weight), size):
            yield self._of(slice(first, first + size))


class GroupOptimizer:
    """Of `parameters` [E, ...], by layer and name."""

    def __init__(
        self,
        settings: OptimizerSettings,
        parameters: Sequence[Mapping[str, nn.Parameter]],
        new_moments: NewMoments,
        is_own: Callable[[], bool] = lambda: True,
    ) -> None:
        """`is_own`: whether nobody else has to update the group alike; may change, when nothing is put off."""
        self.settings = settings
        self._is_own = is_own
        self._parameters, self._new_moments = parameters, new_moments
        self._size = next((len(p) for layer in parameters for p in layer.values()), 0)
        self._layers = [_Layer([0] * self._size) for _ in parameters]
        self._names_by_decay: list[dict[bool, list[str]]] = []
        for layer in parameters:
            names: dict[bool, list[str]] = defaultdict(list)
            for name, parameter in layer.items():
                names[decays(name, parameter.ndim)].append(name)
            self._names_by_decay.append(names)

    @property
    def is_sparse(self) -> bool:
        return self.settings.sparse != "none"

    def updates(self, layer: int) -> int:
        return self._layers[layer].updates

    def moments(self, layer: int, name: str) -> tuple[Tensor, Tensor] | None:
        """Up to date after `catch_up`. None before the first update."""
        return self._layers[layer].moments.get(name)

    def num_bytes(self) -> int:
        """Of the moments."""
        moments = [m for state in self._layers for pair in state.moments.values() for m in pair]
        return sum(m.nbytes for m in moments if not _is_stand_in(m))

    def set(self, layer: int, moments: Mapping[str, Sequence[Tensor]], updates: int) -> None:
        """Of a layer that was stepped elsewhere. The weights are the caller's to write."""
        state = self._layers[layer] = _Layer([0] * self._size, updates)
        if updates:
            self._begin(layer)
            for name, given in moments.items():
                for mine, moment in zip(state.moments[name], given, strict=True):
                    if not _is_stand_in(mine):
                        mine.copy_(moment)

    # -- a step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        layer: int,
        gradients: Mapping[str, Tensor],
        lr: float,
        scale: float,
        *,
        num_updates: int = 1,
        candidates: Collection[int] | None = None,
        then: Mapping[str, Tensor] | None = None,
        source: Mapping[str, Tensor] | None = None,
        between: Between | None = None,
    ) -> bool:
        """One step of a layer with its gradients times `scale`, which are changed. -> whether weights were.

        `num_updates`: that the step stands for, all with this gradient: averages decay by beta ** num_updates and
        their count goes on by as many, as in the rule for Adam's larger batches of Malladi et al. 2022, there to the
        first order. `candidates`: experts that may have a gradient other than zero, None for all. `then`: the weights
        that the gradients were computed with, where they are older. `source`: what the weights are before the step, if
        they are only memory yet: copied piece by piece, each is in the cache then. `between` is called between pieces.
        """
        parts, updates = self._taking_part(layer, gradients, lr, num_updates, candidates, then, source)
        for pieces in [parts] if between is None else [[piece] for part in parts for piece in part.pieces()]:
            self._prepare(pieces, updates, scale)
            if between is not None:
                between()
            self._apply(pieces, updates, lr, num_updates)
            if between is not None:
                between()
        return bool(parts)

    def _taking_part(
        self,
        layer: int,
        gradients: Mapping[str, Tensor],
        lr: float,
        num_updates: int,
        candidates: Collection[int] | None,
        then: Mapping[str, Tensor] | None = None,
        source: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[_Part], int]:
        """What a step changes, and the updates before it; the others have been left out of it."""
        state = self._layers[layer]
        if not state.moments:
            self._begin(layer)
        if self.is_sparse and source is not None:  # some are not stepped
            for name, parameter in self._parameters[layer].items():
                parameter.data.copy_(source[name])
            source = None
        parts, updates = self._parts(layer, gradients, then, source), state.updates
        if self.is_sparse:
            touched = self._touched(gradients, candidates)
            self._leave_out(layer, touched, lr, num_updates)
            parts = [part.of(expert) for expert in touched for part in parts]
        state.updates += num_updates
        return parts, updates

    def _begin(self, layer: int) -> None:
        """Room for moments. A matrix under Muon has no second one: zeros that take no memory stand for it, so that
        groups on their way, snapshots and checkpoints have one form."""
        for name, parameter in self._parameters[layer].items():
            first, second = self._new_moments(layer, name)
            if self._is_muon(name, parameter):
                second = second.new_zeros(()).expand(second.shape)
            self._layers[layer].moments[name] = first, second
            self._layers[layer].floors[name] = [(0.0, 0)] * self._size

    def _is_muon(self, name: str, parameter: Tensor) -> bool:
        return self.settings.experts == "muon" and decays(name, parameter.ndim)

    def _parts(
        self,
        layer: int,
        gradients: Mapping[str, Tensor],
        then: Mapping[str, Tensor] | None,
        source: Mapping[str, Tensor] | None,
    ) -> list[_Part]:
        return [
            _Part(
                parameter.data,
                gradients[name],
                *self._layers[layer].moments[name],
                then[name] if then is not None else None,
                source[name] if source is not None else None,
                decays(name, parameter.ndim),
                self._is_muon(name, parameter),
            )
            for name, parameter in self._parameters[layer].items()
        ]

    def _touched(self, gradients: Mapping[str, Tensor], candidates: Collection[int] | None) -> list[int]:
        """Experts whose gradient is not zero, nor so small that its squares are. Counts of tokens would not do: copies
        of the group have the same gradients, and not the same tokens."""
        left = sorted(range(self._size) if candidates is None else candidates)
        found: list[int] = []
        for look in (_glanced_at, _probed, _looked_through):
            for gradient in gradients.values():
                if left:
                    sizes = look(gradient, left)
                    found += [e for e, size in zip(left, sizes, strict=True) if size != 0]
                    left = [e for e, size in zip(left, sizes, strict=True) if size == 0]
        return sorted(found)

    def _prepare(self, parts: Sequence[_Part], updates: int, scale: float) -> None:
        """Weights where they are to be, gradients as they are to be used: clipped, and corrected for old weights."""
        for part in parts:
            if part.source is not None:
                part.weight.copy_(part.source)
        if scale != 1.0 and parts:
            torch._foreach_mul_([part.gradient for part in parts], scale)
        for part in parts:
            if part.then is not None and self.settings.delay_correction:
                mean_square = None
                if updates and not part.is_muon:
                    mean_square = part.second / (1 - self.settings.beta2**updates)
                strength = self.settings.delay_correction
                compensate_(part.gradient, part.weight, part.then, strength=strength, mean_square=mean_square)

    def _apply(self, parts: Sequence[_Part], updates: int, lr: float, num_updates: int) -> None:
        settings = self.settings
        for part in parts:
            if part.is_muon:
                muon_(
                    part.weight,
                    part.gradient,
                    part.first,
                    lr=lr,
                    momentum=settings.momentum,
                    weight_decay=settings.weight_decay,
                    num_updates=num_updates,
                )
        for decay in (True, False):
            if chosen := [part for part in parts if part.decays is decay and not part.is_muon]:
                self._adamw(chosen, updates, lr, num_updates)

    def _adamw(self, parts: Sequence[_Part], updates: int, lr: float, num_updates: int) -> None:
        """Of parts that all decay, or do not."""
        settings, n = self.settings, num_updates
        # AdamW adds 1 and corrects by 1 - (beta ** n) ** count: with count = (c + n) / n that is 1 - beta ** (c + n).
        count = (updates + n) / n - 1
        decay = settings.weight_decay if parts[0].decays else 0.0
        Step(count, lr, settings.beta1**n, settings.beta2**n, settings.eps, decay).make(
            [part.weight for part in parts],
            [part.gradient for part in parts],
            [part.first for part in parts],
            [part.second for part in parts],
        )

    # -- steps that were put off --------------------------------------------------------------------------------------

    def is_behind(self, layer: int, experts: Iterable[int] | None = None) -> bool:
        """Whether one of them has steps to make."""
        behind_E = self._layers[layer].behind_E
        return any(behind_E) if experts is None else any(behind_E[e] for e in experts)

    def catch_up(self, layer: int, experts: Iterable[int] | None = None) -> None:
        """Makes the steps that these experts have still to make; None: all."""
        catch_up_together([(self, experts)], layer)

    def _owed(self, layer: int, experts: Iterable[int] | None) -> Iterator[tuple[Owed, list[_Late]]]:
        """Steps that these experts have still to make, whose they are; the caller makes them."""
        state = self._layers[layer]
        by_count: dict[int, list[int]] = defaultdict(list)
        for e in range(self._size) if experts is None else experts:
            if count := state.behind_E[e]:
                by_count[count].append(e)
                state.behind_E[e] = 0
        for count, together in by_count.items():
            lrs, before = tuple(state.lrs[-count:]), state.updates - count
            for decaying, names in self._names_by_decay[layer].items():
                late = [
                    _Late((weight_E[e], first_E[e], second_E[e]), state.floors[name], e)
                    for name in names
                    for weight_E, (first_E, second_E) in [(self._parameters[layer][name].data, state.moments[name])]
                    for e in together
                ]
                yield Owed(self.settings, before, lrs, decaying, self._is_own()), late
        del state.lrs[: len(state.lrs) - max(state.behind_E, default=0)]

    def _leave_out(self, layer: int, touched: Collection[int], lr: float, num_updates: int) -> None:
        """Before a step that only `touched` make."""
        if self.settings.sparse == "exact":
            assert num_updates == 1, "what is put off is made step by step"
            state = self._layers[layer]
            far = [e for e, count in enumerate(state.behind_E) if count >= MAX_BEHIND]
            if self.is_behind(layer, late := {*touched, *far}):
                self.catch_up(layer, late)
            state.lrs.append(lr)
            state.behind_E = [0 if e in touched else count + 1 for e, count in enumerate(state.behind_E)]


@torch.no_grad()
def catch_up_together(wanted: Iterable[tuple[GroupOptimizer, Iterable[int] | None]], layer: int) -> None:
    """Makes the steps that these experts of several groups have still to make; None: all of a group."""
    owed: dict[Owed, list[_Late]] = defaultdict(list)
    for optimizer, experts in wanted:
        for steps, late in optimizer._owed(layer, experts):
            owed[steps] += late
    for steps, late in owed.items():
        known = [each.floor(steps) for each in late]
        for each, before, floor in zip(late, known, steps.make([each.row for each in late], known), strict=True):
            if floor > before:
                each.floor_E[each.expert] = floor, steps.before


@torch.no_grad()
def step_together(
    wanted: Iterable[tuple[GroupOptimizer, Mapping[str, Tensor], Collection[int] | None]],
    layer: int,
    lr: float,
    scale: float,
) -> list[bool]:
    """`GroupOptimizer.step` of several groups of one run, each with its gradients and candidates; in fewer operations,
    and the same to the bit."""
    alike: dict[int, tuple[GroupOptimizer, list[_Part]]] = {}
    changed = []
    for optimizer, gradients, candidates in wanted:
        parts, updates = optimizer._taking_part(layer, gradients, lr, 1, candidates)
        alike.setdefault(updates, (optimizer, []))[1].extend(parts)
        changed.append(bool(parts))
    for updates, (any_of_them, parts) in alike.items():
        any_of_them._prepare(parts, updates, scale)
        any_of_them._apply(parts, updates, lr, 1)
    return changed


def _glanced_at(gradient_E: Tensor, experts: Sequence[int]) -> list[float]:
    """First elements; 0 also where the square might be."""
    firsts: list[float] = gradient_E.flatten(1)[:, 0].tolist()
    return [firsts[e] if abs(firsts[e]) > LEAST_SEEN else 0.0 for e in experts]


def _probed(gradient_E: Tensor, experts: Sequence[int]) -> list[float]:
    """Norms of these experts' first elements; in one operation, whoever else is read."""
    norms: list[float] = torch.linalg.vector_norm(gradient_E.flatten(1)[:, :PROBE], dim=1).tolist()
    return [norms[e] for e in experts]


def _looked_through(gradient_E: Tensor, experts: Sequence[int]) -> list[float]:
    norms: list[float] = torch.stack([torch.linalg.vector_norm(gradient_E[e]) for e in experts]).tolist()
    return norms


def _is_stand_in(moment: Tensor) -> bool:
    """It is expanded from one zero."""
    return moment.untyped_storage().nbytes() < moment.nbytes
