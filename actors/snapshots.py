"""The state of one actor at one version, on its way to and from a checkpoint. How and where it is stored is not known
here: a snapshot is tensors by key in host memory, and what was saved is read by the same keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from actors.errors import CheckpointError
from actors.optim import OptimizerSettings

WEIGHT, FIRST, SECOND = KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""A parameter, and AdamW's moments of it."""


class ExpertKey(NamedTuple):
    """One tensor of one expert, so that actors with any groups can load it."""

    layer: int
    """Counts the MoE layers, from 0."""
    expert: int
    name: str
    kind: str


Key = TypeVar("Key", ExpertKey, str)


@dataclass(frozen=True)
class Snapshot(Generic[Key]):
    """In memory of its own, so that steps go on while it is written."""

    version: int
    run: int
    """Job whose moments these are."""
    updates: int
    """That the moments are made of. The trunk keeps this for each parameter, among its tensors."""
    optimizer: OptimizerSettings
    tensors: Mapping[Key, Tensor]


class Keeps(Protocol[Key]):
    """Who has the last snapshot, as long as nobody has taken it."""

    snapshot: Snapshot[Key] | None


def taken_over(place: Keeps[Key], version: int) -> Snapshot[Key] | None:
    """The last snapshot, which is the caller's from now on if it is of this version. Otherwise it stays where it is: a
    call that comes late, for a checkpoint that was given up, does not take it from the next one."""
    snapshot = place.snapshot
    if snapshot is not None and snapshot.version == version:
        place.snapshot = None
    return snapshot


@dataclass(frozen=True)
class SavedState(Generic[Key]):
    """What a snapshot was, read from storage piece by piece."""

    version: int
    updates: int
    optimizer: OptimizerSettings
    keys: frozenset[Key]
    read: Callable[[Sequence[Key]], Sequence[Tensor]]
    """Tensors on the CPU, in the order of the keys. `CheckpointError` for one that is not there or damaged."""


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, also of a tensor that is there already."""
    return tensor.detach().to("cpu", copy=True)


# -- the trunk's optimizer, by parameter name -------------------------------------------------------------------------

STEP = "step"


def moments(optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """`NAME.exp_avg`, `NAME.exp_avg_sq` and `NAME.step` of every parameter that was ever updated, copied."""
    return {
        f"{name}.{kind}": to_host(optimizer.state[parameter][kind])
        for name, parameter in parameters
        if parameter in optimizer.state
        for kind in (FIRST, SECOND, STEP)
    }


def set_moments(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]], found: Mapping[str, Tensor]
) -> None:
    """Counterpart of `moments`, for an optimizer that has none yet."""
    for name, parameter in parameters:
        if f"{name}.{STEP}" in found:
            # The fused step wants the count on the parameter's device.
            optimizer.state[parameter] = {
                kind: found[f"{name}.{kind}"].to(parameter.device, copy=True) for kind in (STEP, FIRST, SECOND)
            }


def copy_all(targets: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """`CheckpointError` that names the first tensor that only one side has, or has in another shape."""
    for name in sorted({*targets, *found}):
        if name not in found:
            raise CheckpointError("is not in the checkpoint", field=name)
        if name not in targets:
            raise CheckpointError("is in the checkpoint, and not in the model", field=name)
        if targets[name].shape != found[name].shape:
            raise CheckpointError(
                f"has shape {tuple(found[name].shape)}, the model wants {tuple(targets[name].shape)}", field=name
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(found[name])
