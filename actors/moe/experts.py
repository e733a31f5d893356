"""The experts of one MoE layer that live together: stacked weights, forward, and a backward in two parts.

The first part gives what the router waits for (gradients of tokens and gate weights); the second, the gradients of the
weights, can be done while the router goes on with its own backward.

The layout of the weights and the gating function are those of the transformers experts class of the model family
(`transformers.integrations.moe.use_experts_implementation`), so every family of that registry is computed as it means.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from actors.errors import InvalidInput
from actors.moe.form import ExpertForm
from actors.moe.gradient import gradient_of
from actors.moe.grouped import Counts, add_bias, add_grouped_outer, add_grouped_sum, grouped_mm
from actors.moe.passes import order_by_token

Template = nn.Module | ExpertForm
"""The family's experts module, or what stands for it."""

Weights = Mapping[str, Tensor]
"""A stack's parameters by name, [E, ...] each. Where updates are copy-on-write nobody writes to these tensors again:
whoever holds the mapping has one version of the layer for as long as needed, whatever becomes of the stack. Once nobody
holds the mapping its tensors are used again, so they must not be kept without it."""


Between = Callable[[], None]
"""Called between pieces of long work beside other work: some experts' part of a parameter is one."""
PIECE = 1 << 18
"""Elements of a piece, where an expert's part is smaller: a fraction of a millisecond, and many times the call."""


def pieces_of(tensors: Sequence[Tensor], between: Between | None) -> Iterator[Sequence[Tensor]]:
    """Of tensors [E, ...], some experts' part of each at a time. Without `between` all at once."""
    if between is None:
        yield tensors
        return
    size = experts_in_a_piece(tensors[0])
    for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        yield parts
        between()


def experts_in_a_piece(tensor: Tensor) -> int:
    """Of [E, ...]."""
    return max(1, PIECE // max(1, tensor[:1].numel()))


class _Version(dict[str, Tensor]):
    """Weights that `weakref` can tell the end of."""


MAX_SPARES = 2
"""Sets of tensors that a stack keeps: on a CPU the first touch of new memory costs several times the copying."""


@dataclass(frozen=True)
class Work:
    """What one actor is asked to do for one layer: pairs sorted by local expert.

    token_P indexes rows of the tokens sent along; `counts_E` pairs belong to each local expert; weight_P is the gate's.
    """

    token_P: Tensor
    counts_E: Sequence[int]
    weight_P: Tensor

    @cached_property
    def by_token(self) -> tuple[Tensor, Tensor]:
        """Tokens in ascending order, and the pairs in that order: [P] each."""
        return order_by_token(self.token_P)

    def to(self, device: torch.device) -> Work:
        return Work(self.token_P.to(device), Counts(self.counts_E), self.weight_P.to(device))

    def check(self, num_tokens: int, num_experts: int) -> None:
        """Raises `InvalidInput` unless the parts fit each other; runs before any memory is taken for the work.

        Indices that are on a GPU already are not looked at, since the host would have to wait for it; there no index
        leads out of the tokens (`actors.moe.passes.gather_rows`).
        """
        if len(self.counts_E) != num_experts or any(type(n) is not int or n < 0 for n in self.counts_E):
            raise InvalidInput(f"need {num_experts} counts of at least 0", field="counts_E", value=self.counts_E)
        num_pairs = sum(self.counts_E)
        if self.token_P.shape != (num_pairs,) or self.weight_P.shape != (num_pairs,):
            raise InvalidInput(f"need {num_pairs} pairs", field="token_P", value=tuple(self.token_P.shape))
        if num_pairs and self.token_P.device.type != "cuda":
            low, high = self.token_P.aminmax()
            if int(low) < 0 or int(high) >= num_tokens:
                raise InvalidInput(
                    f"indices must be 0 to {num_tokens - 1}", field="token_P", value=(int(low), int(high))
                )

    def parts(self, max_pairs: int) -> Iterator[Work]:
        """Consecutive parts of at most `max_pairs` pairs, an expert's pairs divided where they do not fit."""
        ends_E = list(itertools.accumulate(self.counts_E))
        for first in range(0, len(self.token_P), max_pairs):
            last = min(first + max_pairs, len(self.token_P))
            counts_E = Counts(
                max(0, min(end, last) - max(end - count, first))
                for end, count in zip(ends_E, self.counts_E, strict=True)
            )
            yield Work(self.token_P[first:last], counts_E, self.weight_P[first:last])


@dataclass
class Activations:
    """What backward needs of the forward of one part."""

    work: Work
    rows_PD: Tensor
    pre_PH: Tensor
    """Input of the gating function; requires grad, `act_PI` was computed from it."""
    act_PI: Tensor


@dataclass
class Saved:
    """What backward needs of a forward: its activations, or where they would be too large, the tokens to make them
    again from, part by part."""

    work: Work
    x_TD: Tensor | None
    activations: Activations | None
    weights: Weights
    """That the forward was computed with: backward uses the same."""


@dataclass
class WeightGradients:
    """Second part of a backward, still to be done."""

    saved: Activations
    grad_pre_PH: Tensor
    grad_out_PD: Tensor


MAX_PAIRS = 1 << 15
"""Pairs that are computed at a time: what bounds the memory of a host however uneven the load (S16). From 32k rows on a
GPU's grouped products run at full rate."""


class ExpertStack(nn.Module):
    """`template` is the family's experts module (any device, any number of experts); its parameters are not used.

    Parameters here have the template's names and a leading dimension of `num_experts` local experts.
    """

    def __init__(self, template: Template, tensors: Mapping[str, Tensor], *, max_pairs: int = MAX_PAIRS) -> None:
        super().__init__()
        self._max_pairs = max_pairs
        object.__setattr__(self, "_template", template)  # not a submodule: only its functions are used
        self._transposed = bool(template.is_transposed)
        self._in = "gate_up_proj" if template.has_gate else "up_proj"
        self._out = "down_proj"
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.names = tuple(sorted(tensors))
        self.touched: set[int] = set()
        """Experts that may have a gradient other than zero; who takes or zeroes the gradients clears it."""
        self._weights = self._bound()
        self._spare_weights: list[dict[str, Tensor]] = []
        self._spare_gradients: list[dict[str, Tensor]] = []

    @property
    def num_experts(self) -> int:
        return int(self._parameter(self._in).shape[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one expert's part."""
        return tuple(self._parameter(name).shape[1:])

    def weight(self, name: str) -> Tensor:
        return self._parameter(name).detach()

    @property
    def weights(self) -> Weights:
        """What a forward that begins now uses."""
        return self._weights

    def switch(self, weights: Weights) -> None:
        """From now on forwards use these tensors; of the same shapes as before, and the caller's no longer.

        From any thread. One assignment: a forward beside it has all of the old ones or all of the new ones.
        """
        version = _Version(weights)
        if not self._is_cuda:  # there another stream may still read what nobody holds any more
            weakref.finalize(version, _retire, weakref.ref(self), dict(weights)).atexit = False
        self._weights = version
        for name, tensor in weights.items():
            self._parameter(name).data = tensor

    def fresh(self) -> dict[str, Tensor]:
        """A copy of the weights, to be written and given to `switch`. From one thread at a time."""
        with torch.no_grad():
            weights, fresh = self._weights, self.room()
            for name, tensor in weights.items():
                fresh[name].copy_(tensor)
            return fresh

    def room(self) -> dict[str, Tensor]:
        """Memory for the weights, with anything in it: as `fresh`, where all of it will be written."""
        if self._spare_weights:
            return self._spare_weights.pop()
        return {name: torch.empty_like(tensor) for name, tensor in self._weights.items()}

    def gradient(self, name: str) -> Tensor:
        return _grad(self._parameter(name))

    def take_gradients(self) -> dict[str, Tensor]:
        """What was accumulated, by name, is the caller's; what comes from now on is added up elsewhere."""
        taken = {name: self.gradient(name) for name in self.names}
        spare = self._spare_gradients.pop() if self._spare_gradients else {}
        for name in self.names:
            self._parameter(name).grad = spare.get(name)
        return taken

    def give_back(self, gradients: dict[str, Tensor]) -> None:
        """What `take_gradients` gave is not needed any more, and zero. From any thread."""
        if not self._is_cuda:
            self._keep_spare(self._spare_gradients, gradients)

    def drop_spares(self) -> None:
        """Gives back the memory that is kept for updates."""
        self._spare_weights.clear()
        self._spare_gradients.clear()

    def _keep_spare(self, spares: list[dict[str, Tensor]], tensors: dict[str, Tensor]) -> None:
        fit = all(tensors[name].shape == self._parameter(name).shape for name in self.names)
        if fit and len(spares) < MAX_SPARES:
            spares.append(tensors)

    @property
    def _is_cuda(self) -> bool:
        return self._parameter(self._in).device.type == "cuda"

    def zero_gradients(self) -> None:
        for name in self.names:
            if (grad := self._parameter(name).grad) is not None:
                grad.zero_()

    def resize(self, num_experts: int, room: Sequence[Tensor] = ()) -> None:
        """Room for more experts behind those that are here; also in the middle of a step. `room`: of `room_for`, where
        it was asked for; what does not fit is not used."""
        spare = list(room)

        def extended(old: Tensor) -> Tensor:
            shape = (num_experts, *old.shape[1:])
            at = next((i for i, tensor in enumerate(spare) if tensor.shape == shape), None)
            if at is None:
                return torch.cat((old, old.new_zeros(num_experts - len(old), *old.shape[1:])))
            new = spare.pop(at)
            new[: len(old)] = old
            return new

        if num_experts > self.num_experts:
            self._rebuild(extended)

    def room_for(self, num_experts: int) -> list[Tensor]:
        """Memory for `resize`, all zeros: from any thread, since to touch new memory takes several times as long as to
        copy what is to be there."""
        tensors = [t for p in self.parameters() for t in (p, p.grad) if t is not None]
        return [t.detach().new_zeros(num_experts, *t.shape[1:]) for t in tensors]

    def keep(self, experts: Sequence[int]) -> None:
        """Gives up all but these; between two steps, since what is saved counts by the old numbers."""
        kept_E = torch.tensor(experts, device=self._parameter(self._in).device)
        self._rebuild(lambda old: old.index_select(0, kept_E))
        self.touched.clear()

    @torch.no_grad()
    def _rebuild(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self.names:
            old = self._parameter(name)
            new = nn.Parameter(change(old))
            new.grad = None if old.grad is None else change(old.grad)
            self.register_parameter(name, new)
        self._weights = self._bound()
        self.drop_spares()

    @property
    def width(self) -> int:
        """D, the model width."""
        return int(self.shape(self._in)[0 if self._transposed else 1])

    def forward(
        self, x_TD: Tensor, work: Work, *, keep: bool, weights: Weights | None = None
    ) -> tuple[Tensor, Saved | None]:
        """Weighted sum over this stack's experts, one row a token: [T, D]. `keep` saves what backward needs.

        `weights`: others than those of now, e.g. of an earlier version.
        """
        weights = self._weights if weights is None else weights
        whole = len(work.token_P) <= self._max_pairs
        y_TD = torch.zeros(x_TD.shape, dtype=self._sum_dtype(x_TD, work, whole), device=x_TD.device)
        activations = None
        for part in work.parts(self._max_pairs):
            activations, out_PD = self._compute(x_TD, part, weights, keep=keep and whole)
            self._add_outputs(y_TD, part, out_PD)
        saved = Saved(work, None, activations, weights) if whole else Saved(work, x_TD, None, weights)
        return y_TD.to(x_TD.dtype), saved if keep else None

    def backward(self, saved: Saved, grad_y_TD: Tensor) -> tuple[Tensor, Tensor, WeightGradients | None]:
        """-> gradient of the tokens [T, D], of the gate weights [P], and the weights' part to be done later, if any."""
        grad_x_TD = torch.zeros_like(grad_y_TD)
        if saved.activations is not None:
            grad_weight_P, later = self._differentiate(saved.activations, saved.weights, grad_y_TD, grad_x_TD)
            return grad_x_TD, grad_weight_P, later
        grads: list[Tensor] = []
        for part in saved.work.parts(self._max_pairs):
            assert saved.x_TD is not None
            activations, _ = self._compute(saved.x_TD, part, saved.weights, keep=True)
            assert activations is not None
            grad_weight_P, later = self._differentiate(activations, saved.weights, grad_y_TD, grad_x_TD)
            grads.append(grad_weight_P)
            self.accumulate(later)  # at once: put off, the parts would be in memory together
        return grad_x_TD, torch.cat(grads) if grads else torch.zeros_like(saved.work.weight_P), None

    # How rows are permuted: `DeviceExperts` does it otherwise.

    def _sum_dtype(self, x_TD: Tensor, work: Work, whole: bool) -> torch.dtype:
        """In which a token's outputs are added up; `whole`: all at once."""
        return torch.promote_types(work.weight_P.dtype, x_TD.dtype)

    def _rows(self, x_TD: Tensor, work: Work) -> Tensor:
        return x_TD.index_select(0, work.token_P)

    def _add_outputs(self, y_TD: Tensor, work: Work, out_PD: Tensor) -> None:
        """What `_compute` gave, times the gate weights, to each token's sum."""
        y_TD.index_add_(0, work.token_P, out_PD * work.weight_P.unsqueeze(1))

    def _add_rows(self, into_TD: Tensor, work: Work, rows_PD: Tensor) -> None:
        into_TD.index_add_(0, work.token_P, rows_PD)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _compute(self, x_TD: Tensor, work: Work, weights: Weights, *, keep: bool) -> tuple[Activations | None, Tensor]:
        """Outputs of each pair [P, D], not weighted; with `keep`, what their backward needs."""
        with torch.no_grad():
            counts_E = self._padded(work.counts_E, self._length(weights))
            rows_PD = self._rows(x_TD, work)
            pre_PH = self._project(weights, self._in, rows_PD, counts_E)
            if (bias := self._bias(weights, self._in)) is not None:
                add_bias(pre_PH, bias, counts_E)
        with torch.set_grad_enabled(keep):
            pre_PH.requires_grad_(keep)
            act_PI = self._activate(pre_PH)
        with torch.no_grad():
            out_PD = self._project(weights, self._out, act_PI.detach(), counts_E)
            if (bias := self._bias(weights, self._out)) is not None:
                add_bias(out_PD, bias, counts_E)
        return Activations(work, rows_PD, pre_PH, act_PI) if keep else None, out_PD

    @torch.no_grad()
    def _differentiate(
        self, saved: Activations, weights: Weights, grad_y_TD: Tensor, grad_x_TD: Tensor
    ) -> tuple[Tensor, WeightGradients]:
        """Adds into `grad_x_TD`; -> gradient of the gate weights [P], and what is left for the expert weights."""
        work = saved.work
        counts_E = self._padded(work.counts_E, self._length(weights))
        grad_rows_PD = self._rows(grad_y_TD, work)
        # With w the gate weight, y = w * (act @ W + b): grad of w is <grad_y, act @ W + b> = <grad_y @ W^T, act> + ...
        unweighted_PI = self._project_back(weights, self._out, grad_rows_PD, counts_E)
        wide = torch.promote_types(work.weight_P.dtype, grad_y_TD.dtype)
        grad_weight_P = (unweighted_PI * saved.act_PI.detach()).sum(1, dtype=wide)
        if (bias := self._bias(weights, self._out)) is not None:
            bias_PD = add_bias(torch.zeros_like(grad_rows_PD), bias, counts_E)
            grad_weight_P += (grad_rows_PD * bias_PD).sum(1, dtype=wide)
        scale_P1 = work.weight_P.unsqueeze(1).to(grad_rows_PD.dtype)
        grad_pre_PH = gradient_of(saved.act_PI, saved.pre_PH, unweighted_PI.mul_(scale_P1))
        grad_pre_PH = grad_pre_PH.contiguous()
        self._add_rows(grad_x_TD, work, self._project_back(weights, self._in, grad_pre_PH, counts_E))
        later = WeightGradients(saved, grad_pre_PH, grad_rows_PD.mul_(scale_P1))
        return grad_weight_P.to(work.weight_P.dtype), later

    @torch.no_grad()
    def accumulate(self, part: WeightGradients) -> None:
        """Adds the weights' gradients of one micro-batch into `.grad`."""
        saved, counts_E = part.saved, self._padded(part.saved.work.counts_E, self.num_experts)
        self.touched.update(expert for expert, count in enumerate(counts_E) if count)
        act_PI = saved.act_PI.detach()
        self._accumulate_matrix(self._in, saved.rows_PD, part.grad_pre_PH, counts_E)
        self._accumulate_matrix(self._out, act_PI, part.grad_out_PD, counts_E)
        for name, grad_PN in ((self._in, part.grad_pre_PH), (self._out, part.grad_out_PD)):
            if f"{name}_bias" in self.names:
                self._accumulate_bias(f"{name}_bias", grad_PN, counts_E)

    # Where the weights are is known only below this line: `CachedExperts` has them elsewhere.

    def _project(self, weights: Weights, name: str, rows_PM: Tensor, counts_E: Sequence[int]) -> Tensor:
        """Rows times the matrices of their experts: [P, N]."""
        return grouped_mm(rows_PM, self._matrices(weights[name]), counts_E)

    def _project_back(self, weights: Weights, name: str, rows_PN: Tensor, counts_E: Sequence[int]) -> Tensor:
        """Rows times the transposed matrices: [P, M]."""
        return grouped_mm(rows_PN, self._matrices(weights[name]).transpose(1, 2), counts_E)

    def _accumulate_matrix(self, name: str, rows_PM: Tensor, grad_PN: Tensor, counts_E: Sequence[int]) -> None:
        left, right = (rows_PM, grad_PN) if self._transposed else (grad_PN, rows_PM)
        add_grouped_outer(_grad(self._parameter(name)), left, right, counts_E)

    def _accumulate_bias(self, name: str, grad_PN: Tensor, counts_E: Sequence[int]) -> None:
        add_grouped_sum(_grad(self._parameter(name)), grad_PN, counts_E)

    def _matrices(self, weight_E: Tensor) -> Tensor:
        """[E, in, out], whichever way the family stores them."""
        return weight_E if self._transposed else weight_E.transpose(1, 2)

    def _length(self, weights: Weights) -> int:
        """Experts in these."""
        return len(weights[self._in])

    def _padded(self, counts_E: Sequence[int], num_experts: int) -> Sequence[int]:
        """Room may have been made since these were counted."""
        missing = num_experts - len(counts_E)
        return [*counts_E, *[0] * missing] if missing else counts_E

    def _parameter(self, name: str) -> nn.Parameter:
        """As `get_parameter`, without its parsing of the name: this is called several times a message."""
        return cast(nn.Parameter, self._parameters[name])

    def _bound(self) -> Weights:
        return _Version({name: self._parameter(name).detach() for name in self.names})

    def _bias(self, weights: Weights, name: str) -> Tensor | None:
        return weights.get(f"{name}_bias")

    def _activate(self, pre_PH: Tensor) -> Tensor:
        template: Any = self._template
        result: Tensor = template._apply_gate(pre_PH) if template.has_gate else template.act_fn(pre_PH)
        return result


def _retire(stack_of: Callable[[], ExpertStack | None], tensors: dict[str, Tensor]) -> None:
    """Nobody holds a version of these tensors any more."""
    if (stack := stack_of()) is not None:
        stack._keep_spare(stack._spare_weights, tensors)


def _grad(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
