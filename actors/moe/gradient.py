"""`torch.autograd.grad` of one tensor, without what its first call imports.

Given the gradient of an output it compares shapes by torch's symbolic ones, which need sympy: 0.4 s of CPU time, in the
first step of every expert actor that is new, while all others wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Given(torch.autograd.Function):
    """A number whose gradient by `output` is `grad`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad: Tensor = ctx.grad
        return grad, None


def gradient_of(output: Tensor, input: Tensor, grad: Tensor) -> Tensor:
    """Gradient by `input`, which `output` was computed from, where that by `output` is `grad`, of the same shape."""
    assert grad.shape == output.shape
    with torch.enable_grad():
        number = _Given.apply(output, grad)
    (result,) = torch.autograd.grad(number, input)
    return result
