"""The model as the coordinator knows it: its facts, the version of its weights, and the load on its experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from actors.values import Placement
from cluster.backend import LoadReport
from cluster.config import BatchConfig
from cluster.control.load import LoadLE, LoadWindow


@dataclass(frozen=True)
class ModelFacts:
    """What status tells of the model, and what a job must fit into."""

    name: str
    num_parameters: int
    num_experts: int
    num_moe_layers: int
    top_k: int
    max_positions: int
    """Longest sequence, tokens."""
    vocab_size: int
    shared_share: float = 0.0
    """Parameters of shared experts, which every token visits, over all (S7: below 0.15)."""
    expert_bytes: int = 0
    """Weights of one expert in all MoE layers."""
    architecture: str = ""
    """Class of the model, e.g. `DeepseekV3ForCausalLM`."""


class ModelRecord:
    def __init__(self, facts: ModelFacts, window_steps: int) -> None:
        """`window_steps`: training steps over which expert load is summed."""
        self.facts = facts
        self.version = 0
        self.staleness = 0.0, 0
        """Mean and most, of the last step."""
        self._window_steps = window_steps
        self._other_counts: set[int] = set()
        """Numbers of experts that the model had, or may have before its growth is told here."""
        self.forget_load()

    @property
    def load_LE(self) -> tuple[tuple[int, ...], ...]:
        """Summed over the window; empty before the first step."""
        return self._loads.load_LE

    def load_report(self, placement: Placement, node_of: Mapping[str, str]) -> LoadReport:
        """Of the steps in the window. `node_of`: actor -> node."""
        return self._loads.report(self.version, placement, node_of)

    def forget_load(self) -> None:
        """The weights are others now."""
        facts = self.facts
        self._loads = LoadWindow(self._window_steps, facts.num_moe_layers, facts.num_experts)

    def step(self, batch: BatchConfig, metrics: Mapping[str, float], now: float, load_LE: LoadLE | None) -> None:
        """A step was committed. `InvalidInput`, and nothing has changed, if the load is not that of this model."""
        if load_LE is not None and not self._passed_a_growth(load_LE):
            tokens = batch.sequences * batch.sequence_length * batch.gradient_accumulation
            self._loads.add(load_LE, self.version + 1, now, tokens, batch.gradient_accumulation)
        self.version += 1
        self.staleness = float(metrics.get("staleness_mean", 0)), int(metrics.get("staleness_max", 0))

    def expect(self, num_experts: int) -> None:
        """The model may have so many before that is told here."""
        self._other_counts.add(num_experts)

    def resize(self, num_experts: int, num_parameters: int) -> None:
        self._other_counts.add(self.facts.num_experts)
        share = self.facts.shared_share * self.facts.num_parameters / num_parameters
        self.facts = dataclasses.replace(
            self.facts, num_experts=num_experts, num_parameters=num_parameters, shared_share=share
        )
        self.forget_load()

    def _passed_a_growth(self, load_LE: LoadLE) -> bool:
        """Whether a step's report and the news of a growth have overtaken each other: its load fits no window."""
        others = self._other_counts - {self.facts.num_experts}
        return bool(load_LE) and len(load_LE[0]) in others
