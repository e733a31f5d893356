"""The message that crosses a link, and its wire form: a msgpack header frame, then raw tensor frames. No pickle.

Header: `[version, id, op, fields, [[dtype, shape], ...]]`, e.g. `[2, 7, "forward", {}, [["float32", [64, 256]]]]`.
Each tensor is a frame of its own, so that large ones are never copied; the tensors of a small message share one frame,
each padded to `ALIGN_BYTES`, since a frame costs more than the copy. Where the link has a carrier, a tensor that it
brings has no frame, but its place as the third part of its description, and what `told` gives ends the header.
`decode` checks every size against the limits before a tensor exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack
import torch
from torch import Tensor

from actors.errors import InvalidInput, MoeClusterError, NonFinite, ProtocolError, RemoteError, StepAborted, VersionGone

if TYPE_CHECKING:
    from actors.transport.payload.contract import Carrier

WIRE_VERSION = 2
MAX_HEADER_BYTES = 64 << 10
MAX_TENSORS = 16
MAX_DIMS = 8
SHARE_BELOW_BYTES = 1 << 14
ALIGN_BYTES = 16

DTYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Message:
    """`op` says what is asked (or `ok` / `error` in an answer); `fields` are small plain values; tensors come raw.

    Neither side writes into a tensor of a message it sent or received: `local` links pass them without a copy.
    """

    op: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()
    id: int = 0
    """Set by the link; an answer carries the id of its question."""
    via: Carrier | None = field(default=None, compare=False, repr=False)
    """Of the link that brought this question, if it has one: for what is to go beside it."""

    @property
    def num_bytes(self) -> int:
        return sum(map(_num_bytes, self.tensors))

    @property
    def is_of_gpu(self) -> bool:
        """Whether a tensor is on one."""
        return any(tensor.is_cuda for tensor in self.tensors)


def encode(message: Message, carrier: Carrier | None = None) -> list[bytes | memoryview]:
    """Message -> frames. Tensor frames are views: the caller keeps the tensors unchanged until they are sent."""
    places = [carrier.put(t) for t in message.tensors] if carrier is not None else [None] * len(message.tensors)
    specs: list[tuple[Any, ...]] = []
    inline: list[Tensor] = []
    for tensor, place in zip(message.tensors, places, strict=True):
        spec = (NAMES[tensor.dtype], tuple(tensor.shape))
        specs.append(spec if place is None else (*spec, place))
        inline += [tensor] if place is None else []
    told: list[list[int]] = []
    if carrier is not None:
        if len(inline) < len(specs):
            carrier.ship()
        told = [carrier.told()]
    header: bytes = msgpack.packb((WIRE_VERSION, message.id, message.op, message.fields, specs, *told))
    if len(inline) > 1 and sum(map(_num_bytes, inline)) < SHARE_BELOW_BYTES:
        return [header, b"".join(_padded(t) for t in inline)]
    return [header, *(_view(t) for t in inline)]


def decode(frames: Sequence[Any], *, peer: str, max_bytes: int, carrier: Carrier | None = None) -> Message:
    """Frames (bytes or buffers) -> message. `ProtocolError` names the peer and what does not fit."""
    if not frames or len(frames) > MAX_TENSORS + 1:
        raise ProtocolError(f"a message has 1 to {MAX_TENSORS + 1} frames, got {len(frames)}", peer=peer)
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {len(frames[0])} bytes exceeds {MAX_HEADER_BYTES}", peer=peer)
    frame_bytes = sum(map(len, frames))
    if frame_bytes > max_bytes:
        raise ProtocolError(f"message exceeds {max_bytes} bytes", peer=peer)
    try:
        version, number, op, fields, specs, *told = msgpack.unpackb(frames[0])
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"malformed header: {error!r}", peer=peer) from None
    if version != WIRE_VERSION:
        raise ProtocolError(f"wire version {version!r}, this side speaks {WIRE_VERSION}", peer=peer)
    if not isinstance(op, str) or type(number) is not int or not isinstance(fields, dict):
        raise ProtocolError("header fields have wrong types", peer=peer)
    if not isinstance(specs, list) or len(specs) > MAX_TENSORS or not all(map(_are_integers, told)):
        raise ProtocolError(f"header fields have wrong types, or more than {MAX_TENSORS} tensors", peer=peer)
    sizes = [_size_bytes(spec, peer) for spec in specs]
    places = [_place(spec, carrier, peer) for spec in specs]
    carried_bytes = sum(size for size, place in zip(sizes, places, strict=True) if place is not None)
    if frame_bytes + carried_bytes > max_bytes:
        raise ProtocolError(f"message exceeds {max_bytes} bytes", peer=peer)
    inline = [size for size, place in zip(sizes, places, strict=True) if place is None]
    parts = _shared(inline, frames[1], peer) if len(inline) > 1 and len(frames) == 2 else frames[1:]
    if len(inline) != len(parts):
        raise ProtocolError(f"header announces other tensors than the {len(frames) - 1} frames", peer=peer)
    if carrier is not None and told:
        carrier.hear(told[0])
    left = iter(parts)
    tensors = tuple(
        _tensor(spec, next(left), peer) if place is None else carrier.take(DTYPES[spec[0]], spec[1], place)  # type: ignore[union-attr]
        for spec, place in zip(specs, places, strict=True)
    )
    return Message(op, fields, tensors, number)


@dataclass(frozen=True)
class Unreadable:
    """Stands for a message: those before and after it must not be lost with it."""

    error: Exception
    """A `LinkError`, or what a GPU without memory raises, say."""
    id: int
    """0 where it has none."""


def decode_or_not(frames: Sequence[Any], *, peer: str, max_bytes: int, carrier: Carrier | None) -> Message | Unreadable:
    try:
        return decode(frames, peer=peer, max_bytes=max_bytes, carrier=carrier)
    except Exception as error:
        # Without its traceback, whose frames would keep what was being read, and with it room at the peer.
        return Unreadable(error.with_traceback(None), id_of(frames))


def id_of(frames: Sequence[Any]) -> int:
    """Of a message that may be unreadable otherwise, so that its asker can be told. 0 where there is none."""
    if not frames or len(frames[0]) > MAX_HEADER_BYTES:
        return 0
    try:
        number = msgpack.unpackb(frames[0])[1]
    except (ValueError, TypeError, LookupError, msgpack.UnpackException):
        return 0
    return number if type(number) is int and number > 0 else 0


def _are_integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _place(spec: Any, carrier: Carrier | None, peer: str) -> list[int] | None:
    """Where a carrier has brought it; None if it is a frame."""
    if len(spec) == 2:
        return None
    if carrier is None or not _are_integers(spec[2]):
        raise ProtocolError(f"tensor {spec!r} is said to be where nothing can be", peer=peer)
    place: list[int] = spec[2]
    return place


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _padded(tensor: Tensor) -> bytes:
    raw = bytes(_view(tensor))
    return raw + bytes(-len(raw) % ALIGN_BYTES)


def _shared(sizes: list[int], frame: Any, peer: str) -> list[memoryview]:
    """The parts of a frame that several tensors share; sizes are checked by `_tensor` as for frames of their own."""
    view, start, parts = memoryview(frame), 0, []
    for size in sizes:
        parts.append(view[start : start + size])
        start += size + -size % ALIGN_BYTES
    if start != len(view):
        raise ProtocolError(f"tensors of {start} bytes do not fit a frame of {len(view)} bytes", peer=peer)
    return parts


def _view(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.detach().cpu().reshape(-1)  # reshape copies what is not contiguous
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _size_bytes(spec: Any, peer: str) -> int:
    try:
        name, shape = spec if len(spec) == 2 else spec[:2]
        dtype = DTYPES[name]
        sizes_ok = len(spec) <= 3 and len(shape) <= MAX_DIMS and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    except (TypeError, ValueError, KeyError):
        raise ProtocolError(f"malformed tensor description {spec!r}", peer=peer) from None
    if not sizes_ok:
        raise ProtocolError(f"impossible tensor shape {spec!r}", peer=peer)
    size: int = math.prod(shape) * dtype.itemsize
    return size


def _tensor(spec: Any, frame: Any, peer: str) -> Tensor:
    expected = _size_bytes(spec, peer)
    if expected != len(frame):
        raise ProtocolError(f"tensor {spec!r} does not fit a frame of {len(frame)} bytes", peer=peer)
    dtype, shape = DTYPES[spec[0]], spec[1]
    if expected == 0:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(frame, dtype=torch.uint8)
    if tensor.data_ptr() % dtype.itemsize:
        tensor = tensor.clone()
    return tensor.view(dtype).view(shape)


_ERROR_KINDS: Mapping[str, type[MoeClusterError]] = {
    "invalid_input": InvalidInput,
    "step_aborted": StepAborted,
    "non_finite": NonFinite,
    "protocol": ProtocolError,
    "version_gone": VersionGone,
}


def error_answer(error: Exception, question_id: int = 0) -> Message:
    """The answer that tells the other side what went wrong; the text of unexpected errors stays on this side."""
    for kind, cls in _ERROR_KINDS.items():
        if isinstance(error, cls):
            return Message("error", {"kind": kind, "text": str(error)}, id=question_id)
    return Message("error", {"kind": "internal", "text": f"{type(error).__name__} in the actor"}, id=question_id)


def raise_if_error(answer: Message, peer: str) -> Message:
    if answer.op != "error":
        return answer
    kind, text = answer.fields.get("kind"), str(answer.fields.get("text"))
    if kind == "invalid_input":
        raise InvalidInput(f"{text} (said {peer})")
    if kind == "step_aborted":
        raise StepAborted(f"{text} (said {peer})")
    if kind == "version_gone":
        raise VersionGone(f"{text} (said {peer})")
    raise RemoteError(f"{kind}: {text}", peer=peer)
