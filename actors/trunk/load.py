"""A trunk ready to run: loaded from a directory, or drawn from a seed."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.errors import CheckpointError
from actors.trunk.checkpoint import CheckpointReader
from actors.trunk.init import initialise_trunk
from actors.trunk.model import ModelSource, Skeleton, empty_trunk, second_view
from actors.trunk.model import skeleton as describe


def load_trunk(source: ModelSource, skeleton: Skeleton, device: str = "cpu") -> PreTrainedModel:
    """The trunk on `device`, in train mode. Memory: the trunk and one tensor.

    Of a model that has grown, the gates are zero until they are restored: its directory has those of before.
    """
    if source.num_experts is not None:
        before = replace(source, num_experts=None)
        small = load_trunk(before, describe(before), device)
        return second_view(source, small, blanks(skeleton, small)).train()
    trunk = empty_trunk(source)
    _allocate(trunk, torch.device(device), skeleton.dtype)
    if source.path is not None:
        load_weights(trunk, CheckpointReader(source.path, skeleton))
    initialise_trunk(trunk, source.seed)
    trunk.tie_weights()
    return trunk.train()


def blanks(skeleton: Skeleton, trunk: PreTrainedModel) -> dict[str, Tensor]:
    """Zeros for every tensor of the trunk that has another shape in this skeleton, on its device."""
    wanted = skeleton.model.state_dict()
    return {
        name: torch.zeros(wanted[name].shape, dtype=tensor.dtype, device=tensor.device)
        for name, tensor in trunk.state_dict().items()
        if tensor.shape != wanted[name].shape
    }


def load_weights(trunk: PreTrainedModel, reader: CheckpointReader) -> None:
    """Copies a directory's trunk into this one, in place, and marks what was loaded."""
    own = trunk.state_dict(keep_vars=True)
    for name, tensor in reader.trunk_tensors():
        target = own.get(name)
        if target is None:
            continue  # e.g. layers that transformers leaves out of the model (multi-token prediction)
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, the model wants {tuple(target.shape)}",
                field="model.path",
                value=str(reader.directory),
            )
        with torch.no_grad():
            target.copy_(tensor)
        target._is_hf_initialized = True


def _allocate(trunk: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every meta tensor real memory; modules that the family keeps in float32 stay so."""
    keep = list(trunk._get_dtype_plan(dtype))
    in_fp32 = re.compile("|".join(keep)) if keep else None
    tied = set(getattr(trunk, "all_tied_weights_keys", {}) or {})
    for module_name, module in trunk.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{module_name}.{name}"
                new = nn.Parameter(torch.empty_like(parameter, device=device, dtype=_dtype(full, parameter, in_fp32)))
                new._is_hf_initialized = full in tied  # type: ignore[attr-defined]
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                full = f"{module_name}.{name}"
                module._buffers[name] = torch.zeros_like(buffer, device=device, dtype=_dtype(full, buffer, in_fp32))


def _dtype(name: str, tensor: torch.Tensor, in_fp32: re.Pattern[str] | None) -> torch.dtype:
    return torch.float32 if in_fp32 is not None and in_fp32.search(name) else tensor.dtype
