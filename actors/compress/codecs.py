"""One matrix or vector as bytes, and back. What gets lost is not kept here: see `actors.compress.compressor`.

`decode` uses products and sums of single elements in a fixed order alone, no matrix product and no reduction: the same
bytes give the same bits on every device. Numbers that are not finite come out as such, so that nothing hides them.

    m rows   n columns   r rank   B blocks   k values of a block
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from actors.compress.settings import CompressionSettings
from actors.errors import InvalidInput

Shape = tuple[int, ...]
"""(n,) or (m, n)"""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1 << 16
"""Values that an index of 16 bits tells apart."""
DENSE_BELOW = 1024
"""`topk` sends parameters of fewer values whole: norms and biases are few bytes, and every step needs them."""
_SCALE = torch.float32
_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Codec(abc.ABC):
    """Of one shape and dtype."""

    num_bytes: int

    @abc.abstractmethod
    def encode(self, x: Tensor, warm: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`x`, in the wide type -> uint8 [num_bytes], and what makes the next one better: `warm` of the next call."""

    @abc.abstractmethod
    def decode(self, raw: Tensor) -> Tensor:
        """uint8 [num_bytes] -> the shape, in the wide type or the one it was sent in."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which a gradient of this dtype is compressed and its error kept. `InvalidInput` where it cannot be."""
    if dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise InvalidInput(
            "gradients of this type cannot be compressed", field="dtype", value=str(dtype), remedy=f"use {known}"
        )
    return torch.float64 if dtype == torch.float64 else torch.float32


def codec_for(shape: Shape, dtype: torch.dtype, settings: CompressionSettings) -> Codec:
    """That of the method where it makes fewer bytes than the values as they are, which small shapes do not."""
    kind = wide(dtype)
    dense: Codec = Scaled(shape, kind, torch.int8) if settings.quantised else Plain(shape, dtype)
    size = math.prod(shape)
    chosen: Codec = dense
    match settings.method:
        case "int8":
            chosen = Scaled(shape, kind, torch.int8)
        case "fp8":
            chosen = Scaled(shape, kind, torch.float8_e4m3fn)
        case "topk" if size >= DENSE_BELOW:
            chosen = Sparse(shape, kind, settings.share, settings.quantised)
        case "powersgd" if len(shape) == 2:
            chosen = LowRank(shape, kind, settings.rank, settings.quantised)
    return min(chosen, dense, Plain(shape, dtype), key=lambda codec: codec.num_bytes)


class Plain(Codec):
    """Values as they are."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        self.num_bytes = math.prod(shape) * dtype.itemsize

    def encode(self, x: Tensor, warm: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _raw(x.to(self._dtype)), None

    def decode(self, raw: Tensor) -> Tensor:
        return _typed(raw, self._dtype, self._shape)


class Scaled(Codec):
    """A byte a value and a scale a row, which takes the row's largest value to the largest of the byte: INT8, or FP8
    e4m3 (Micikevicius et al. 2022, 2209.05433). To nearest: INT8 is off by half a scale at most."""

    def __init__(self, shape: Shape, kind: torch.dtype, byte: torch.dtype) -> None:
        self._shape, self._kind, self._byte = shape, kind, byte
        self._rows = shape[0] if len(shape) == 2 else 1
        self._scale_bytes = self._rows * _SCALE.itemsize
        self.num_bytes = self._scale_bytes + math.prod(shape)

    def encode(self, x: Tensor, warm: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x_mn = x.reshape(self._rows, -1)
        limit = _LIMITS[self._byte]
        scale_m1 = (x_mn.abs().amax(1, keepdim=True) / limit).to(_SCALE)
        scaled_mn = torch.where(scale_m1 > 0, x_mn / scale_m1.to(x_mn.dtype), 0.0).clamp(-limit, limit)
        if self._byte == torch.int8:
            scaled_mn = scaled_mn.round()
        return torch.cat([_raw(scale_m1), _raw(scaled_mn.to(_SCALE).to(self._byte))]), None

    def decode(self, raw: Tensor) -> Tensor:
        scale_m1 = _typed(raw[: self._scale_bytes], _SCALE, (self._rows, 1))
        byte_mn = _typed(raw[self._scale_bytes :], self._byte, (self._rows, -1))
        return (byte_mn.to(self._kind) * scale_m1.to(self._kind)).view(self._shape)


class Sparse(Codec):
    """The share of the values that are largest by magnitude, and where they are (Stich et al. 2018, 1809.07599; Lin et
    al. 2018, 1712.01887). Chosen in each block of at most 65,536, so that an index takes 16 bits."""

    def __init__(self, shape: Shape, kind: torch.dtype, share: float, quantised: bool) -> None:
        self._shape, self._kind, self._size = shape, kind, math.prod(shape)
        self._blocks = math.ceil(self._size / BLOCK)
        self._length = math.ceil(self._size / self._blocks)
        self._count = math.ceil(share * self._length)
        self._values = _dense((self._blocks, self._count), kind, quantised)
        self._index_bytes = self._blocks * self._count * torch.int16.itemsize
        self.num_bytes = self._index_bytes + self._values.num_bytes

    def encode(self, x: Tensor, warm: Tensor | None) -> tuple[Tensor, Tensor | None]:
        padded_BL = torch.zeros(self._blocks * self._length, dtype=self._kind, device=x.device)
        padded_BL[: self._size] = x.reshape(-1)
        padded_BL = padded_BL.view(self._blocks, -1)
        place_Bk = padded_BL.abs().topk(self._count, sorted=False).indices.sort().values
        values, _ = self._values.encode(padded_BL.gather(1, place_Bk), None)
        return torch.cat([_raw((place_Bk - BLOCK // 2).to(torch.int16)), values]), None

    def decode(self, raw: Tensor) -> Tensor:
        place_Bk = _typed(raw[: self._index_bytes], torch.int16, (self._blocks, -1)).long() + BLOCK // 2
        if int(place_Bk.min()) < 0 or int(place_Bk.max()) >= self._length:
            remedy = "send what `encode` made, for the same shape"
            raise InvalidInput(f"must be below {self._length}", field="index", value=int(place_Bk.max()), remedy=remedy)
        values_Bk = self._values.decode(raw[self._index_bytes :])
        sparse_BL = torch.zeros(self._blocks, self._length, dtype=self._kind, device=raw.device)
        return sparse_BL.scatter_(1, place_Bk, values_Bk).view(-1)[: self._size].view(self._shape)


class LowRank(Codec):
    """x ~ P Q, [m, r] [r, n], by one step of power iteration from the Q before (PowerSGD, Vogels et al. 2019,
    1905.13727). There all workers' P are averaged before Q is made; here each sender's factors are its own, so that one
    message is enough and who leaves takes nothing along. P and Q are kept with r first."""

    def __init__(self, shape: Shape, kind: torch.dtype, rank: int, quantised: bool) -> None:
        rows, columns = shape
        self._rank, self._columns, self._kind = min(rank, rows, columns), columns, kind
        self._p = _dense((self._rank, rows), kind, quantised)
        self._q = _dense((self._rank, columns), kind, quantised)
        self.num_bytes = self._p.num_bytes + self._q.num_bytes

    def encode(self, x: Tensor, warm: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raw_p, _ = self._p.encode(torch.linalg.qr(x @ self._begin(x, warm).T).Q.T, None)
        q_rn = self._p.decode(raw_p) @ x
        raw_q, _ = self._q.encode(q_rn, None)
        return torch.cat([raw_p, raw_q]), q_rn

    def decode(self, raw: Tensor) -> Tensor:
        p_rm, q_rn = self._p.decode(raw[: self._p.num_bytes]), self._q.decode(raw[self._p.num_bytes :])
        x_mn = p_rm[0].unsqueeze(1) * q_rn[0]
        for p_m, q_n in zip(p_rm[1:], q_rn[1:], strict=True):
            x_mn += p_m.unsqueeze(1) * q_n
        return x_mn

    def _begin(self, x: Tensor, warm_rn: Tensor | None) -> Tensor:
        """Directions [r, n] to start from: rows that came to nothing begin anew, else they would stay there."""
        generator = torch.Generator().manual_seed(self._columns)
        fresh_rn = torch.randn(self._rank, self._columns, generator=generator, dtype=self._kind).to(x.device)
        if warm_rn is None:
            return fresh_rn
        length_r1 = torch.linalg.vector_norm(warm_rn, dim=1, keepdim=True)
        return torch.where(length_r1 > 0, warm_rn / length_r1, fresh_rn)


def _dense(shape: Shape, kind: torch.dtype, quantised: bool) -> Codec:
    return Scaled(shape, kind, torch.int8) if quantised else Plain(shape, kind)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _typed(raw: Tensor, dtype: torch.dtype, shape: Shape) -> Tensor:
    return raw.clone().view(dtype).view(shape)  # what lies at an odd address cannot be viewed as numbers
