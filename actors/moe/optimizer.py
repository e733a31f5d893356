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

import torch
from torch import Tensor, nn

from actors.moe.delay import compensate_
from actors.moe.experts import Between, experts_in_a_piece
from actors.moe.missed import Owed, Row, Step
from actors.moe.muon import muon_
from actors.optim import OptimizerSettings, decays

NewMoments = Callable[[int, str], tuple[Tensor, Tensor]]
"""(layer, name) -> memory for both, zeros."""

PROBE = 1024
"""Elements of a gradient that are looked at first: where they are not zero nobody need read on."""
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


@dataclass(frozen=True)
class _Part:
    """A parameter [E, ...] with all that belongs to it, or one expert's [1, ...], or a piece of that [N]."""

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    then: Tensor | None
    decays: bool
    is_muon: bool

    def of(self, expert: int) -> _Part:
        return self._of(slice(expert, expert + 1))

    def _of(self, row: slice) -> _Part:
        then = None if self.then is None else self.then[row]
        tensors = self.weight[row], self.gradient[row], self.first[row], self.second[row], then
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
        between: Between | None = None,
    ) -> bool:
        """One step of a layer with its gradients times `scale`, which are changed. -> whether weights were.

        `num_updates`: that the step stands for, all with this gradient: averages decay by beta ** num_updates and
        their count goes on by as many, as in the rule for Adam's larger batches of Malladi et al. 2022, there to the
        first order. `candidates`: experts that may have a gradient other than zero, None for all. `then`: the weights
        that the gradients were computed with, where they are older. `between` is called between pieces of the work.
        """
        state = self._layers[layer]
        if not state.moments:
            self._begin(layer)
        parts = self._parts(layer, gradients, then)
        if self.is_sparse:
            touched = self._touched(gradients, candidates)
            self._leave_out(layer, touched, lr, num_updates)
            parts = [part.of(expert) for expert in touched for part in parts]
        for pieces in [parts] if between is None else [[piece] for part in parts for piece in part.pieces()]:
            self._prepare(pieces, state.updates, scale)
            self._apply(pieces, state.updates, lr, num_updates)
            if between is not None:
                between()
        state.updates += num_updates
        return bool(parts)

    def _begin(self, layer: int) -> None:
        """Room for moments. A matrix under Muon has no second one: zeros that take no memory stand for it, so that
        groups on their way, snapshots and checkpoints have one form."""
        for name, parameter in self._parameters[layer].items():
            first, second = self._new_moments(layer, name)
            if self._is_muon(name, parameter):
                second = second.new_zeros(()).expand(second.shape)
            self._layers[layer].moments[name] = first, second

    def _is_muon(self, name: str, parameter: Tensor) -> bool:
        return self.settings.experts == "muon" and decays(name, parameter.ndim)

    def _parts(
        self, layer: int, gradients: Mapping[str, Tensor], then: Mapping[str, Tensor] | None = None
    ) -> list[_Part]:
        return [
            _Part(
                parameter.data,
                gradients[name],
                *self._layers[layer].moments[name],
                then[name] if then is not None else None,
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
        for part in (slice(PROBE), slice(None)):
            for gradient in gradients.values():
                if left:
                    norms = torch.stack([torch.linalg.vector_norm(gradient[e].view(-1)[part]) for e in left]).tolist()
                    found += [e for e, norm in zip(left, norms, strict=True) if norm != 0]
                    left = [e for e, norm in zip(left, norms, strict=True) if norm == 0]
        return sorted(found)

    def _prepare(self, parts: Sequence[_Part], updates: int, scale: float) -> None:
        """Gradients as they are to be used: clipped, and corrected for old weights."""
        for part in parts:
            if scale != 1.0:
                part.gradient.mul_(scale)
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

    def _owed(self, layer: int, experts: Iterable[int] | None) -> Iterator[tuple[Owed, list[Row]]]:
        """Steps that these experts have still to make, whose they are; the caller makes them."""
        state = self._layers[layer]
        by_count: dict[int, list[int]] = defaultdict(list)
        for e in range(self._size) if experts is None else experts:
            if count := state.behind_E[e]:
                by_count[count].append(e)
                state.behind_E[e] = 0
        for count, together in by_count.items():
            lrs, before = tuple(state.lrs[-count:]), state.updates - count
            for name, parameter in self._parameters[layer].items():
                moments = state.moments[name]
                owed = Owed(self.settings, before, lrs, decays(name, parameter.ndim), self._is_own())
                yield owed, [(parameter.data[e], moments[0][e], moments[1][e]) for e in together]
        del state.lrs[: len(state.lrs) - max(state.behind_E, default=0)]

    def _leave_out(self, layer: int, touched: Collection[int], lr: float, num_updates: int) -> None:
        """Before a step that only `touched` make."""
        if self.settings.sparse == "exact":
            assert num_updates == 1, "what is put off is made step by step"
            state = self._layers[layer]
            far = [e for e, count in enumerate(state.behind_E) if count >= MAX_BEHIND]
            self.catch_up(layer, {*touched, *far})
            state.lrs.append(lr)
            state.behind_E = [0 if e in touched else count + 1 for e, count in enumerate(state.behind_E)]


@torch.no_grad()
def catch_up_together(wanted: Iterable[tuple[GroupOptimizer, Iterable[int] | None]], layer: int) -> None:
    """Makes the steps that these experts of several groups have still to make; None: all of a group."""
    owed: dict[Owed, list[Row]] = defaultdict(list)
    for optimizer, experts in wanted:
        for steps, rows in optimizer._owed(layer, experts):
            owed[steps] += rows
    for steps, rows in owed.items():
        steps.make(rows)


def _is_stand_in(moment: Tensor) -> bool:
    """It is expanded from one zero."""
    return moment.untyped_storage().nbytes() < moment.nbytes
