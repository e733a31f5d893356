"""A key-value cache of slots, so that streams of different length decode in one forward.

Each slot holds one stream and has a length of its own: a forward writes the token of row b at position `lengths[b]` of
slot b, and the masks let it look at no position behind that. The slots in use are always the first ones, so that what a
forward reads is a view and not a copy.

Letters: B slots, H heads, S positions, W width of a head. Families that keep latents (DeepSeek) have H = 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from actors.moe.gating import GatePast
from actors.trunk import latents

BLOCK = 128
"""Positions that memory grows by, at least."""


@dataclass(frozen=True)
class Layout:
    """What a decoder's layers look at."""

    windows: tuple[int | None, ...]
    """Of each layer: positions it looks back over, its own included; None: over all."""
    masks_by_type: bool
    """Whether the forward takes a mask for each type of layer."""
    additive: bool
    """Whether masks are added to scores, and not booleans."""


def layout_of(model: PreTrainedModel) -> Layout | None:
    """None for a model whose streams cannot share a forward by masks and positions alone: layers that keep other things
    than keys and values, or attention that takes no mask."""
    attention = model.config._attn_implementation
    windows: list[int | None] = []
    for layer in DynamicCache(config=model.config.get_text_config()).layers:
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        else:
            return None
    by_type = _takes_masks_by_type(model)
    if not windows or attention not in ("eager", "sdpa", latents.NAME) or (len(set(windows)) > 1 and not by_type):
        return None
    return Layout(tuple(windows), by_type, attention == "eager")


def _takes_masks_by_type(model: PreTrainedModel) -> bool:
    """Families with several types of layers ask for a dict in so many words; the others take one tensor only."""
    source = inspect.getsource(inspect.unwrap(type(model.base_model).forward))
    return "attention_mask, dict)" in source


@dataclass(frozen=True)
class Window:
    """Where the rows of one forward write, and how far they look."""

    position_B: Tensor
    """int64, on the device."""
    length: int
    """Positions 0 to `length` - 1 are looked at, as far as the masks let."""

    @property
    def num_rows(self) -> int:
        return len(self.position_B)

    def visible_B11S(self, window: int | None) -> Tensor:
        """Which positions each row looks at."""
        position_S = torch.arange(self.length, device=self.position_B.device)
        last_B1 = self.position_B.unsqueeze(1)
        visible_BS = position_S <= last_B1
        if window is not None:
            visible_BS &= position_S > last_B1 - window
        return visible_BS[:, None, None, :]

    @cached_property
    def all_B11S(self) -> Tensor:
        return self.visible_B11S(None)

    def masks(self, layout: Layout, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """What the model takes as its attention mask."""
        names = {window: "full_attention" if window is None else "sliding_attention" for window in layout.windows}
        masks = {name: self._mask(self.visible_B11S(window), layout, dtype) for window, name in names.items()}
        return masks if layout.masks_by_type else masks.popitem()[1]

    @staticmethod
    def _mask(visible_B11S: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        if not layout.additive:
            return visible_B11S
        zeros_B11S = torch.zeros(visible_B11S.shape, dtype=dtype, device=visible_B11S.device)
        return zeros_B11S.masked_fill_(~visible_B11S, torch.finfo(dtype).min)


class SlotBuffer:
    """Keys and values of one layer. What is not in use is finite: masked scores times NaN would be NaN."""

    def __init__(self) -> None:
        self._parts: tuple[Tensor, ...] = ()
        """Keys and values, [B, H, S, W] each; W may differ."""

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def reserve(self, num_slots: int, num_positions: int) -> None:
        """Room for so many at least; what is there stays. Before the first `put` nothing happens."""
        self._parts = tuple(_with_room(part, num_slots, num_positions) for part in self._parts)

    def put(self, slot: int, new: Sequence[Tensor], end: int, room: tuple[int, int]) -> None:
        """Keys and values [H, S, W] of the positions up to `end`, those before `end` - S being looked at no more."""
        if not self._parts:
            self._parts = tuple(part.new_zeros(room[0], part.shape[0], room[1], part.shape[2]) for part in new)
        for part, own in zip(new, self._parts, strict=True):
            own[slot, :, end - part.shape[1] : end] = part

    def write(self, window: Window, new: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, 1, W] of the rows' new tokens -> those of all positions that are looked at."""
        rows = window.num_rows
        for part, own in zip(new, self._parts, strict=True):
            index_BHSW = window.position_B.view(rows, 1, 1, 1).expand(part.shape)
            own[:rows].scatter_(2, index_BHSW, part.to(own.dtype))
        keys, values = (own[:rows, :, : window.length] for own in self._parts)
        return keys, values

    def move(self, source: int, target: int, length: int) -> None:
        for own in self._parts:
            own[target, :, :length] = own[source, :, :length]


def _with_room(part: Tensor, num_slots: int, num_positions: int) -> Tensor:
    slots, heads, positions, width = part.shape
    if slots >= num_slots and positions >= num_positions:
        return part
    grown = part.new_zeros(max(slots, num_slots), heads, max(positions, num_positions), width)
    grown[:slots, :, :positions] = part
    return grown


class _SlotLayer(CacheLayerMixin):
    """As transformers sees one layer. Masks and positions are made here, not from what it answers."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.buffer = SlotBuffer()
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory comes with the first stream."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.buffer.write(self._slots.window, (key_states, value_states))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.window.length, 0

    def get_seq_length(self) -> int:
        return self._slots.window.length - 1

    def get_max_length(self) -> int:
        return -1


class _SlotPast(GatePast):
    """What a gate keeps of the streams in the slots, for the forward at hand."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.buffer = SlotBuffer()
        self._slots = slots

    @property
    def mask(self) -> Tensor | None:
        return self._slots.window.all_B11S

    def extend(self, keys_BASH: Tensor, values_BASH: Tensor) -> tuple[Tensor, Tensor]:
        return self.buffer.write(self._slots.window, (keys_BASH, values_BASH))


class Slots:
    """Of one model. `lengths[b]` positions of slot b are taken, so that its next token is at that position."""

    def __init__(self, layout: Layout, device: torch.device, *, max_slots: int, max_positions: int) -> None:
        self.layout = layout
        self.lengths: list[int] = []
        self.cache = Cache(layers=[_SlotLayer(self) for _ in layout.windows])
        self.pasts: list[_SlotPast] | None = None
        self.window = Window(torch.zeros(0, dtype=torch.int64), 0)
        self.generation = 0
        """Counts how often memory has been another."""
        self._device = device
        self._max_slots, self._max_positions = max_slots, max_positions
        self.room = (0, 0)
        """Slots and positions that there is memory for."""

    @property
    def num_bytes(self) -> int:
        return sum(buffer.num_bytes for buffer in self._buffers())

    @property
    def num_free(self) -> int:
        return self._max_slots - len(self.lengths)

    def add(self, cache: Cache, pasts: Sequence[GatePast] | None, length: int, row: int = 0) -> None:
        """A stream takes the next slot, with what a forward over its `length` tokens has kept in this row."""
        assert self.num_free
        slot = len(self.lengths)
        self._make_room(slot + 1, length + 1)
        for layer, own in zip(cache.layers, self.cache.layers, strict=True):
            own.buffer.put(slot, (layer.keys[row], layer.values[row]), length, self.room)
        if pasts is not None:
            self.pasts = self.pasts or [_SlotPast(self) for _ in pasts]
            for past, own_past in zip(pasts, self.pasts, strict=True):
                if past.length:
                    own_past.buffer.put(slot, [part[row] for part in past.kept()], length, self.room)
        self.lengths.append(length)

    def remove(self, slot: int) -> None:
        """The last stream moves there."""
        last = len(self.lengths) - 1
        if slot != last:
            for buffer in self._buffers():
                buffer.move(last, slot, self.lengths[last])
            self.lengths[slot] = self.lengths[last]
        self.lengths.pop()

    def begin(self) -> Window:
        """Before a forward of one token of every stream."""
        self._make_room(len(self.lengths), max(self.lengths) + 1)
        self.window = Window(torch.tensor(self.lengths, device=self._device), max(self.lengths) + 1)
        return self.window

    def reserve(self, num_slots: int, num_positions: int) -> None:
        """Room for so many, within the bounds."""
        self._make_room(min(num_slots, self._max_slots), min(num_positions, self._max_positions))

    def _make_room(self, num_slots: int, num_positions: int) -> None:
        slots, positions = self.room
        if slots >= num_slots and positions >= num_positions:
            return
        if slots < num_slots:
            slots = min(self._max_slots, max(num_slots, 2 * slots))
        if positions < num_positions:
            positions = min(_blocks(self._max_positions), _blocks(max(num_positions, 2 * positions)))
        self.room = slots, positions
        self.generation += 1
        for buffer in self._buffers():
            buffer.reserve(slots, positions)

    def _buffers(self) -> list[SlotBuffer]:
        return [layer.buffer for layer in self.cache.layers] + [past.buffer for past in self.pasts or ()]


def _blocks(num_positions: int) -> int:
    return -(-num_positions // BLOCK) * BLOCK
