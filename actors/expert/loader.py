"""How an expert actor's holdings come to be: with the weights of a model, or as memory for what was saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from actors.expert.holdings import Holdings
from actors.expert.residency import Quarters, beside_a_cache
from actors.optim import OptimizerSettings
from actors.staleness import check_staleness
from actors.trunk.checkpoint import CheckpointReader
from actors.trunk.init import initial_experts
from actors.trunk.model import ModelSource


class HoldingsLoader:
    """Of one actor, whichever groups it holds."""

    def __init__(self, source: ModelSource, quarters: Quarters) -> None:
        self._source = source
        self.quarters = quarters
        self.is_own: Callable[[int], bool] = lambda group: True
        """Whether nobody else has to update a group alike, at the time of the call."""

    def check_settings(self, settings: OptimizerSettings) -> None:
        """`InvalidInput` for those that these holdings cannot be trained with."""
        if check_staleness(settings.staleness) and self.quarters.cache is not None:
            raise beside_a_cache()

    def load(self, groups: Sequence[int], path: str | None = None) -> Holdings:
        """As the model's directory has them, or as a seed gives them where there is none. `path`: another directory of
        the same architecture."""
        source = self._source if path is None else ModelSource(path=path, dtype=self._source.dtype)
        model, size = self.quarters.skeleton, self.quarters.group_size
        reader = CheckpointReader(source.path, model) if source.path and groups else None

        def load_layer(layer: int, groups: Sequence[int]) -> Mapping[str, Tensor]:
            if reader is None:
                return initial_experts(model, layer, groups, size, source.seed)
            experts = [g * size + i for g in groups for i in range(size)]
            return reader.expert_tensors(model.layers[layer].name, experts)

        return Holdings(self.quarters, groups, load_layer, self.is_own)

    def blank(self, groups: Sequence[int]) -> Holdings:
        """To be written to."""

        def zeros(layer: int, groups: Sequence[int]) -> Mapping[str, Tensor]:
            model, count = self.quarters.skeleton, len(groups) * self.quarters.group_size
            shapes = model.layers[layer].shapes()
            return {name: torch.zeros(count, *shape, dtype=model.dtype) for name, shape in shapes.items()}

        return Holdings(self.quarters, groups, zeros, self.is_own)
