"""What an expert of a family computes between its two products, as plain data.

transformers has it as functions of the family's experts module. Most families differ there by a few values only, and
whoever has the module tells them: an expert actor then computes the same without importing transformers, which takes
longer than all else it does to start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Gating = Literal["none", "halves", "clamped"]
"""none: the activation alone. halves: activation(first half) * second half. clamped: gpt-oss's, whose gate and linear
part alternate: (linear + 1) * gate * sigmoid(alpha * gate), both clamped at `limit`."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class ExpertForm:
    """Stands for the family's experts module wherever an `ExpertStack` takes one as its template."""

    is_transposed: bool
    gating: Gating
    activation: str = "silu"
    """A name in `ACTIVATIONS`; of no account where the gating is `clamped`."""
    alpha: float = 0.0
    limit: float = 0.0

    @property
    def has_gate(self) -> bool:
        return self.gating != "none"

    def act_fn(self, pre_PI: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](pre_PI)

    def _apply_gate(self, pre_PH: Tensor) -> Tensor:
        """[P, H] -> [P, H / 2]; the same operations in the same order as the families', so that bits are the same."""
        if self.gating == "halves":
            gate_PI, up_PI = pre_PH.chunk(2, dim=-1)
            return self.act_fn(gate_PI) * up_PI
        gate_PI, up_PI = pre_PH[..., ::2], pre_PH[..., 1::2]
        gate_PI = gate_PI.clamp(min=None, max=self.limit)
        up_PI = up_PI.clamp(min=-self.limit, max=self.limit)
        return (up_PI + 1) * (gate_PI * torch.sigmoid(gate_PI * self.alpha))


@torch.no_grad()
def form_of(template: Any, dtype: torch.dtype) -> ExpertForm | None:
    """Of a family's experts module, by trying: numbers small and large, where a family that clamps or rounds somewhere
    else would give other bits. None if it is none of those known here: then it takes the family's own code."""
    size = torch.logspace(-4, 4, 257, dtype=torch.float64)
    tried = torch.cat((size, -size))
    pre_PH = torch.stack((tried, tried.flip(0), tried.roll(91), -tried.roll(190)), dim=1).to(dtype)
    wanted = template._apply_gate(pre_PH) if template.has_gate else template.act_fn(pre_PH)
    for form in _candidates(template):
        found = form._apply_gate(pre_PH) if form.has_gate else form.act_fn(pre_PH)
        if found.dtype == wanted.dtype and torch.equal(found, wanted):
            return form
    return None


def _candidates(template: Any) -> Iterator[ExpertForm]:
    is_transposed = bool(template.is_transposed)
    for activation in ACTIVATIONS:
        yield ExpertForm(is_transposed, "halves" if template.has_gate else "none", activation)
    alpha, limit = getattr(template, "alpha", None), getattr(template, "limit", None)
    if template.has_gate and isinstance(alpha, int | float) and isinstance(limit, int | float):
        yield ExpertForm(is_transposed, "clamped", alpha=float(alpha), limit=float(limit))
