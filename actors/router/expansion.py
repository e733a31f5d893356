"""A router's growth: plans that need no weights, and the next trunk, tried with tokens before anything is changed."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.router.growing import Blueprint, Grower, GrownTrunk, check_growth, seen_by_gates
from actors.router.state import State
from actors.values import Growth, Placement

_TRIED_TOKENS = 2048
"""That the gates of a growth are tried with."""


class Expansion:
    def __init__(self, state: State) -> None:
        self._state = state
        self._blueprint: Blueprint | None = None
        """Of the growth that was asked for last."""

    def prepare(self, growth: Growth, placement: Placement) -> Blueprint:
        """What needs no weights. From any thread. `InvalidInput` if the model or its gate cannot grow so."""
        learner = self._state.learner
        check_growth(growth, placement.num_experts, placement.group_size)
        blueprint = self._blueprint
        if blueprint is None or blueprint.skeleton.num_experts != growth.num_experts:
            blueprint = self._blueprint = learner.blueprint(growth.num_experts)
        return blueprint

    def make(self, growth: Growth, placement: Placement, sample: Tensor | None) -> GrownTrunk:
        """Between two steps; nothing is changed. `sample`: tokens [B, S] of the last step, if there was one."""
        blueprint = self.prepare(growth, placement)
        learner, serving = self._state.learner, self._state.serving
        ids_BS = self._tokens_to_try(sample, growth.seed).to(learner.device)
        with serving.reading(ids_BS.shape[1]), torch.no_grad(), seen_by_gates(learner.view) as inputs_LTD:
            learner.view(input_ids=ids_BS, use_cache=False)
        grower = Grower(growth, blueprint, learner.skeleton, learner.trunk, learner.routing, placement)
        try:
            return grower.make(inputs_LTD, ids_BS.shape[1])
        finally:
            self._state.connect()  # the gates were tried without experts

    def _tokens_to_try(self, sample: Tensor | None, seed: int) -> Tensor:
        """[B, S]: of the last step, or random ones before the first."""
        if sample is not None:
            return sample[: max(1, _TRIED_TOKENS // sample.shape[1])]
        serving = self._state.serving
        length = min(128, serving.max_positions)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, serving.vocab_size, (max(1, _TRIED_TOKENS // length), length), generator=generator)
