"""More experts in a gate, such that what every token computes stays what it was at the moment of growth.

A token takes the K best experts. A copy with the same gate row would be chosen beside its original, in the place of the
token's second best: the mixture would jump. So new experts come in one of two ways:

**split** Copy c of expert i gets the row w_i + s * u_c, the original w_i + s * u_0, with the same u_0 ... u_(m-1) for
all experts. For a token x all originals move by s * u_0 x, all c-th copies by s * u_c x: inside a copy of the set no
order changes, and softmax weights know no common shift. With s large against the distances of a token's best scores,
its K experts all come from the set with the largest u_c x: the directions cut the tokens into m parts, each of which
goes on with experts of its own, from the first step on. Only tokens near a cut mix sets. It needs no bias, so every
softmax gate can do it, renormalised or not; experts must become m times as many, m whole.

**closed** New experts are kept out by a bias of the choice (DeepSeek-V3's) or of the scores (gpt-oss), which then rises
to its aim within a number of steps. Nothing changes at the moment of growth, whatever the new experts are. It needs a
bias, and weights that do not depend on experts which are not chosen.

Beside the letters of `actors.moe`: m copies of the set, the originals included; F experts after the growth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.errors import InvalidInput

CUT_SHARE = 0.02
"""Of the tokens: those so near to a cut that their choice may change. Less needs larger rows, and 16-bit rows would
lose what tells experts apart."""
APART = 4.0
"""By how much the scores of a token's own set lie above those of the others at least, in natural units, where weights
are not renormalised: each other set takes exp(-4) of the softmax from a token near the cut, and next to nothing from
most."""
RIDGE = 0.05
"""Of the inputs' mean variance, added before they are whitened: directions in which they hardly vary stay short."""
MAX_MOVED = 0.02
"""Of all gate weight, see `moved_share`: a growth that would move more is refused."""


def split(
    rows_ED: Tensor,
    inputs_TD: Tensor,
    num_sets: int,
    depth: int,
    generator: torch.Generator,
    *,
    renormalises: bool,
) -> Tensor:
    """-> m times E rows, first those of the originals.

    `inputs_TD`: what the gate sees of some tokens, a few hundred at least; they set the size of the cut and its
    directions, so that every set gets its part of the tokens. `depth`: that many of a token's best experts in its own
    set stay above all of the other sets. `renormalises`: weights do not depend on experts that are not chosen.
    Computed in float64 on the CPU, whatever the device and dtype of the rows.
    """
    rows, inputs = rows_ED.detach().double().cpu(), inputs_TD.detach().double().cpu()
    if 4 * num_sets > rows.shape[1]:
        raise InvalidInput(
            f"rows of width {rows.shape[1]} cannot tell {num_sets} copies of all experts apart",
            field="num_experts",
            value=num_sets * len(rows),
        )
    directions_MD = _directions(inputs, inputs @ rows.T, num_sets, generator)
    best_T2 = (inputs @ directions_MD.T).topk(2, dim=1).values
    deep_TK = (inputs @ rows.T).topk(min(depth, len(rows)), dim=1).values
    needed_T = (deep_TK[:, 0] - deep_TK[:, -1]).clamp_min(0.0 if renormalises else APART)
    size = (needed_T / (best_T2[:, 0] - best_T2[:, 1]).clamp_min(1e-30)).quantile(1 - CUT_SHARE)
    rows_FD = (rows.unsqueeze(0) + size * directions_MD.unsqueeze(1)).flatten(0, 1)
    grown_FD: Tensor = rows_FD.to(rows_ED)
    return grown_FD


def _directions(inputs_TD: Tensor, scores_TE: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, D], which sum to 0.

    Orthogonal to the mean input, and as far as the width allows uncorrelated with the scores: so every set gets tokens
    of every expert, also where the experts are sets of an earlier growth themselves. Drawn where the inputs are white:
    else the one direction in which they vary most would decide all cuts alike.
    """
    inputs, scores = inputs_TD - inputs_TD.mean(0), scores_TE - scores_TE.mean(0)
    width, most = inputs.shape[1], max(0, (inputs.shape[1] - count) // 2 - 1)
    of_scores_ND = torch.linalg.svd(scores.T @ inputs, full_matrices=False).Vh[:most]
    taken_DN = torch.cat((inputs_TD.mean(0, keepdim=True), of_scores_ND)).T
    free_DN = torch.linalg.qr(taken_DN, mode="complete").Q[:, taken_DN.shape[1] :]
    variance_N, axes_NN = torch.linalg.eigh((inputs @ free_DN).T @ (inputs @ free_DN) / len(inputs))
    white_DN = free_DN @ axes_NN / (variance_N + RIDGE * variance_N.mean()).sqrt()
    random_NM = torch.randn(white_DN.shape[1], count, generator=generator, dtype=torch.float64)
    directions_DM: Tensor = white_DN @ torch.linalg.qr(random_NM).Q
    assert directions_DM.shape == (width, count)
    return (directions_DM - directions_DM.mean(1, keepdim=True)).T


@dataclass(frozen=True)
class Closed:
    """Biases of new experts, and how they open."""

    bias_N: Tensor
    rise_N: Tensor
    """To be added after each step."""


def closed_choice(bias_E: Tensor, aim_N: Tensor, open_steps: int) -> Closed:
    """For a bias that is added to scores in [0, 1] for the choice alone: no new expert reaches any old one.

    `aim_N`: where the new experts' biases are after `open_steps` steps, but for what the balance rule adds meanwhile.
    """
    return _closed(bias_E.min() - 1.001, aim_N, open_steps)


def closed_scores(scores_TE: Tensor, new_scores_TN: Tensor, top_k: int, aim_N: Tensor, open_steps: int) -> Closed:
    """For a bias that is part of the scores, bounded by nothing: below the K-th best score of every token given.

    `new_scores_TN`: of the new experts, without their bias.
    """
    least = scores_TE.topk(top_k, dim=1).values[:, -1].min()
    return _closed(least - new_scores_TN.max() - APART, aim_N, open_steps)


def _closed(start: Tensor, aim_N: Tensor, open_steps: int) -> Closed:
    bias_N = torch.minimum(start.to(aim_N.dtype).expand_as(aim_N), aim_N)
    return Closed(bias_N.clone(), (aim_N - bias_N) / max(1, open_steps))


def fresh_rows(rows_ED: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, D], as large as the old ones."""
    drawn_ND = torch.randn(count, rows_ED.shape[1], generator=generator, dtype=torch.float64)
    size = rows_ED.detach().double().cpu().square().mean().sqrt()
    return (drawn_ND * size).to(rows_ED)


def perturbed(stack_E: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A copy of stacked parameters [E, ...] with normal noise of `share` times each expert's root mean square.

    Drawn on the CPU in float32, so that equal generators give equal bits on every device.
    """
    if not share:
        return stack_E.clone()
    noise = torch.randn(stack_E.shape, generator=generator, dtype=torch.float32)
    wide = stack_E.to("cpu", torch.promote_types(stack_E.dtype, torch.float32))
    size_E = torch.linalg.vector_norm(wide.flatten(1), dim=1) / (wide[0].numel() ** 0.5)
    noisy: Tensor = wide + noise.to(wide.dtype) * (share * size_E).reshape(-1, *[1] * (stack_E.ndim - 1))
    return noisy.to(stack_E)


def moved_share(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], source_F: Sequence[int], num_experts: int
) -> float:
    """How much of the gate weight of some tokens goes to other experts than before, in [0, 1]; copies count as what
    they are copies of.

    `before` and `after`: (ids_TK, weights_TK), -1 for places that are not used. `source_F[e]`: the expert that e is a
    copy of, itself for an old one, -1 for one that is new in every respect.
    """
    origin_F = torch.tensor([num_experts if source < 0 else source for source in source_F])
    ids_TK, weights_TK = after
    known_TK = torch.where(ids_TK < 0, -1, origin_F[ids_TK.clamp_min(0).cpu()].to(ids_TK.device))
    old_TE = _dense(*before, num_experts + 1)
    new_TE = _dense(known_TK, weights_TK, num_experts + 1)
    return float(0.5 * (new_TE - old_TE).abs().sum() / old_TE.abs().sum().clamp_min(1e-30))


def _dense(ids_TK: Tensor, weights_TK: Tensor, num_columns: int) -> Tensor:
    weights = weights_TK.detach().double().cpu().masked_fill(ids_TK.cpu() < 0, 0.0)
    return torch.zeros(len(ids_TK), num_columns, dtype=torch.float64).scatter_add_(
        1, ids_TK.cpu().clamp_min(0).long(), weights
    )
