"""The experts of one MoE layer that live together: stacked weights, forward, and a backward in two parts.

The first part gives what the router waits for (gradients of tokens and gate weights); the second, the gradients of the
weights, can be done while the router goes on with its own backward.

The layout of the weights and the gating function are those of the transformers experts class of the model family
(`transformers.integrations.moe.use_experts_implementation`), so every family of that registry is computed as it means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from actors.errors import InvalidInput
from actors.moe.grouped import add_bias, add_grouped_outer, add_grouped_sum, grouped_mm


@dataclass(frozen=True)
class Work:
    """What one actor is asked to do for one layer: pairs sorted by local expert.

    token_P indexes rows of the tokens sent along; `counts_E` pairs belong to each local expert; weight_P is the gate's.
    """

    token_P: Tensor
    counts_E: Sequence[int]
    weight_P: Tensor

    def check(self, num_tokens: int, num_experts: int) -> None:
        """Raises `InvalidInput` unless the parts fit each other; runs before any memory is taken for the work."""
        if len(self.counts_E) != num_experts or any(type(n) is not int or n < 0 for n in self.counts_E):
            raise InvalidInput(f"need {num_experts} counts of at least 0", field="counts_E", value=self.counts_E)
        num_pairs = sum(self.counts_E)
        if self.token_P.shape != (num_pairs,) or self.weight_P.shape != (num_pairs,):
            raise InvalidInput(f"need {num_pairs} pairs", field="token_P", value=tuple(self.token_P.shape))
        if num_pairs:
            low, high = self.token_P.aminmax()
            if int(low) < 0 or int(high) >= num_tokens:
                raise InvalidInput(
                    f"indices must be 0 to {num_tokens - 1}", field="token_P", value=(int(low), int(high))
                )


@dataclass
class Saved:
    """What backward needs of a forward."""

    work: Work
    rows_PD: Tensor
    pre_PH: Tensor
    """Input of the gating function; requires grad, `act_PI` was computed from it."""
    act_PI: Tensor


@dataclass
class WeightGradients:
    """Second part of a backward, still to be done."""

    saved: Saved
    grad_pre_PH: Tensor
    grad_out_PD: Tensor


class ExpertStack(nn.Module):
    """`template` is the family's experts module (any device, any number of experts); its parameters are not used.

    Parameters here have the template's names and a leading dimension of `num_experts` local experts.
    """

    def __init__(self, template: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "_template", template)  # not a submodule: only its functions are used
        self._transposed = bool(template.is_transposed)
        self._in = "gate_up_proj" if template.has_gate else "up_proj"
        self._out = "down_proj"
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    @property
    def num_experts(self) -> int:
        return int(self._parameter(self._in).shape[0])

    @property
    def width(self) -> int:
        """D, the model width."""
        weight = self._parameter(self._in)
        return int(weight.shape[1] if self._transposed else weight.shape[2])

    def forward(self, x_TD: Tensor, work: Work, *, keep: bool) -> tuple[Tensor, Saved | None]:
        """Weighted sum over this stack's experts, one row a token: [T, D]. `keep` saves what backward needs."""
        with torch.no_grad():
            rows_PD = x_TD.index_select(0, work.token_P)
            pre_PH = grouped_mm(rows_PD, self._matrices(self._in), work.counts_E)
            if (bias := self._bias(self._in)) is not None:
                add_bias(pre_PH, bias, work.counts_E)
        with torch.set_grad_enabled(keep):
            pre_PH.requires_grad_(keep)
            act_PI = self._activate(pre_PH)
        with torch.no_grad():
            out_PD = grouped_mm(act_PI.detach(), self._matrices(self._out), work.counts_E)
            if (bias := self._bias(self._out)) is not None:
                add_bias(out_PD, bias, work.counts_E)
            weighted_PD = out_PD * work.weight_P.unsqueeze(1)
            y_TD = weighted_PD.new_zeros(x_TD.shape).index_add_(0, work.token_P, weighted_PD)
        return y_TD.to(x_TD.dtype), Saved(work, rows_PD, pre_PH, act_PI) if keep else None

    @torch.no_grad()
    def backward(self, saved: Saved, grad_y_TD: Tensor) -> tuple[Tensor, Tensor, WeightGradients]:
        """-> gradient of the tokens [T, D], of the gate weights [P], and the weights' part to be done later."""
        work = saved.work
        grad_rows_PD = grad_y_TD.index_select(0, work.token_P)
        # With w the gate weight, y = w * (act @ W + b): grad of w is <grad_y, act @ W + b> = <grad_y @ W^T, act> + ...
        unweighted_PI = grouped_mm(grad_rows_PD, self._matrices(self._out).transpose(1, 2), work.counts_E)
        wide = torch.promote_types(work.weight_P.dtype, grad_y_TD.dtype)
        grad_weight_P = (unweighted_PI * saved.act_PI.detach()).sum(1, dtype=wide)
        if (bias := self._bias(self._out)) is not None:
            bias_PD = add_bias(torch.zeros_like(grad_rows_PD), bias, work.counts_E)
            grad_weight_P += (grad_rows_PD * bias_PD).sum(1, dtype=wide)
        scale_P1 = work.weight_P.unsqueeze(1).to(grad_rows_PD.dtype)
        (grad_pre_PH,) = torch.autograd.grad(saved.act_PI, saved.pre_PH, unweighted_PI.mul_(scale_P1))
        grad_pre_PH = grad_pre_PH.contiguous()
        grad_tokens_PD = grouped_mm(grad_pre_PH, self._matrices(self._in).transpose(1, 2), work.counts_E)
        grad_x_TD = torch.zeros_like(grad_y_TD).index_add_(0, work.token_P, grad_tokens_PD)
        grad_weight_P = grad_weight_P.to(work.weight_P.dtype)
        return grad_x_TD, grad_weight_P, WeightGradients(saved, grad_pre_PH, grad_rows_PD.mul_(scale_P1))

    @torch.no_grad()
    def accumulate(self, part: WeightGradients) -> None:
        """Adds the weights' gradients of one micro-batch into `.grad`."""
        saved, counts_E = part.saved, part.saved.work.counts_E
        act_PI = saved.act_PI.detach()
        self._accumulate_matrix(self._in, saved.rows_PD, part.grad_pre_PH, counts_E)
        self._accumulate_matrix(self._out, act_PI, part.grad_out_PD, counts_E)
        for name, grad_PN in ((self._in, part.grad_pre_PH), (self._out, part.grad_out_PD)):
            if self._bias(name) is not None:
                add_grouped_sum(_grad(self._parameter(f"{name}_bias")), grad_PN, counts_E)

    def _accumulate_matrix(self, name: str, rows_PM: Tensor, grad_PN: Tensor, counts_E: Sequence[int]) -> None:
        grad = _grad(self._parameter(name))
        left, right = (rows_PM, grad_PN) if self._transposed else (grad_PN, rows_PM)
        add_grouped_outer(grad, left, right, counts_E)

    def _matrices(self, name: str) -> Tensor:
        """[E, in, out], whichever way the family stores them."""
        weight = self._parameter(name)
        return weight if self._transposed else weight.transpose(1, 2)

    def _parameter(self, name: str) -> nn.Parameter:
        """As `get_parameter`, without its parsing of the name: this is called several times a message."""
        return cast(nn.Parameter, self._parameters[name])

    def _bias(self, name: str) -> Tensor | None:
        return self._parameters.get(f"{name}_bias")

    def _activate(self, pre_PH: Tensor) -> Tensor:
        template: Any = self._template
        result: Tensor = template._apply_gate(pre_PH) if template.has_gate else template.act_fn(pre_PH)
        return result


def _grad(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
