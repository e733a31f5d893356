"""`kernel_even`, `kernel_zipf`: experts on a GPU from sorted rows to weighted outputs, against the two bare grouped
products of the same shapes, which is what nobody can leave out.

Activation and gate weights are on our side alone. Forward and backward, with permutation and all gradients, are given
as a share of the card's dense bfloat16 rate, measured between the same rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from actors.moe.device import DeviceExperts
from actors.moe.experts import Work
from actors.moe.grouped import Counts
from actors.trunk.model import ModelSource, skeleton
from cluster.bench.result import Row, interleaved
from cluster.bench.zipf import zipf_share

NUM_ROWS, NUM_EXPERTS, WIDTH, INNER = 32_768, 32, 7168, 2048
FORWARD_FLOPS = 2 * NUM_ROWS * WIDTH * 3 * INNER
CALLS_A_ROUND = 5
MIN_ROUNDS = 5
DENSE = 8192
"""Rows, inner size and columns of the dense product."""


@dataclass(frozen=True)
class KernelRow(Row):
    spread: float
    """Of the ratio: largest round less smallest."""
    tflops: float
    """Of our forward."""
    dense_tflops: float
    """A dense bfloat16 product in the same rounds."""
    forward_backward_share: float
    """Of that rate: tokens to weighted sums and back, with permutation and the gradients of tokens, gate weights and
    experts."""


def kernel_rows(rounds: int) -> list[Row]:
    """None without a CUDA device."""
    if not torch.cuda.is_available():
        return []
    even = [NUM_ROWS // NUM_EXPERTS] * NUM_EXPERTS
    return [
        _bench(case, counts_E, rounds) for case, counts_E in (("kernel_even", even), ("kernel_zipf", zipf_counts()))
    ]


def zipf_counts(num_rows: int = NUM_ROWS, num_experts: int = NUM_EXPERTS) -> list[int]:
    """Rows of each expert, expert e a share ~ 1 / (e + 1)."""
    counts_E = [int(share * num_rows) for share in zipf_share(num_experts)]
    counts_E[0] += num_rows - sum(counts_E)
    return counts_E


def _bench(case: str, counts_E: Sequence[int], rounds: int) -> Row:
    torch.manual_seed(0)
    stack = _stack()
    x_TD = torch.randn(NUM_ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
    token_P = torch.randperm(NUM_ROWS, device="cuda").to(torch.int32)
    work = Work(token_P, Counts(counts_E), torch.rand(NUM_ROWS, device="cuda"))
    rows_PD, grad_TD = x_TD.index_select(0, token_P), torch.randn_like(x_TD)
    # The same numbers for both: the power that a card draws, and with it its clock, depends on them.
    _, act_PI, _ = stack.compute_rows(rows_PD, work, stack.weights)
    left, right = torch.randn(2, DENSE, DENSE, device="cuda", dtype=torch.bfloat16)
    ends_E = Counts(counts_E).ends_on(torch.device("cuda"))
    w_in, w_out = (stack.weight(name).transpose(1, 2) for name in ("gate_up_proj", "down_proj"))

    def ours() -> None:
        stack.compute_rows(rows_PD, work, stack.weights)

    def bare() -> None:
        F.grouped_mm(rows_PD, w_in, offs=ends_E)
        F.grouped_mm(act_PI, w_out, offs=ends_E)

    def both_ways() -> None:
        stack.zero_gradients()
        _, saved = stack(x_TD, work, keep=True)
        *_, later = stack.backward(saved, grad_TD)
        assert later is not None
        stack.accumulate(later)

    def dense() -> None:
        torch.mm(left, right)

    candidates = {"ours": ours, "bare": bare, "both_ways": both_ways, "dense": dense}
    seconds = interleaved({name: _calls(run) for name, run in candidates.items()}, max(rounds, MIN_ROUNDS), 2)
    each = {name: [s / CALLS_A_ROUND for s in found] for name, found in seconds.items()}
    median = {name: statistics.median(found) for name, found in each.items()}
    ratios = [b / a for a, b in zip(each["ours"], each["bare"], strict=True)]
    dense_rate = 2 * DENSE**3 / median["dense"]
    return KernelRow(
        case,
        1e3 * median["ours"],
        "ms",
        "two bare F.grouped_mm",
        1e3 * median["bare"],
        statistics.median(ratios),
        len(ratios),
        max(ratios) - min(ratios),
        FORWARD_FLOPS / median["ours"] / 1e12,
        dense_rate / 1e12,
        3 * FORWARD_FLOPS / median["both_ways"] / dense_rate,
    )


def _stack() -> DeviceExperts:
    values = {
        "model_type": "deepseek_v3",
        "hidden_size": WIDTH,
        "moe_intermediate_size": INNER,
        "n_routed_experts": NUM_EXPERTS,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "vocab_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
    }
    layer = skeleton(ModelSource(values=values, dtype="bfloat16")).layers[0]
    tensors = {
        name: torch.randn(NUM_EXPERTS, *shape, device="cuda", dtype=torch.bfloat16).mul_(0.02)
        for name, shape in layer.shapes().items()
    }
    return DeviceExperts(layer.template, tensors, max_pairs=NUM_ROWS)


def _calls(run: Callable[[], None]) -> Callable[[], None]:
    def timed() -> None:
        for _ in range(CALLS_A_ROUND):
            run()
        torch.cuda.synchronize()

    return timed
