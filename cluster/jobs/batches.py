"""What a step trains on, and what an evaluation measures, from a stream of tokenised documents.

B: sequences a micro-batch; S: tokens a sequence; A: micro-batches a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from actors.errors import InvalidInput
from cluster.config import BatchConfig
from cluster.jobs.packing import TokenIds, pack, shuffle_window

MicroBatch = npt.NDArray[np.int64]
"""Token ids [B, S]; the labels too, the model shifts them."""

EVALUATION_POOL = 64
"""Held-out documents that an evaluation looks at: bounds its memory and its time to start."""


SHUFFLE_WINDOW = 8192
"""Sequences. Unshuffled, a batch is one stretch of one file: the same 180 steps of a small model ended at 2.64 nats a
byte on held-out text in file order, at 2.22 shuffled."""


class StepBatches:
    """Iterator over steps: each item is the A micro-batches [B, S] of one step.

    `step` is the number of steps given out so far. The same documents give the same batches, so a job continues at
    step t from a fresh stream with `start_step=t`: the batches before are read and thrown away.
    `shuffle_seed` None keeps the order of the documents.
    """

    def __init__(
        self,
        documents: Iterable[TokenIds],
        batch: BatchConfig,
        eos_id: int,
        *,
        shuffle_seed: int | None = None,
        start_step: int = 0,
    ) -> None:
        sequences = pack(documents, batch.sequence_length, eos_id)
        self._sequences = sequences if shuffle_seed is None else shuffle_window(sequences, SHUFFLE_WINDOW, shuffle_seed)
        self._batch = batch
        self.step = 0
        for _ in itertools.islice(self, start_step):
            pass

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        shape = (self._batch.gradient_accumulation, self._batch.sequences, self._batch.sequence_length)
        step = list(itertools.islice(self._sequences, shape[0] * shape[1]))
        if len(step) < shape[0] * shape[1]:
            raise StopIteration
        self.step += 1
        return list(np.stack(step).reshape(shape))


def evaluation_batches(
    documents: Iterable[TokenIds], batch: BatchConfig, eos_id: int, num_batches: int
) -> list[MicroBatch]:
    """At most `num_batches` micro-batches [B, S], spread evenly over the first `EVALUATION_POOL` documents.

    Documents differ far more than parts of one document do: the first sequences alone would measure one document.
    """
    pool = list(pack(itertools.islice(documents, EVALUATION_POOL), batch.sequence_length, eos_id))
    num_batches = min(num_batches, len(pool) // batch.sequences)
    if num_batches == 0:
        raise InvalidInput(
            f"the held-out documents fill {len(pool)} sequences of {batch.sequence_length} tokens, "
            f"too few for a batch of {batch.sequences}",
            field="data.heldout_every",
            remedy="hold out more documents, or set eval.every_steps to 0",
        )
    chosen = np.linspace(0, len(pool) - 1, num_batches * batch.sequences).round().astype(int)
    return list(np.stack([pool[i] for i in chosen]).reshape(num_batches, batch.sequences, batch.sequence_length))
