"""How an expert actor's holdings come to be: with the weights of a model, or as memory for what was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from actors.expert.holdings import Holdings, LoadLayer
from actors.expert.residency import beside_a_cache
from actors.moe.cache import CacheSettings
from actors.optim import OptimizerSettings
from actors.staleness import check_staleness
from actors.trunk.checkpoint import CheckpointReader
from actors.trunk.init import initial_experts
from actors.trunk.model import ModelSource, Skeleton, skeleton


class HoldingsLoader:
    """Of one actor: all that its holdings have in common, whichever groups they are of."""

    def __init__(
        self,
        source: ModelSource,
        group_size: int,
        device: torch.device,
        cache: CacheSettings | None = None,
        max_pairs: int = 0,
    ) -> None:
        self.skeleton: Skeleton = skeleton(source)
        self.group_size = group_size
        self.device = device
        self._source, self._cache, self._max_pairs = source, cache, max_pairs

    @property
    def has_cache(self) -> bool:
        """Whether weights are written in place, at home behind the device."""
        return self._cache is not None

    def check_settings(self, settings: OptimizerSettings) -> None:
        """`InvalidInput` for those that these holdings cannot be trained with."""
        if check_staleness(settings.staleness) and self.has_cache:
            raise beside_a_cache()

    def load(self, groups: Sequence[int], path: str | None = None) -> Holdings:
        """As the model's directory has them, or as a seed gives them where there is none. `path`: another directory of
        the same architecture."""
        source = self._source if path is None else ModelSource(path=path, dtype=self._source.dtype)
        reader = CheckpointReader(source.path, self.skeleton) if source.path and groups else None

        def load_layer(layer: int, groups: Sequence[int]) -> Mapping[str, Tensor]:
            if reader is None:
                return initial_experts(self.skeleton, layer, groups, self.group_size, source.seed)
            experts = [g * self.group_size + i for g in groups for i in range(self.group_size)]
            return reader.expert_tensors(self.skeleton.layers[layer].name, experts)

        return self._holdings(groups, load_layer)

    def blank(self, groups: Sequence[int]) -> Holdings:
        """To be written to."""

        def zeros(layer: int, groups: Sequence[int]) -> Mapping[str, Tensor]:
            count, shapes = len(groups) * self.group_size, self.skeleton.layers[layer].shapes()
            return {name: torch.zeros(count, *shape, dtype=self.skeleton.dtype) for name, shape in shapes.items()}

        return self._holdings(groups, zeros)

    def _holdings(self, groups: Sequence[int], load_layer: LoadLayer) -> Holdings:
        return Holdings(self.skeleton, self.group_size, self.device, groups, load_layer, self._cache, self._max_pairs)
