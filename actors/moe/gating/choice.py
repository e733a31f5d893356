"""Which experts: no gradients here. Of equal scores the lower expert id wins, on every device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.moe.gating.contract import GateContext
from actors.moe.gating.scores import DROPOUT

_FEW_ROWS = 16


def best(scores_TN: Tensor, count: int) -> Tensor:
    """Places of the `count` largest of each row, largest first; of equal ones the lower place. -> int64 [T, count]

    `topk` leaves the order of equal scores open. A stable sort does not, in one call, which is what counts for the few
    rows of decoding and on a GPU. For many rows on a CPU taking the first maximum `count` times does less work (8 of
    256, 2048 rows, one thread: 3.4 ms; stable sort 19 ms, topk 4.5 ms; for one row 58, 10 and 4 microseconds).
    """
    if scores_TN.shape[0] <= _FEW_ROWS or scores_TN.device.type != "cpu":
        return scores_TN.sort(dim=1, descending=True, stable=True).indices[:, :count]
    left_TN = scores_TN.clone()
    places: list[Tensor] = []
    for _ in range(count):
        places.append(left_TN.max(dim=1, keepdim=True).indices)
        left_TN.scatter_(1, places[-1], float("-inf"))
    return torch.cat(places, dim=1)


@dataclass(frozen=True)
class Choice:
    """The K best experts inside the M best of G contiguous parts, a part scored by the sum of its `scored_by` best.

    G = 1 is plain top-k. `scored_by` all of a part's experts is two-level routing (the sum of p(expert) is p(group)), 2
    is DeepSeek-V3's group limit, K / M its node limit.
    """

    top_k: int
    num_parts: int = 1
    parts_per_token: int = 1
    scored_by: int = 1

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """Scores with the balance bias -> ids_TK, best first. Compares G parts, then the M * E / G experts in them."""
        if self.parts_per_token == self.num_parts:
            return best(scores_TE, self.top_k)
        tokens, num_experts = scores_TE.shape
        size = num_experts // self.num_parts
        scores_TGN = scores_TE.view(tokens, self.num_parts, size)
        part_TG = scores_TGN.topk(self.scored_by, dim=2).values if self.scored_by < size else scores_TGN
        # Ascending, so that the lower place among the candidates is the lower expert id.
        part_TM = best(part_TG.sum(dim=2), self.parts_per_token).sort(dim=1).values
        candidates_TMN = scores_TGN.gather(1, part_TM.unsqueeze(2).expand(-1, -1, size))
        place_TK = best(candidates_TMN.flatten(1), self.top_k)
        return part_TM.gather(1, place_TK // size) * size + place_TK % size


def smallest_set(probabilities_TK: Tensor, mass: float) -> Tensor:
    """S9: places in use, bool [T, K]: the fewest first ones whose probabilities sum to more than `mass`, at most K."""
    before_TK = torch.cat((torch.zeros_like(probabilities_TK[:, :1]), probabilities_TK.cumsum(dim=1)[:, :-1]), dim=1)
    return before_TK <= mass


def surviving(ids_TK: Tensor, probability: float, context: GateContext) -> Tensor:
    """S10: places that are not dropped, bool [T, K]. The first place, a token's best expert, never is."""
    generator = context.generator(DROPOUT, ids_TK.device)
    draws_TK = torch.rand(ids_TK.shape, generator=generator, dtype=torch.float32, device=ids_TK.device)
    kept_TK = draws_TK >= probability
    kept_TK[:, 0] = True
    return kept_TK
