"""Products of rows sorted by expert with stacked weights, forward and backward.

On a GPU `torch.nn.functional.grouped_mm` does all experts in one kernel. On a CPU a loop of `mm` over the experts that
got rows is faster (7.1 against 10.4 ms for 16 experts of 256 x 256 and 4096 rows, one thread; weight gradients
6.7 against 9.1 ms, since `addmm_` adds into the gradient without another pass) and it also takes float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Counts(tuple[int, ...]):
    """Rows of each expert, [E]. Where they end is brought to a device once, not for every product."""

    def ends_on(self, device: torch.device) -> Tensor:
        """int32 [E]: the row behind each expert's last. The host does not wait for the device."""
        known: dict[torch.device, Tensor] = self.__dict__.setdefault("ends", {})
        if device not in known:
            ends = torch.tensor(list(itertools.accumulate(self)), dtype=torch.int32, pin_memory=device.type == "cuda")
            known[device] = ends.to(device, non_blocking=True)
        return known[device]


def grouped_mm(rows_PM: Tensor, weights_EMN: Tensor, counts_E: Sequence[int]) -> Tensor:
    """out[p] = rows[p] @ weights[expert of p]. Rows are sorted by expert, `counts_E` rows each. Returns [P, N]."""
    if rows_PM.device.type == "cuda":
        return F.grouped_mm(rows_PM, weights_EMN, offs=_offsets(counts_E, rows_PM.device))
    return grouped_mm_into(rows_PM.new_empty(rows_PM.shape[0], weights_EMN.shape[2]), rows_PM, weights_EMN, counts_E)


def grouped_mm_into(out_PN: Tensor, rows_PM: Tensor, weights_EMN: Tensor, counts_E: Sequence[int]) -> Tensor:
    """The same, written to `out_PN`, which may be some rows of a larger tensor."""
    if rows_PM.device.type == "cuda":
        return out_PN.copy_(F.grouped_mm(rows_PM, weights_EMN, offs=_offsets(counts_E, rows_PM.device)))
    for expert, start, end in _spans(counts_E):
        torch.mm(rows_PM[start:end], weights_EMN[expert], out=out_PN[start:end])
    return out_PN


def grouped_outer(left_PM: Tensor, right_PN: Tensor, counts_E: Sequence[int]) -> Tensor:
    """left[rows of e]^T @ right[rows of e]: [E, M, N]. On a GPU."""
    return F.grouped_mm(left_PM.t(), right_PN, offs=_offsets(counts_E, left_PM.device))


def add_grouped_outer(grad_EMN: Tensor, left_PM: Tensor, right_PN: Tensor, counts_E: Sequence[int]) -> None:
    """grad[e] += left[rows of e]^T @ right[rows of e], in place."""
    if left_PM.device.type == "cuda":
        grad_EMN += grouped_outer(left_PM, right_PN, counts_E)
        return
    for expert, start, end in _spans(counts_E):
        grad_EMN[expert].addmm_(left_PM[start:end].t(), right_PN[start:end])


def add_grouped_sum(grad_EN: Tensor, rows_PN: Tensor, counts_E: Sequence[int]) -> None:
    """grad[e] += sum of the rows of e, in place: the gradient of a bias."""
    if rows_PN.device.type == "cuda" and rows_PN.dtype == torch.bfloat16:
        # As a product with ones, 16 bytes of them: sums of bfloat16 one by one would be rounded one by one.
        ones_P8 = rows_PN.new_ones(len(rows_PN), 8)
        grad_EN += grouped_outer(ones_P8, rows_PN, counts_E)[:, 0]
        return
    grad_EN.index_add_(0, _experts(counts_E, rows_PN), rows_PN.to(grad_EN.dtype))


def add_bias(rows_PN: Tensor, bias_EN: Tensor, counts_E: Sequence[int]) -> Tensor:
    """rows[p] + bias[expert of p], in place."""
    return rows_PN.add_(bias_EN.index_select(0, _experts(counts_E, rows_PN)))


def _experts(counts_E: Sequence[int], rows_PN: Tensor) -> Tensor:
    """[P]"""
    if rows_PN.device.type == "cuda":
        rows_P = torch.arange(len(rows_PN), dtype=torch.int32, device=rows_PN.device)
        return torch.searchsorted(_offsets(counts_E, rows_PN.device), rows_P, right=True)
    return torch.repeat_interleave(torch.tensor(counts_E))


def _spans(counts_E: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, count in enumerate(counts_E):
        if count:
            yield expert, start, start + count
        start += count


def _offsets(counts_E: Sequence[int], device: torch.device) -> Tensor:
    return (counts_E if isinstance(counts_E, Counts) else Counts(counts_E)).ends_on(device)
