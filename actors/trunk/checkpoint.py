"""Reading and writing Hugging Face model directories, one part at a time.

Names and layouts on disk differ from those in memory (transformers 5 fuses `experts.7.gate_proj` into one stacked
`gate_up_proj`); the rules are transformers' own conversion mappings, applied here to just the experts that are wanted.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from actors.errors import CheckpointError
from actors.trunk.model import Skeleton

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class CheckpointReader:
    """Tensors of a model directory by their names in memory; reads nothing but what is asked for."""

    def __init__(self, directory: str | Path, skeleton: Skeleton) -> None:
        self.directory = Path(directory)
        self._file_of = _weight_map(self.directory)
        self._skeleton = skeleton
        mapping = get_model_conversion_mapping(skeleton.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
        meta = skeleton.model.state_dict()
        self._sources: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for key in sorted(self._file_of, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, skeleton.model.base_model_prefix, meta)
            if target not in meta and key in meta:
                target, pattern = key, None
            self._sources[target].append((key, pattern))
        self._check_complete(set(meta))

    def _check_complete(self, wanted: set[str]) -> None:
        # A converter with several targets is filed under its first; its others need no file entry of their own.
        made = {
            name.replace(c.target_patterns[0], other)
            for name, sources in self._sources.items()
            for c in [self._converter_of.get(sources[0][1] or "")]
            if c is not None
            for other in c.target_patterns
        }
        tied = set(getattr(self._skeleton.model, "all_tied_weights_keys", {}) or {})
        missing = sorted(wanted - set(self._sources) - made - tied)
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors of the model are not in the checkpoint, the first is {missing[0]}",
                field="model.path",
                value=str(self.directory),
                remedy="the directory is incomplete or belongs to another architecture",
            )

    def expert_tensors(self, layer_name: str, experts: Sequence[int]) -> dict[str, Tensor]:
        """Stacked parameters of the given experts of one layer: name -> [len(experts), ...]."""
        prefix = f"{layer_name}."
        found: dict[str, Tensor] = {}
        for target in [t for t in self._sources if t.startswith(prefix)]:
            for name, tensor in self._convert(target, experts).items():
                found[name.removeprefix(prefix)] = tensor.to(self._skeleton.dtype)
        return found

    def trunk_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything that is not a stacked expert parameter."""
        layers = tuple(f"{layer.name}." for layer in self._skeleton.layers)
        for target in self._sources:
            if not target.startswith(layers):
                yield from self._convert(target, None).items()

    def _convert(self, target: str, experts: Sequence[int] | None) -> dict[str, Tensor]:
        sources = self._sources[target]
        pattern = sources[0][1]
        if pattern is None:
            return {target: self._read(sources[-1][0], experts)}
        converter = copy.deepcopy(self._converter_of[pattern])
        for key, source_pattern in sources:
            assert source_pattern is not None
            if experts is None or (index := _expert_index(key, source_pattern)) is None:
                converter.add_tensor(target, key, source_pattern, self._read(key, experts))
            elif index in experts:
                converter.add_tensor(target, key, source_pattern, self._read(key, None))
        if experts is not None:
            self._check_experts(converter, target, sources, experts)
            _reorder(converter, sources, experts)
        converted = converter.convert(target, model=self._skeleton.model, config=self._skeleton.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in converted.items()}

    def _check_experts(
        self, converter: WeightConverter, target: str, sources: list[tuple[str, str | None]], experts: Sequence[int]
    ) -> None:
        for pattern, tensors in converter.collected_tensors.items():
            if _expert_index(next(k for k, p in sources if p == pattern), pattern) is not None:
                have = {_expert_index(k, pattern) for k, p in sources if p == pattern}
                missing = sorted(set(experts) - have)
                if missing or len(tensors) != len(experts):
                    name = pattern.replace("*", str(missing[0] if missing else "?"))
                    raise CheckpointError(
                        f"expert tensors are missing: {name} of {target}",
                        field="model.path",
                        value=str(self.directory),
                        remedy="the directory is incomplete; copy it again",
                    )

    def _read(self, key: str, experts: Sequence[int] | None) -> Tensor:
        with safe_open(self.directory / self._file_of[key], framework="pt") as file:
            if experts is None:
                whole: Tensor = file.get_tensor(key)
                return whole
            part = file.get_slice(key)
            count = part.get_shape()[0]
            if max(experts, default=-1) >= count:
                raise CheckpointError(
                    f"{key} holds {count} experts, expert {max(experts)} is wanted",
                    field="model.path",
                    value=str(self.directory),
                )
            return torch.cat([part[start:end] for start, end in _runs(experts)])


def _reorder(converter: WeightConverter, sources: list[tuple[str, str | None]], experts: Sequence[int]) -> None:
    """Collected tensors came in file order; a stack is in the order of `experts`."""
    for pattern, tensors in converter.collected_tensors.items():
        indices = [_expert_index(k, pattern) for k, p in sources if p == pattern]
        if None in indices:
            continue
        by_expert = dict(zip([i for i in indices if i in set(experts)], tensors, strict=True))
        converter.collected_tensors[pattern] = [by_expert[e] for e in experts]


def _expert_index(key: str, pattern: str) -> int | None:
    if "*" not in pattern:
        return None
    match = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
    return int(match.group(1)) if match else None


def _runs(experts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[4, 5, 6, 9] -> (4, 7), (9, 10): each run is one read."""
    start = end = None
    for expert in experts:
        if expert == end:
            end = expert + 1
            continue
        if start is not None and end is not None:
            yield start, end
        start, end = expert, expert + 1
    if start is not None and end is not None:
        yield start, end


def _weight_map(directory: Path) -> dict[str, str]:
    index = directory / INDEX_NAME
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        lost = sorted({f for f in files.values() if not (directory / f).is_file()})
        if lost:
            raise CheckpointError(
                f"{len(lost)} weight files are missing, the first is {lost[0]}",
                field="model.path",
                value=str(directory),
                remedy="the directory is incomplete; copy it again",
            )
        return files
    if not (directory / SINGLE_NAME).is_file():
        raise CheckpointError(
            f"neither {INDEX_NAME} nor {SINGLE_NAME} is there",
            field="model.path",
            value=str(directory),
            remedy="convert the weights to safetensors; pickled weights are not read",
        )
    with safe_open(directory / SINGLE_NAME, framework="pt") as file:
        return dict.fromkeys(file.keys(), SINGLE_NAME)


def to_disk_names(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and layouts in memory -> those of the family's checkpoints. Takes any subset, e.g. one layer's experts.

    A stacked tensor of n experts becomes experts 0..n-1; `renumber` then gives them their own numbers.
    """
    converted = revert_weight_conversion(model, dict(tensors))
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Writes one safetensors file durably (synced, then renamed into place). Returns its size in bytes."""
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata={"format": "pt"})
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path.stat().st_size


def write_index(directory: Path, shards: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """`shards`: file name -> tensor names in it."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    body: dict[str, Any] = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(body, indent=2) + "\n")
