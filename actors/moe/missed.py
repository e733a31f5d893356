"""AdamW's steps without a gradient, that were put off: made as few.

Where the gradient is zero moments only decay, m_j = b1^j m and v_j = b2^j v, so that k such steps change a weight by

    w_k = W w - m * sum over j of a_j / (s + e_j),   s = sqrt(v)

with numbers a_j >= 0 and e_j > 0 that are the same for every element: W is the weight decay of all steps, a_j has the
rates, corrections and decays in it, and e_j is `eps` as seen from before the steps. The e_j lie close together, so a
few fractions give the same sum, mostly one: those of the Gauss quadrature with q nodes for the measure that puts a_j at
e_j (Golub & Welsch 1969). Its error is known,

    |m| * (sum over j of a_j p(e_j)^2) / (s + e)^(2q + 1)   for an e between the smallest and the largest of the e_j,

p the measure's monic orthogonal polynomial of degree q; and as |m| is at most a constant times s under AdamW, there is
a bound for all elements, the better the larger the smallest s. To look for that takes as long as half a step, and is
done only where what is known of it will not do: it is `beta2` times itself after any step, at least. Each fraction is a
step of AdamW again, with numbers of its own.

    K steps   Q fractions
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.optim import OptimizerSettings

Row = tuple[Tensor, Tensor, Tensor]
"""One expert's part of a parameter, and its moments: contiguous."""
Floats = list[float]
Vector = NDArray[np.float64]

PIECE = 1 << 17
"""Elements that are stepped again and again: with their moments 1.5 MB in float32."""
MAX_FRACTIONS = 8
MIN_KEPT = 0.1
"""Of a first moment by a step that moves weights: AdamW takes m - (1 - beta1) m, where little has few digits."""
MIN_KEPT_AT_ALL = 1e-200


@dataclass(frozen=True)
class Step:
    """One of AdamW's, with numbers of its own."""

    count: float
    """Of steps before it: with it, that the moments are corrected for."""
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def make(self, weights: list[Tensor], gradients: list[Tensor], firsts: list[Tensor], seconds: list[Tensor]) -> None:
        """Torch's own kernel. What `torch.optim.adamw` does around it takes as long as 50,000 elements."""
        count = _count(self.count + 1, weights[0].device)
        torch._fused_adamw_(
            weights,
            gradients,
            firsts,
            seconds,
            [],
            [count] * len(weights),
            amsgrad=False,
            maximize=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=self.eps,
        )


@dataclass(frozen=True)
class Owed:
    """Steps without a gradient that have still to be made."""

    settings: OptimizerSettings = field(hash=False)  # of one run there is one, and it has many fields
    before: int
    """Steps that were made."""
    lrs: tuple[float, ...]
    decays: bool
    """Whether weight decay acts on the parameter."""
    is_own: bool
    """Whether nobody else has to update the group alike. Otherwise each step is made, so that it does not matter how
    many are made at a time."""

    def make(self, rows: Sequence[Row], floors: Sequence[float] = ()) -> Sequence[float]:
        """Of all these, where they are. `floors`: no second moment of the row is smaller before it -> the same, looked
        up where that was worth it."""
        steps, floors = self._fewest(rows, floors or [0.0] * len(rows)) if self.is_own else (self._all(), floors)
        for pieces in _pieces(rows, PIECE if len(steps) > 1 else None):
            weights, firsts, seconds = (list(kind) for kind in zip(*pieces, strict=True))
            zeros = [_zeros(weight.shape, weight.dtype, weight.device) for weight in weights]
            for step in steps:
                step.make(weights, zeros, firsts, seconds)
        return floors

    @property
    def _decay(self) -> float:
        return self.settings.weight_decay if self.decays else 0.0

    def _all(self) -> list[Step]:
        settings = self.settings
        return [
            Step(self.before + number, lr, settings.beta1, settings.beta2, settings.eps, self._decay)
            for number, lr in enumerate(self.lrs)
        ]

    def _fewest(self, rows: Sequence[Row], floors: Sequence[float]) -> tuple[list[Step], Sequence[float]]:
        """That no weight can tell from the others but by an eighth of the last digit of 1; and the floors."""
        if not _can_be_few(self.settings, self.lrs, self._decay):
            return self._all(), floors
        steps = self._few(rows[0][2].dtype, min(floors))
        if len(steps) > 1 and rows[0][2].device.type != "cuda":  # there the host would have to wait for it
            floors = [max(floor, float(second.amin())) for floor, (_, _, second) in zip(floors, rows, strict=True)]
            steps = self._few(rows[0][2].dtype, min(floors))
        return steps, floors

    def _few(self, dtype: torch.dtype, floor: float) -> list[Step]:
        return made_as_few(
            self.settings,
            self.before,
            self.lrs,
            weight_decay=self._decay,
            smallest=math.sqrt(floor),
            tolerance=torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps / 8,
        )


def lowered(floor: float, beta2: float, steps: int, dtype: torch.dtype) -> float:
    """What no second moment is below after so many steps, where none was below the floor; each step rounds."""
    digits = torch.finfo(dtype)
    lower = floor * (beta2 * (1 - digits.eps)) ** steps
    return lower if lower * digits.eps > digits.tiny else 0.0


def _pieces(rows: Sequence[Row], size: int | None) -> Iterator[list[Row]]:
    """All elements, cut into at most `PIECE` and collected to at most `size`; None: all at once."""
    collected: list[Row] = []
    room = size or math.inf
    for row in rows:
        for piece in _cut(row):
            if piece[0].numel() > room:
                yield collected
                collected, room = [], size or math.inf
            collected.append(piece)
            room -= piece[0].numel()
    if collected:
        yield collected


def _cut(row: Row) -> Iterator[Row]:
    if (size := row[0].numel()) <= PIECE:
        yield row
        return
    weight, first, second = (tensor.view(-1) for tensor in row)
    for start in range(0, size, PIECE):
        yield weight[start : start + PIECE], first[start : start + PIECE], second[start : start + PIECE]


@cache
def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The gradient of all pieces of this shape; nobody writes there."""
    return _most_zeros(dtype, device)[: shape.numel()].view(shape)


@cache
def _most_zeros(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(PIECE, dtype=dtype, device=device)


@lru_cache(maxsize=16)
def _count(count: float, device: torch.device) -> Tensor:
    """As the kernel wants it, who only reads it: the same for all groups of a step."""
    return torch.tensor(count, dtype=torch.float32, device=device)


# --- Numbers ---------------------------------------------------------------------------------------------------------


def made_as_few(
    settings: OptimizerSettings,
    before: int,
    lrs: Sequence[float],
    *,
    weight_decay: float,
    smallest: float,
    tolerance: float,
) -> list[Step]:
    """Steps that together do what those of these rates do, after as many `before` them, but for `tolerance` in each
    weight. No element's root of the second moment is below `smallest`."""
    beta1, beta2 = settings.beta1, settings.beta2
    amounts, epsilons, kept = [], [], 1.0
    for number in range(len(lrs), 0, -1):
        lr, steps = lrs[number - 1], before + number
        # The denominator of this step is scale * s + eps = scale * (s + eps / scale).
        scale = math.sqrt(beta2**number / (1 - beta2**steps))
        amounts.append(kept * lr * beta1**number / (1 - beta1**steps) / scale)
        epsilons.append(settings.eps / scale)
        kept *= 1 - lr * weight_decay  # of a weight, by this step and all that follow
    fewest = _fractions(amounts, epsilons, _moment_ratio(settings), smallest, tolerance)
    return _as_steps(settings, len(lrs), kept, *fewest)


def _can_be_few(settings: OptimizerSettings, lrs: Sequence[float], weight_decay: float) -> bool:
    """Whether there are several, and no number of theirs is zero."""
    least_kept = max(0.0, min(settings.beta1, settings.beta2, 1 - max(lrs) * weight_decay)) ** len(lrs)
    return len(lrs) > 1 and min(lrs) > 0 and least_kept > MIN_KEPT_AT_ALL


def _moment_ratio(settings: OptimizerSettings) -> float:
    """Most that a first moment can be of the root of the second (Cauchy and Schwarz); infinite if there is no most."""
    if settings.beta1**2 >= settings.beta2 or settings.beta2 >= 1:
        return math.inf
    return (1 - settings.beta1) / math.sqrt((1 - settings.beta2) * (1 - settings.beta1**2 / settings.beta2))


def _fractions(
    amounts: Floats, epsilons: Floats, moment_ratio: float, smallest: float, tolerance: float
) -> tuple[Floats, Floats]:
    """-> amounts and epsilons, as few as will do; the given ones where few would not."""
    total, lowest = sum(amounts), min(epsilons)
    if not lowest:  # nor any other
        return [total], epsilons[:1]
    points, weights = [eps / lowest for eps in epsilons], [amount / total for amount in amounts]
    found = gauss(points, weights, smallest / lowest, tolerance / (total * moment_ratio))
    return ([total * w for w in found[1]], [lowest * x for x in found[0]]) if found else (amounts, epsilons)


def gauss(points: Floats, weights: Floats, smallest: float, tolerance: float) -> tuple[Floats, Floats] | None:
    """-> nodes and weights [Q] with which the mean of s / (s + x) is off by no more than the tolerance, whatever s from
    `smallest`.

    The points are 1 and above, the weights sum to 1. None if it takes as many as there are points, or more than
    `MAX_FRACTIONS`.
    """
    # One node, by far the most frequent, without numpy: the mean.
    mean = sum(w * x for w, x in zip(weights, points, strict=True))
    if sum(w * (x - mean) ** 2 for w, x in zip(weights, points, strict=True)) * _highest(1, smallest) <= tolerance:
        return [mean], [1.0]
    return _lanczos(np.array(points), np.array(weights), smallest, tolerance)


def _highest(q: int, smallest: float) -> float:
    """Of s / (s + 1)^(2q + 1)."""
    s = max(smallest, 1 / (2 * q))
    return s / (s + 1) ** (2 * q + 1)


def _lanczos(x_K: Vector, weight_K: Vector, smallest: float, tolerance: float) -> tuple[Floats, Floats] | None:
    """As `gauss`. The iteration on diag(x) gives the matrix whose eigenvalues are the nodes."""
    basis = [np.sqrt(weight_K)]
    diagonal: list[float] = []
    beside: list[float] = []
    square = 1.0  # the mean of p squared
    for q in range(1, min(len(x_K), MAX_FRACTIONS + 1)):
        vector = x_K * basis[-1]
        diagonal.append(float(vector @ basis[-1]))
        for _ in range(2):  # after two all are orthogonal to the last digit
            for other in basis:
                vector = vector - (vector @ other) * other
        length = math.sqrt(vector @ vector)
        square *= length**2
        if square * _highest(q, smallest) <= tolerance:
            nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
            return nodes.tolist(), (vectors[0] ** 2).tolist()
        if not length:  # the tolerance is no number, or all points are one
            return None
        beside.append(length)
        basis.append(vector / length)
    return None


def _as_steps(settings: OptimizerSettings, count: int, kept: float, amounts: Floats, epsilons: Floats) -> list[Step]:
    """A step for each fraction; each decays weights and moments by its part of the whole."""
    q, kept_each = len(amounts), kept ** (1 / len(amounts))
    each = min(count / q, math.log(MIN_KEPT) / math.log(settings.beta1))
    beta1, beta2 = settings.beta1**each, settings.beta2**each
    steps = []
    for i, (amount, eps) in enumerate(zip(amounts, epsilons, strict=True), start=1):
        # As if it were the first step: AdamW takes beta1^i m / (1 - beta1) over beta2^(i/2) s / sqrt(1 - beta2) + eps,
        # and the steps after it leave `kept_each` of that.
        first, second = beta1**i / (1 - beta1), math.sqrt(beta2**i / (1 - beta2))
        lr = amount * second / first / kept_each ** (q - i)
        steps.append(Step(0, lr, beta1, beta2, eps * second, (1 - kept_each) / lr))
    if (rest := count - q * each) > 0:
        steps.append(Step(0, 0.0, settings.beta1**rest, settings.beta2**rest, settings.eps, 0.0))
    return steps
