"""Rules that keep experts evenly used: losses on the gate, the bias without a loss, and measures of the load.

All losses are functions of one layer's gate probabilities (gradients) and choices (no gradients), lower for a more even
load, and unscaled; `balance_loss` applies the coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actors.moe.gating import GateContext, GateOutput
from actors.moe.settings import BalanceSettings


def balance_loss(settings: BalanceSettings, output: GateOutput, context: GateContext) -> Tensor:
    """Sum of the losses times their coefficients, a scalar; 0 without tokens or coefficients."""
    scores_TE, ids_TK = output.scores_TE, output.ids_TK
    loss = scores_TE.new_zeros(())
    if not scores_TE.shape[0]:
        return loss
    if settings.entropy:
        loss = loss + settings.entropy * entropy_loss(scores_TE)
    if settings.frequency:
        loss = loss + settings.frequency * frequency_loss(scores_TE, ids_TK, scores_TE.shape[1])
    if settings.sequence:
        loss = loss + settings.sequence * sequence_loss(scores_TE, ids_TK, context.sequence_length)
    return loss


def entropy_loss(scores_TE: Tensor) -> Tensor:
    """KL(p, uniform) = sum_i p_i log(p_i E), p the mean gate probabilities of [T, E]. At least 0, and 0 if p is even.

    S11 prints sum_i p_i log q_i with the realised share q. With q free that rewards imbalance, so q = p here; that is
    the negative entropy, and log E is added to put the optimum at 0. Gradients are those of the negative entropy.
    """
    mean_E = scores_TE.mean(dim=0)
    smallest = torch.finfo(mean_E.dtype).tiny  # p log p is 0 at p = 0, and its gradient must stay finite there
    return (mean_E * (mean_E.clamp_min(smallest) * mean_E.shape[0]).log()).sum()


def frequency_loss(scores_TE: Tensor, ids_TK: Tensor, num_experts: int) -> Tensor:
    """sum_i (f_i / mu - 1) (P_i / mu - 1): f_i share of the pairs that expert i got, mu = 1 / E, P_i mean probability.

    S12 prints sum_i (f_i / mu - 1)^2, and f has no gradient. As in GShard (2006.16668, 2.2) one f of the square is
    replaced by its differentiable stand-in P. Both sum to 1, so this is E * (E * sum_i f_i P_i - 1), E times the loss
    of Switch (2101.03961, eq. 4) but for the constant; it equals the printed form where P = f, and may fall below 0.
    """
    frequency_E = _shares(ids_TK.reshape(1, -1), num_experts, scores_TE.dtype)[0]
    return ((num_experts * frequency_E - 1) * (num_experts * scores_TE.mean(dim=0) - 1)).sum()


def sequence_loss(scores_TE: Tensor, ids_TK: Tensor, sequence_length: int) -> Tensor:
    """Mean over sequences of sum_i f_i P_i, DeepSeek-V3 (2412.19437, eq. 17 to 20); 1 for an even load.

    f_i = E / (K S) * times the sequence's S tokens chose expert i, P_i = mean over them of the normalised score.
    Choices are those made (with the bias, group limits and unused places: K S is then the number of places in use),
    where the paper counts the K best scores.
    """
    num_experts = scores_TE.shape[1]
    num_sequences = scores_TE.shape[0] // sequence_length
    share_BE = _shares(ids_TK.reshape(num_sequences, -1), num_experts, scores_TE.dtype)
    mean_BE = scores_TE.view(num_sequences, sequence_length, num_experts).mean(dim=1)
    return (num_experts * share_BE * mean_BE).sum(dim=1).mean()


def expert_load(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Pairs each expert got, int64 [E]; unused places (-1) do not count. No wait for the device."""
    return _counts(ids_TK.reshape(1, -1), num_experts)[0]


def _counts(ids_BN: Tensor, num_experts: int) -> Tensor:
    place_BN = torch.where(ids_BN < 0, num_experts, ids_BN)  # unused places fall into a column that is cut off
    counts = torch.zeros(ids_BN.shape[0], num_experts + 1, dtype=torch.int64, device=ids_BN.device)
    return counts.scatter_add_(1, place_BN, torch.ones_like(place_BN))[:, :num_experts]


def _shares(ids_BN: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    counts_BE = _counts(ids_BN, num_experts).to(dtype)
    return counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp_min(1)


def bias_update(bias_E: Tensor, load_E: Tensor, speed: float) -> Tensor:
    """bias + speed * sign(mean load - load), a new tensor without gradient (S13; 2408.15664, DeepSeek-V3 2.1.2).

    `load_E` counts the pairs of the whole step, over all routers.
    """
    load_E = load_E.detach().to(bias_E.dtype)
    return bias_E.detach() + speed * torch.sign(load_E.mean() - load_E)
