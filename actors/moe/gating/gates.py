"""The parts put together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.errors import NonFinite
from actors.moe.gating.choice import Choice, smallest_set, surviving
from actors.moe.gating.contract import Gate, GateContext, GateOutput
from actors.moe.gating.scores import ContextAttention, GroupScores, LearnedNoise, normalised
from actors.moe.settings import GateSettings


class ComposedGate(Gate):
    """Scores, choice, weights; a part that the settings leave out is None."""

    def __init__(
        self,
        settings: GateSettings,
        choice: Choice,
        *,
        attention: ContextAttention | None = None,
        noise: LearnedNoise | None = None,
        groups: GroupScores | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.choice = choice
        self.attention = attention
        self.noise = noise
        self.groups = groups

    def reset_parameters(self) -> None:
        """Draws the gate's own parameters from torch's global generator."""
        for part in (self.attention, self.noise, self.groups):
            if part is not None:
                part.reset_parameters()

    def forward(
        self, x_TD: Tensor, context: GateContext, weight_ED: Tensor, bias_E: Tensor | None = None
    ) -> GateOutput:
        assert x_TD.shape[0] % context.sequence_length == 0, "not whole sequences"
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):  # near-equal scores must not be decided by 16 bits
            scores_TE = self._scores(x_TD.to(wide), context, weight_ED.to(wide))
            return self._decide(scores_TE, context, bias_E)

    def _scores(self, x_TD: Tensor, context: GateContext, weight_ED: Tensor) -> Tensor:
        if self.attention is not None:
            x_TD = x_TD + self.attention(x_TD, context)
        logits_TE = F.linear(x_TD, weight_ED)
        if self.noise is not None and context.training:
            logits_TE = logits_TE + self.noise(x_TD, context)
        temperature = self.settings.temperature_at(context.step)
        logits_TE = logits_TE / temperature
        scores_TE: Tensor
        if self.groups is not None:
            scores_TE = self.groups(x_TD, logits_TE, temperature)
        else:
            scores_TE = logits_TE.sigmoid() if self.settings.uses_sigmoid else logits_TE.softmax(dim=1)
        # The sum of both: a sigmoid hides an infinite logit, and group scores are not seen in the logits.
        if not torch.isfinite(logits_TE.detach() + scores_TE.detach()).all():
            raise NonFinite(f"gate scores of layer {context.layer} are not finite", step=context.step)
        return scores_TE

    def _decide(self, scores_TE: Tensor, context: GateContext, bias_E: Tensor | None) -> GateOutput:
        settings = self.settings
        ranked_TE = scores_TE.detach()
        ids_TK = self.choice(ranked_TE if bias_E is None else ranked_TE + bias_E.detach().to(ranked_TE.dtype))
        probabilities_TE = normalised(scores_TE) if settings.uses_sigmoid else scores_TE
        weights_TK = scores_TE.gather(1, ids_TK)
        if settings.mass is not None:
            used_TK = smallest_set(probabilities_TE.detach().gather(1, ids_TK), settings.mass)
            ids_TK, weights_TK = _only(used_TK, ids_TK, weights_TK)
        if settings.renormalises:
            weights_TK = normalised(weights_TK)
        weights_TK = weights_TK * settings.routed_scaling_factor
        if settings.expert_dropout and context.training:
            whole_T1 = weights_TK.sum(dim=1, keepdim=True)
            kept_TK = surviving(ids_TK, settings.expert_dropout, context)
            ids_TK, weights_TK = _only(kept_TK, ids_TK, weights_TK)
            weights_TK = normalised(weights_TK) * whole_T1
        return GateOutput(ids_TK, weights_TK, probabilities_TE)


def _only(used_TK: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    return ids_TK.masked_fill(~used_TK, -1), weights_TK.masked_fill(~used_TK, 0.0)


def build_gate(settings: GateSettings, num_experts: int, top_k: int, width: int, dtype: torch.dtype) -> ComposedGate:
    """A gate for a layer of E = `num_experts`, K = `top_k`, D = `width`; `dtype` is that of its own parameters.

    Raises `InvalidInput` for settings that do not fit the model.
    """
    settings.check_model(num_experts, top_k)
    return ComposedGate(
        settings,
        _choice(settings, num_experts, top_k),
        attention=ContextAttention(width, settings.attention_width, settings.attention_heads, dtype)
        if settings.attention
        else None,
        noise=LearnedNoise(num_experts, width, settings.noise_std, dtype) if settings.noise_std else None,
        groups=GroupScores(settings.num_groups, width, dtype) if settings.kind == "two_level" else None,
    )


def _choice(settings: GateSettings, num_experts: int, top_k: int) -> Choice:
    parts, visited = settings.parts
    size = num_experts // parts
    if settings.kind == "two_level":
        scored_by = size
    elif settings.kind == "node_limited":
        scored_by = -(-top_k // visited)  # K / M, at least 1
    else:
        scored_by = 2 if settings.uses_sigmoid else 1  # DeepSeek-V3, DeepSeek-V2
    return Choice(top_k, parts, visited, min(scored_by, size))
