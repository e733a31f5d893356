"""The experts of one MoE layer on a GPU: from tokens to weighted sums without the host waiting for the device.

Where the family's experts are plain SwiGLU (S25), which most are, activation and gate weight are one pass between the
two grouped products, forward and backward; other gating functions and biases go the general way of `ExpertStack`. The
sum over a token's experts is one pass for all, in the order of its pairs: equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.moe.experts import MAX_PAIRS, Activations, ExpertStack, Template, WeightGradients, Weights, Work
from actors.moe.grouped import grouped_outer
from actors.moe.passes import add_sums, gated, gated_backward_, gather_rows

ACTIVATIONS_SHARE = 0.25
"""Of a GPU's memory that the activations of one micro-batch may take, over all layers."""


def experts_on(
    device: torch.device, template: Template, tensors: Mapping[str, Tensor], *, num_layers: int, max_pairs: int = 0
) -> ExpertStack:
    """The stack that is right there. `max_pairs` 0: `default_max_pairs`."""
    if device.type != "cuda":
        return ExpertStack(template, tensors, max_pairs=max_pairs or MAX_PAIRS)
    if not max_pairs:
        total_bytes = int(torch.cuda.get_device_properties(device).total_memory)
        max_pairs = default_max_pairs(tensors, template, total_bytes, num_layers)
    return DeviceExperts(template, tensors, max_pairs=max_pairs)


def default_max_pairs(tensors: Mapping[str, Tensor], template: Any, total_bytes: int, num_layers: int) -> int:
    """Pairs of a layer whose activations are kept between forward and backward: as many as `ACTIVATIONS_SHARE` of the
    device has room for, and at least `MAX_PAIRS`. Of more, the tokens are kept and forward is run again in backward.

    A pair takes its row, the activation's input and output, and in backward the gradients of row and input.
    """
    _, *shape = tensors["down_proj"].shape
    inner, width = shape if template.is_transposed else reversed(shape)
    pre = 2 * inner if template.has_gate else inner
    pair_bytes = (2 * width + 2 * pre + inner) * tensors["down_proj"].element_size()
    return max(MAX_PAIRS, int(ACTIVATIONS_SHARE * total_bytes) // (num_layers * pair_bytes))


@torch.no_grad()
def is_swiglu(template: Any, names: Sequence[str]) -> bool:
    """Whether the family's gating is silu(first half) * second half, with no bias anywhere. Found by trying it, small
    numbers and large: families differ by what they do beside that, e.g. clamp."""
    if not template.has_gate or any(name.endswith("_bias") for name in names):
        return False
    size = torch.logspace(-3, 3, 25, dtype=torch.float64)
    tried = torch.cat((size, -size))
    pre_PH = torch.stack((tried, tried.flip(0), tried.roll(7), -tried.roll(19)), dim=1)
    gate_PI, up_PI = pre_PH.chunk(2, dim=1)
    found: Tensor = template._apply_gate(pre_PH)
    return found.shape == gate_PI.shape and torch.allclose(found, F.silu(gate_PI) * up_PI, rtol=1e-9, atol=0)


class DeviceExperts(ExpertStack):
    """Runs on a CPU as well, for tests."""

    def __init__(self, template: Template, tensors: Mapping[str, Tensor], *, max_pairs: int = MAX_PAIRS) -> None:
        super().__init__(template, tensors, max_pairs=max_pairs)
        self.is_fused = is_swiglu(template, self.names)

    def zero_gradients(self) -> None:
        """Their memory goes: the first micro-batch of a step writes its gradients, with nothing to add them to."""
        for name in self.names:
            self._parameter(name).grad = None

    # -- as ExpertStack does it on a CPU ------------------------------------------------------------------------------

    def _sum_dtype(self, x_TD: Tensor, work: Work, whole: bool) -> torch.dtype:
        """A sum that is made in one go is rounded once, whatever it is written in."""
        return x_TD.dtype if whole else super()._sum_dtype(x_TD, work, whole)

    def _rows(self, x_TD: Tensor, work: Work) -> Tensor:
        return gather_rows(x_TD, work.token_P)

    def _add_outputs(self, y_TD: Tensor, work: Work, out_PD: Tensor) -> None:
        add_sums(y_TD, out_PD, work.token_P, work.by_token, None if self.is_fused else work.weight_P)

    def _add_rows(self, into_TD: Tensor, work: Work, rows_PD: Tensor) -> None:
        add_sums(into_TD, rows_PD, work.token_P, work.by_token)

    @torch.no_grad()
    def _compute(self, x_TD: Tensor, work: Work, weights: Weights, *, keep: bool) -> tuple[Activations | None, Tensor]:
        """Where it is fused, outputs and `act_PI` have the gate weight in them."""
        if not self.is_fused:
            return super()._compute(x_TD, work, weights, keep=keep)
        rows_PD = self._rows(x_TD, work)
        pre_PH, act_PI, out_PD = self.compute_rows(rows_PD, work, weights)
        return Activations(work, rows_PD, pre_PH, act_PI) if keep else None, out_PD

    def compute_rows(self, rows_PD: Tensor, work: Work, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """Rows sorted by expert -> input of the gating function [P, H], its weighted output [P, I], weighted outputs
        [P, D]. Where it is fused."""
        counts_E = self._padded(work.counts_E, self._length(weights))
        pre_PH = self._project(weights, self._in, rows_PD, counts_E)
        act_PI = gated(pre_PH, work.weight_P)
        return pre_PH, act_PI, self._project(weights, self._out, act_PI, counts_E)

    @torch.no_grad()
    def _differentiate(
        self, saved: Activations, weights: Weights, grad_y_TD: Tensor, grad_x_TD: Tensor
    ) -> tuple[Tensor, WeightGradients]:
        if not self.is_fused:
            return super()._differentiate(saved, weights, grad_y_TD, grad_x_TD)
        work = saved.work
        counts_E = self._padded(work.counts_E, self._length(weights))
        # y = (w * act) @ W: the gradient of W is (w * act)^T @ grad_y, that of w <grad_y @ W^T, act>.
        grad_rows_PD = self._rows(grad_y_TD, work)
        unweighted_PI = self._project_back(weights, self._out, grad_rows_PD, counts_E)
        grad_weight_P = gated_backward_(saved.pre_PH, unweighted_PI, work.weight_P)
        grad_pre_PH = saved.pre_PH  # in its place
        self._add_rows(grad_x_TD, work, self._project_back(weights, self._in, grad_pre_PH, counts_E))
        return grad_weight_P, WeightGradients(saved, grad_pre_PH, grad_rows_PD)

    def _accumulate_matrix(self, name: str, rows_PM: Tensor, grad_PN: Tensor, counts_E: Sequence[int]) -> None:
        parameter = self._parameter(name)
        if rows_PM.device.type != "cuda" or parameter.grad is not None:
            super()._accumulate_matrix(name, rows_PM, grad_PN, counts_E)
            return
        left, right = (rows_PM, grad_PN) if self._transposed else (grad_PN, rows_PM)
        parameter.grad = grouped_outer(left, right, counts_E).contiguous()
