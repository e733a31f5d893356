"""The optimizer of every actor, stepped under the job's schedule. Trunk, experts and the reference share it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actors.errors import InvalidInput

Experts = Literal["adamw", "muon"]
Sparse = Literal["none", "exact", "skip"]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter 2019). `weight_decay` acts on matrices, not on norms and biases.

    What stands below `weight_decay` is about experts; the trunk is AdamW's, and every parameter of it is stepped.
    """

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    experts: Experts = "adamw"
    """`muon`: their matrices by Muon, with the same learning rate and decay; their biases by AdamW."""
    momentum: float = 0.95
    """Muon's."""
    sparse: Sparse = "none"
    """What becomes of an expert without a gradient, see `actors.moe.optimizer`."""
    delay_correction: float = 0.0
    """Strength of what is added to gradients of older weights, see `actors.moe.delay`."""
    staleness: int = 0
    """Steps that the experts' weights may be behind when a step is computed; 0: none, the trunk's never are."""

    def __post_init__(self) -> None:
        if self.experts == "muon" and self.sparse == "exact":
            raise InvalidInput(
                "under Muon a step without a gradient is as long and as dear as any other",
                field="optimizer.sparse",
                value=self.sparse,
                remedy="use skip, which leaves experts without tokens alone, or none",
            )
        if self.staleness and self.sparse == "exact":
            raise InvalidInput(
                "beside forwards nobody makes steps that were put off",
                field="optimizer.sparse",
                value=self.sparse,
                remedy="use skip or none, or optimizer.staleness 0",
            )

    def to_dict(self) -> dict[str, float | str]:
        return asdict(self)


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay acts on this parameter. A stacked expert bias has two dimensions and is still a bias."""
    return ndim >= 2 and "bias" not in name.rsplit(".", 1)[-1]


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings) -> torch.optim.AdamW:
    named = [(name, p) for name, p in parameters if p.requires_grad]
    if not named:
        raise InvalidInput("no parameter to train", field="optimizer")
    groups = [
        {"params": [p for n, p in named if decays(n, p.ndim)], "weight_decay": settings.weight_decay},
        {"params": [p for n, p in named if not decays(n, p.ndim)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def square_sum(parameters: Iterable[nn.Parameter]) -> float:
    """Sum of squares of all gradients, for the global norm."""
    return square_sum_of(parameter.grad for parameter in parameters if parameter.grad is not None)


def square_sum_of(gradients: Iterable[Tensor]) -> float:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(_wide(gradient.dtype), []).append(gradient)
    norms: list[Any] = [n for dtype, some in by_dtype.items() for n in torch._foreach_norm(some, 2, dtype)]
    if len(norms) > 1 and len({(norm.device, norm.dtype) for norm in norms}) == 1:
        norms = torch.stack(norms).tolist()  # one wait for the device, not one each
    total = 0.0
    for norm in norms:
        total += float(norm) ** 2
    return total


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def scale_gradients(parameters: Iterable[nn.Parameter], scale: float) -> None:
    if scale != 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
