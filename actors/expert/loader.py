"""How an expert actor's holdings come to be: with the weights of a model, or as memory for what was saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actors.expert.holdings import Holdings, LoadLayer
from actors.expert.residency import Quarters, beside_a_cache
from actors.optim import OptimizerSettings
from actors.staleness import check_staleness
from actors.trunk.init import initial_experts
from actors.trunk.layout import Layout, ModelLayout
from actors.trunk.source import ModelSource

if TYPE_CHECKING:
    from actors.trunk.model import Skeleton


class Family:
    """The model as transformers has it: what weights are read by, and drawn where a layout does not say how. Imported
    when it is asked for, and not before: an actor whose groups come from others never does."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._found: Skeleton | None = None

    def __call__(self) -> Skeleton:
        from actors.trunk.model import skeleton

        if self._found is None:
            self._found = skeleton(self._source)
        return self._found


class HoldingsLoader:
    """Of one actor, whichever groups it holds."""

    def __init__(self, source: ModelSource, quarters: Quarters, family: Family) -> None:
        self._source = source
        self.quarters = quarters
        self._family = family
        self.is_own: Callable[[int], bool] = lambda group: True
        """Whether nobody else has to update a group alike, at the time of the call."""

    def check_settings(self, settings: OptimizerSettings) -> None:
        """`InvalidInput` for those that these holdings cannot be trained with."""
        if check_staleness(settings.staleness) and self.quarters.cache is not None:
            raise beside_a_cache()

    def fresh(self) -> Layout:
        """What fresh experts are drawn by: the layout, or transformers where that does not know."""
        layout = self.quarters.layout
        return layout if isinstance(layout, ModelLayout) and layout.knows_draws else self._family()

    def load(self, groups: Sequence[int], path: str | None = None) -> Holdings:
        """As the model's directory has them, or as a seed gives them where there is none. `path`: another directory of
        the same architecture."""
        source = self._source if path is None else ModelSource(path=path, dtype=self._source.dtype)
        return Holdings(self.quarters, groups, self._weights_of(source) if groups else self._zeros, self.is_own)

    def _weights_of(self, source: ModelSource) -> LoadLayer:
        return self._of_directory(source.path) if source.path else self._of_seed(source.seed)

    def _of_seed(self, seed: int) -> LoadLayer:
        def load_layer(layer: int, groups: Sequence[int]) -> Mapping[str, Tensor]:
            return initial_experts(self.fresh(), layer, groups, self.quarters.group_size, seed)

        return load_layer

    def _of_directory(self, path: str) -> LoadLayer:
        from actors.trunk.checkpoint import CheckpointReader

        model, size = self._family(), self.quarters.group_size
        reader = CheckpointReader(path, model)

        def load_layer(layer: int, groups: Sequence[int]) -> Mapping[str, Tensor]:
            experts = [g * size + i for g in groups for i in range(size)]
            return reader.expert_tensors(model.layers[layer].name, experts)

        return load_layer

    def blank(self, groups: Sequence[int]) -> Holdings:
        """To be written to."""
        return Holdings(self.quarters, groups, self._zeros, self.is_own)

    def _zeros(self, layer: int, groups: Sequence[int]) -> Mapping[str, Tensor]:
        layout, count = self.quarters.layout, len(groups) * self.quarters.group_size
        shapes = layout.layers[layer].shapes()
        return {name: torch.zeros(count, *shape, dtype=layout.dtype) for name, shape in shapes.items()}
