"""A live model back to a Hugging Face directory: the trunk in one shard, each MoE layer's experts in one of their own.

Memory beyond the model: one layer's experts. The directory is written beside its final place and renamed into it, so
that a reader finds a whole model or none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.errors import MoeClusterError
from actors.router.links import Links
from actors.trunk.checkpoint import to_disk_names, write_index, write_shard
from actors.trunk.model import Skeleton

TOKENIZER_PREFIXES = ("tokenizer", "special_tokens", "vocab", "merges", "spiece", "added_tokens", "chat_template")


def export_model(
    directory: Path,
    trunk: PreTrainedModel,
    skeleton: Skeleton,
    links: Links,
    save_gates: Callable[[Path], None],
    *,
    tokenizer_from: str | None = None,
    timeout_s: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Writes the model as it is now; the caller keeps updates out. Returns the file names."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(partial, trunk, skeleton, links, timeout_s, progress)
        save_gates(partial)
        if tokenizer_from is not None:
            _copy_tokenizer(Path(tokenizer_from), partial)
        _replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(file.name for file in directory.iterdir())


def _write(
    directory: Path,
    trunk: PreTrainedModel,
    skeleton: Skeleton,
    links: Links,
    timeout_s: float,
    progress: Callable[[int, int], None],
) -> None:
    skeleton.config.architectures = [type(trunk).__name__]
    skeleton.config.dtype = skeleton.dtype
    skeleton.config.save_pretrained(directory)
    if trunk.generation_config is not None:
        trunk.generation_config.save_pretrained(directory)
    total = len(skeleton.layers) + 1
    shards: dict[str, list[str]] = {}
    size = 0
    for number in range(total):
        tensors = _trunk_tensors(trunk) if number == 0 else _layer_tensors(number - 1, skeleton, links, timeout_s)
        on_disk = to_disk_names(skeleton.model, tensors)
        name = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
        write_shard(directory / name, on_disk)
        shards[name] = list(on_disk)
        size += sum(t.numel() * t.element_size() for t in on_disk.values())
        progress(number + 1, total)
    write_index(directory, shards, size)


def _trunk_tensors(trunk: PreTrainedModel) -> dict[str, Tensor]:
    tied = set(getattr(trunk, "all_tied_weights_keys", {}) or {})
    return {name: t.detach().cpu() for name, t in trunk.state_dict().items() if name not in tied}


def _layer_tensors(layer: int, skeleton: Skeleton, links: Links, timeout_s: float) -> dict[str, Tensor]:
    """All experts of one layer, stacked in expert order under their names in memory."""
    description = skeleton.layers[layer]
    stacked = {
        name: torch.empty(skeleton.num_experts, *shape, dtype=skeleton.dtype)
        for name, shape in description.shapes().items()
    }
    missing = set(range(skeleton.num_experts))
    for answer in links.ask_all("export_layer", {"layer": layer}, timeout_s).values():
        fields: Any = answer.fields
        missing -= set(fields["experts"])
        for name, tensor in zip(fields["names"], answer.tensors, strict=True):
            stacked[name][fields["experts"]] = tensor.cpu()
    if missing:
        raise MoeClusterError(f"experts {sorted(missing)} have no owner at the moment; try again")
    return {f"{description.name}.{name}": tensor for name, tensor in stacked.items()}


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and file.name.startswith(TOKENIZER_PREFIXES):
            shutil.copyfile(file, target / file.name)


def _replace(partial: Path, directory: Path) -> None:
    """Renames into place. An older export is replaced; anything else there is left alone."""
    if directory.exists():
        if not (directory / "config.json").is_file() and any(directory.iterdir()):
            raise MoeClusterError(f"{directory} holds something that is not a model; nothing was written")
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(directory, old)
        os.rename(partial, directory)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(partial, directory)
    parent = os.open(directory.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
