"""Triton kernels of a step of few tokens, which captured graphs are made of: there it is the number of kernels that
takes time, and the reading of the experts' weights. Imported as `actors.moe.kernels` is.

    T tokens   K experts a token   P = T * K pairs   E experts   R rows of a stack   D model width
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.moe.kernels import block_of, there, warps_of


@triton.jit
def _rows(ids, row_of, pair, num_pairs, NUM_EXPERTS: tl.constexpr, NUM_ROWS: tl.constexpr):
    """Of the stack; behind all of them for experts that it has not."""
    inside = pair < num_pairs
    expert = tl.load(ids + pair, mask=inside, other=-1)
    known = inside & (expert >= 0) & (expert < NUM_EXPERTS)
    return tl.load(row_of + expert, mask=known, other=NUM_ROWS).to(tl.int32)


@triton.jit
def _places(
    ids,
    row_of,
    place,
    order,
    row,
    ends,
    num_pairs,
    NUM_EXPERTS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program counts for so many pairs, and for so many rows of the stack."""
    me = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = _rows(ids, row_of, me, num_pairs, NUM_EXPERTS, NUM_ROWS)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    up_to_row = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, num_pairs, BLOCK):
        other = start + tl.arange(0, BLOCK)
        theirs = _rows(ids, row_of, other, num_pairs, NUM_EXPERTS, NUM_ROWS)[None, :]
        is_first = (theirs < mine[:, None]) | ((theirs == mine[:, None]) & (other[None, :] < me[:, None]))
        counts = (other < num_pairs)[None, :]
        before += tl.sum((is_first & counts).to(tl.int32), axis=1)
        up_to_row += tl.sum(((theirs <= me[:, None]) & counts).to(tl.int32), axis=1)
    inside = me < num_pairs
    tl.store(place + me, before, mask=inside)
    tl.store(order + before, me, mask=inside)
    tl.store(row + before, mine, mask=inside)
    tl.store(ends + me, up_to_row, mask=me < NUM_ROWS)


@there
def places(ids_TK: Tensor, row_E: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs sorted by row of the stack, equal ones as they were; those of other experts last. `row_E`: of each expert.
    -> place of each pair [P], which pair is at each place [P] and its row [P], ends of the rows [R]; all int32."""
    num_pairs, block = ids_TK.numel(), 64
    place_P, order_P, row_P = torch.empty(3, num_pairs, dtype=torch.int32, device=ids_TK.device)
    ends_R = torch.empty(num_rows, dtype=torch.int32, device=ids_TK.device)
    grid = (triton.cdiv(max(num_pairs, num_rows), block),)
    _places[grid](
        ids_TK.contiguous(),
        row_E,
        place_P,
        order_P,
        row_P,
        ends_R,
        num_pairs,
        NUM_EXPERTS=len(row_E) - 1,
        NUM_ROWS=num_rows,
        BLOCK=block,
        num_warps=4,
    )
    return place_P, order_P, row_P, ends_R


@triton.jit
def _few_rows(
    rows,
    index,
    weight,
    ends,
    out,
    stride_e,
    stride_n,
    stride_k,
    K: tl.constexpr,
    N: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert = tl.program_id(1)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_M):
        pair = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = pair < last
        row = pair
        if PER_ROW > 0:
            row = tl.load(index + pair, mask=inside, other=0).to(tl.int64) // PER_ROW
        k = tl.arange(0, BLOCK_K)
        a = rows + row[:, None] * K + k[None, :]
        b = weight + expert.to(tl.int64) * stride_e + n[None, :] * stride_n + k[:, None] * stride_k
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for at in range(0, K, BLOCK_K):
            there = at + k < K
            left = tl.load(a, mask=inside[:, None] & there[None, :], other=0.0)
            right = tl.load(b, mask=(n < N)[None, :] & there[:, None], other=0.0)
            total = tl.dot(left, right, total)
            a += BLOCK_K
            b += BLOCK_K * stride_k
        place = out + pair[:, None] * N + n[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@there
def few_rows_mm(
    rows_RK: Tensor, matrices_EKN: Tensor, ends_E: Tensor, num_pairs: int, order_P: Tensor | None, per_row: int
) -> Tensor:
    """Grouped product of so few rows an expert that reading the matrices is what takes time: [P, N], pairs sorted by
    expert, `ends_E` int32. Pair p is row `order_P[p] // per_row`; without `order_P`, row p. Pairs behind the last end
    are not computed."""
    num_experts, width, num_out = matrices_EKN.shape
    out_PN = rows_RK.new_empty(num_pairs, num_out)
    grid = (triton.cdiv(num_out, 64), num_experts)
    _few_rows[grid](
        rows_RK,
        ends_E if order_P is None else order_P,  # which is not read then
        matrices_EKN,
        ends_E,
        out_PN,
        matrices_EKN.stride(0),
        matrices_EKN.stride(2),
        matrices_EKN.stride(1),
        K=width,
        N=num_out,
        PER_ROW=0 if order_P is None else per_row,
        BLOCK_M=16,
        BLOCK_N=64,
        BLOCK_K=128,
        num_warps=4,
        num_stages=4,
    )
    return out_PN


@triton.jit
def _weighted(
    rows, place, ends, weight, out, NUM_ROWS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    num_computed = tl.load(ends + NUM_ROWS - 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for number in range(K):
        at = tl.load(place + token * K + number).to(tl.int64)
        is_here = at < num_computed
        value = tl.load(rows + at * D + column, mask=inside & is_here, other=0.0).to(tl.float32)
        total += value * tl.load(weight + token * K + number, mask=is_here, other=0.0).to(tl.float32)
    tl.store(out + token * D + column, total, mask=inside)


@there
def weighted_sums(rows_PD: Tensor, place_P: Tensor, ends_R: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, D]: over the pairs of each token, of those that were computed. `rows_PD` at their places."""
    (num_tokens, top_k), width = weights_TK.shape, rows_PD.shape[1]
    out_TD = torch.empty(num_tokens, width, dtype=dtype, device=rows_PD.device)
    block = block_of(width)
    grid = (num_tokens, triton.cdiv(width, block))
    _weighted[grid](
        rows_PD,
        place_P,
        ends_R,
        weights_TK,
        out_TD,
        NUM_ROWS=len(ends_R),
        K=top_k,
        D=width,
        BLOCK=block,
        num_warps=warps_of(block),
    )
    return out_TD


@triton.jit
def _best(
    logits,
    bias,
    ids,
    weights,
    scale,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_KEPT: tl.constexpr,
    K: tl.constexpr,
    SUM_TO_1: tl.constexpr,
    WIDE: tl.constexpr,
    PLACES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, WIDE)
    inside = expert < E
    score = tl.sigmoid(tl.load(logits + token * E + expert, mask=inside, other=0.0))
    rank = tl.where(inside, score + tl.load(bias + expert, mask=inside, other=0.0), float("-inf"))
    if PARTS_KEPT < PARTS:
        part = expert // (E // PARTS)
        of_part = tl.full((WIDE,), float("-inf"), dtype=tl.float32)
        for number in range(PARTS):
            mine = tl.where(part == number, rank, float("-inf"))
            first = tl.max(mine, axis=0)
            second = tl.max(tl.where(expert == tl.argmax(mine, axis=0), float("-inf"), mine), axis=0)
            of_part = tl.where((part == number) & inside, first + second, of_part)
        kept = expert < 0
        for _ in range(PARTS_KEPT):
            best_part = tl.argmax(of_part, axis=0) // (E // PARTS)
            kept = kept | (part == best_part)
            of_part = tl.where(part == best_part, float("-inf"), of_part)
        rank = tl.where(kept & inside, rank, float("-inf"))
    place = tl.arange(0, PLACES)
    id_K = tl.zeros((PLACES,), dtype=tl.int64)
    weight_K = tl.zeros((PLACES,), dtype=tl.float32)
    for number in range(K):
        found = tl.minimum(tl.argmax(rank, axis=0), E - 1)
        id_K = tl.where(place == number, found, id_K)
        weight_K = tl.where(place == number, tl.sum(tl.where(expert == found, score, 0.0), axis=0), weight_K)
        rank = tl.where(expert == found, float("-inf"), rank)
    if SUM_TO_1:
        weight_K = weight_K / (tl.sum(weight_K, axis=0) + 1e-20)
    weight_K += tl.sum(tl.where(inside, score * 0, 0.0), axis=0)  # whoever looks for scores that are no numbers sees it
    tl.store(ids + token * K + place, id_K, mask=place < K)
    tl.store(weights + token * K + place, weight_K * scale, mask=place < K)


@there
def best_experts(
    logits_TE: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    num_parts: int,
    parts_per_token: int,
    sums_to_1: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's choice (arXiv:2412.19437, section 2.1.2) from float32 logits: the best experts by sigmoid and bias,
    among those of the parts whose best two sum to the most. -> ids int64 [T, K], best first, and weights float32."""
    num_tokens, num_experts = logits_TE.shape
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device)
    _best[(num_tokens,)](
        logits_TE,
        bias_E,
        ids_TK,
        weights_TK,
        scale,
        E=num_experts,
        PARTS=num_parts,
        PARTS_KEPT=parts_per_token,
        K=top_k,
        SUM_TO_1=sums_to_1,
        WIDE=triton.next_power_of_2(num_experts),
        PLACES=triton.next_power_of_2(top_k),
        num_warps=1 if num_experts <= 256 else 4,
    )
    return ids_TK, weights_TK
