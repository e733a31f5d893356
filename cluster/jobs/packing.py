"""Documents of any length into sequences of one length, and those into another order. S: tokens a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
TokenIds = Sequence[int] | npt.NDArray[np.integer]


def pack(documents: Iterable[TokenIds], sequence_length: int, eos_id: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yields sequences [S]: the documents in their order, `eos_id` after each, cut every S tokens.

    Only the tail that fills no sequence is dropped. A sequence is both input and labels: the model shifts. Each has its
    own memory: one that is kept, as in a window, does not keep the document that it was cut from.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be positive, got {sequence_length}")
    parts: list[npt.NDArray[np.int64]] = []
    num_tokens = 0
    end = np.asarray([eos_id], dtype=np.int64)
    for document in documents:
        parts += (np.asarray(document, dtype=np.int64), end)
        num_tokens += len(document) + 1
        if num_tokens < sequence_length:
            continue
        tokens = np.concatenate(parts)
        whole = num_tokens - num_tokens % sequence_length
        yield from map(np.copy, tokens[:whole].reshape(-1, sequence_length))
        parts, num_tokens = [tokens[whole:]], num_tokens - whole


def shuffle_window(items: Iterable[T], size: int, seed: int) -> Iterator[T]:
    """The items in another order that depends on `seed` alone, with `size` of them in memory.

    Neighbours come apart by about `size`, which is what training wants from a stream: parts of one document resemble
    each other, and a batch made of them says little more than one of them.
    """
    rng = np.random.default_rng(seed)
    window: list[T] = []
    for item in items:
        window.append(item)
        if len(window) >= size:
            yield _take(window, rng)
    while window:
        yield _take(window, rng)


def _take(window: list[T], rng: np.random.Generator) -> T:
    chosen = int(rng.integers(len(window)))
    window[chosen], window[-1] = window[-1], window[chosen]
    return window.pop()
