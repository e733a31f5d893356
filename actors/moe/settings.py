"""Gates and balance rules as values: what a config file says about them, checked. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NoReturn

from actors.errors import InvalidInput

SCORES = ("softmax", "sigmoid")
MODEL_GATE = "model"
KINDS: Mapping[str, tuple[str, bool]] = {
    MODEL_GATE: ("softmax", True),
    "top_k": ("softmax", True),
    "deepseek_moe": ("softmax", False),
    "deepseek": ("sigmoid", True),
    "node_limited": ("sigmoid", True),
    "two_level": ("softmax", False),
}
"""Kind -> its score function and whether it renormalises, unless the settings say otherwise."""


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


@dataclass(frozen=True)
class GateSettings:
    """A kind brings its paper's score function and renormalisation; everything else is off by default.

    Kinds (how experts are chosen):
    `model`         the model's own gate, as its family computes it; no other option applies
    `top_k`         the K best of all (S5): Mixtral, Qwen3-MoE
    `deepseek_moe`  the K best of all, weights not renormalised (S7): DeepSeekMoE, arXiv 2401.06066
    `deepseek`      the K best of the best groups: DeepSeek-V3, arXiv 2412.19437 (with softmax scores DeepSeek-V2)
    `node_limited`  the K best on the best nodes (S15): DeepSeek-V3, section 2.1.2
    `two_level`     groups by a projection of their own, then experts inside them (S6)
    """

    kind: str = MODEL_GATE
    score: str | None = None
    """`softmax` or `sigmoid`; None: the kind's own."""
    renormalise: bool | None = None
    """Divide the weights by their sum over the chosen; None: as the kind does."""
    routed_scaling_factor: float = 1.0
    """Multiplies the weights at last."""
    temperature: float = 1.0
    """tau of S2, at step 0. The articles use 0.7 throughout, or 1.0 with a decay of 0.95."""
    temperature_decay: float = 1.0
    """tau is multiplied by it every `temperature_decay_steps` steps."""
    temperature_decay_steps: int = 1000
    temperature_floor: float = 0.1
    """tau decays no further."""
    noise_std: float = 0.0
    """Above 0: learned noise in training (S3), whose logits start with this spread for inputs of unit variance."""
    attention: bool = False
    """The gate sees the token in its context (S4)."""
    attention_width: int = 32
    attention_heads: int = 1
    num_groups: int = 1
    """Contiguous equal parts of the experts, for `deepseek` and `two_level`."""
    groups_per_token: int = 1
    num_nodes: int = 1
    """For `node_limited`: experts lie in contiguous equal parts, one a node."""
    nodes_per_token: int = 4
    """M of S15; where there are fewer nodes, a token may visit all."""
    mass: float | None = None
    """S9: a token takes the fewest experts whose probabilities sum to more than this, K at most. None: always K."""
    expert_dropout: float = 0.0
    """S10 (articles: 0.1): probability that a chosen expert is dropped in training; a token's best one never is."""

    def __post_init__(self) -> None:
        self._check_choice()
        if self.kind == MODEL_GATE:
            self._check_untouched()
        self._check_temperature()
        if not _positive(self.routed_scaling_factor):
            self._refuse("routed_scaling_factor", "must be above 0")
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            self._refuse("noise_std", "must be at least 0", "0 switches the noise off")
        for name in ("mass", "expert_dropout"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                self._refuse(name, "must be at least 0 and below 1")
        for name in ("attention_width", "attention_heads", "num_groups", "num_nodes", "nodes_per_token"):
            if getattr(self, name) < 1:
                self._refuse(name, "must be at least 1")
        if self.attention_width % self.attention_heads:
            self._refuse("attention_heads", f"must divide the attention width, {self.attention_width}")
        if not 1 <= self.groups_per_token <= self.num_groups:
            self._refuse("groups_per_token", f"must be 1 to the number of groups, {self.num_groups}")

    def _check_choice(self) -> None:
        if self.kind not in KINDS:
            self._refuse("kind", "no such gate", f"one of {', '.join(KINDS)}")
        if self.score is not None and self.score not in SCORES:
            self._refuse("score", "no such score function", f"one of {', '.join(SCORES)}")
        if self.num_groups != 1 and self.kind not in ("deepseek", "two_level"):
            self._refuse("num_groups", f"has no meaning for {self.kind}", "use deepseek or two_level")
        if self.num_nodes != 1 and self.kind != "node_limited":
            self._refuse("num_nodes", f"has no meaning for {self.kind}", "use node_limited")
        if self.kind == "two_level":
            if self.score == "sigmoid":
                self._refuse("score", "p(group) * p(expert | group) needs softmax scores")
            if self.renormalise and self.groups_per_token == 1:
                self._refuse(
                    "renormalise", "cancels p(group), which would learn nothing", "leave it out, or more groups"
                )

    def _check_untouched(self) -> None:
        for field in fields(self):
            if field.name != "kind" and getattr(self, field.name) != field.default:
                self._refuse(field.name, "does not apply to the model's own gate", "name a gate.kind")

    def _check_temperature(self) -> None:
        for name in ("temperature", "temperature_floor"):
            if not _positive(getattr(self, name)):
                self._refuse(name, "must be above 0")
        if not 0 < self.temperature_decay <= 1:
            self._refuse("temperature_decay", "must be above 0 and at most 1", "1 keeps the temperature")
        if self.temperature_decay_steps < 1:
            self._refuse("temperature_decay_steps", "must be at least 1")
        if self.temperature_decay < 1 and self.temperature_floor > self.temperature:
            self._refuse("temperature_floor", f"is above the temperature, {self.temperature}")

    def check_model(self, num_experts: int, top_k: int) -> None:
        """Raises `InvalidInput` unless the gate fits a model of that many experts, and experts a token."""
        if not 1 <= top_k <= num_experts:
            raise InvalidInput(f"must be 1 to the number of experts, {num_experts}", field="gate.top_k", value=top_k)
        for name, what in (("num_groups", "groups"), ("num_nodes", "nodes")):
            if num_experts % getattr(self, name):
                self._refuse(name, f"{num_experts} experts do not divide into equal {what}")
        parts, visited = self.parts
        if top_k > (held := visited * num_experts // parts):
            name = "nodes_per_token" if self.kind == "node_limited" else "groups_per_token"
            self._refuse(name, f"hold {held} experts, fewer than the {top_k} of a token", "allow more, or lower top_k")

    @property
    def parts(self) -> tuple[int, int]:
        """(parts the experts are in, parts a token may visit): groups or nodes."""
        if self.kind == "node_limited":
            return self.num_nodes, min(self.nodes_per_token, self.num_nodes)
        return self.num_groups, self.groups_per_token

    @property
    def uses_sigmoid(self) -> bool:
        return (self.score or KINDS[self.kind][0]) == "sigmoid"

    @property
    def renormalises(self) -> bool:
        return KINDS[self.kind][1] if self.renormalise is None else self.renormalise

    def temperature_at(self, step: int) -> float:
        """tau(step) = max(floor, tau * decay^(step // decay_steps)); without decay tau itself."""
        if self.temperature_decay == 1:
            return self.temperature
        tau = self.temperature * self.temperature_decay ** (step // self.temperature_decay_steps)
        return max(self.temperature_floor, tau)

    def _refuse(self, name: str, message: str, remedy: str = "") -> NoReturn:
        raise InvalidInput(message, field=f"gate.{name}", value=getattr(self, name), remedy=remedy)


@dataclass(frozen=True)
class BalanceSettings:
    """Coefficients; 0 leaves a rule out, and any combination is allowed. The articles' values are in brackets."""

    entropy: float = 0.0
    """lambda of S11 [0.01]."""
    frequency: float = 0.0
    """alpha of S12 [0.01]."""
    sequence: float = 0.0
    """alpha of S14 [0.0001]."""
    bias_speed: float = 0.0
    """gamma of S13 [0.001]: what a bias moves by a step."""
    bias_share: float = 0.966
    """Share of the training after which gamma is 0: DeepSeek-V3 stops after 14.3 of 14.8 T tokens (2412.19437, 4.2)."""

    @property
    def has_loss(self) -> bool:
        return bool(self.entropy or self.frequency or self.sequence)

    def bias_speed_at(self, step: int, total_steps: int) -> float:
        """gamma of the update after step `step` (from 1) of `total_steps`: constant for their `bias_share`, then 0."""
        return self.bias_speed if step <= self.bias_share * total_steps else 0.0
