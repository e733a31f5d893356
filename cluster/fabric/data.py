"""Documents as a Ray Data stream: read and tokenised by a task ahead of need, in an order that depends on nothing but
the config.

One task at a time works ahead until `READ_AHEAD_BYTES` wait for the consumer. Faults in the data travel as values in
the stream, beside the documents, so that the consumer raises them in our own words and Ray logs no stack traces.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.errors import InvalidInput
from cluster.config import DataConfig
from cluster.errors import Unavailable
from cluster.jobs.sources import SourceFile, Split, file_order, is_heldout, list_files, may_contain, read_documents
from cluster.jobs.tokenizer import Tokenizer

READ_AHEAD_BYTES = 32 << 20
BLOCK_BYTES = 1 << 20
"""What a task hands on at a time, also from inside one large file."""
TASK_FILES, TASK_BYTES, MAX_TASKS = 32, 1 << 20, 1000
"""A task reads so many files or bytes, whichever comes first, and one file at least; more where that would make more
than about so many tasks a run."""
CHUNK_CHARACTERS = 256 << 10
"""Characters of documents that a task turns into one table."""
TURN_S = 0.05
"""At most so much later is a block handed on, or the next task started."""
RUN_FILES = 256
"""One execution of the pipeline covers epochs of so many files in sum: starting one costs a fraction of a second,
which a source of a few small files would otherwise pay at each of its many epochs."""


def open_documents(data: DataConfig, split: Split, *, epochs: int | None = None) -> Iterator[str]:
    """The texts of a split, epoch after epoch; `epochs` None goes on for ever.

    Training follows the files in the order of the epoch (`shuffle`: drawn from the seed), held-out documents in
    file order. Documents of white space alone are left out. Close the iterator to end its tasks.
    `InvalidInput` if no file matches, a file cannot be read, or the split is empty; `Unavailable` if Ray fails.
    """
    for batch in _open(data, split, None, epochs):
        yield from batch.column("text").to_pylist()


def open_tokens(
    data: DataConfig, split: Split, tokenizer: Tokenizer, *, epochs: int | None = None
) -> Iterator[npt.NDArray[np.int32]]:
    """As `open_documents`, tokenised in the tasks: an array of token ids a document, without special tokens."""
    for batch in _open(data, split, tokenizer, epochs):
        ids = batch.column("ids").combine_chunks()
        ends = ids.value_lengths().to_numpy(zero_copy_only=False).cumsum()
        yield from np.split(ids.flatten().to_numpy(), ends[:-1])


# --- The stream --------------------------------------------------------------------------------------------------


def _open(data: DataConfig, split: Split, tokenizer: Tokenizer | None, epochs: int | None) -> Iterator[pa.Table]:
    files = list_files(data)
    wanted = [file for file in files if may_contain(file, split, data.heldout_every)]
    if not wanted:
        raise _empty(data, split, len(files))
    epochs_a_run = -(-RUN_FILES // len(wanted))
    for first in itertools.count(0, epochs_a_run):
        last = first + epochs_a_run if epochs is None else min(first + epochs_a_run, epochs)
        if first >= last:
            return
        tasks = _plan(wanted, data, split, range(first, last))
        num_documents = 0
        for batch in _run(tasks, data, split, tokenizer):
            num_documents += batch.num_rows
            yield batch
        if num_documents == 0:
            raise _empty(data, split, len(files))


def _plan(files: Sequence[SourceFile], data: DataConfig, split: Split, epochs: range) -> list[list[SourceFile]]:
    """The files of each task, in order."""
    # Tasks grow with the data, so that a million files do not make a million tasks before the first document.
    most_files = max(TASK_FILES, len(files) * len(epochs) // MAX_TASKS)
    most_bytes = max(TASK_BYTES, sum(file.size_bytes for file in files) * len(epochs) // MAX_TASKS)
    tasks: list[list[SourceFile]] = []
    num_bytes = 0
    for epoch in epochs:
        order = file_order(len(files), data, epoch) if split == "train" else range(len(files))
        for file in (files[i] for i in order):
            num_bytes += file.size_bytes
            if not tasks or len(tasks[-1]) >= most_files or num_bytes > most_bytes:
                tasks.append([])
                num_bytes = file.size_bytes
            tasks[-1].append(file)
    return tasks


def _run(
    tasks: list[list[SourceFile]], data: DataConfig, split: Split, tokenizer: Tokenizer | None
) -> Iterator[pa.Table]:
    items = [{"files": [dataclasses.asdict(file) for file in task]} for task in tasks]
    with ray.data.DataContext.current(_context()):
        # from_items puts its blocks from this process; other sources of Ray Data run tasks that need a free CPU.
        stream = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _read_task,
            fn_kwargs={"data": data, "split": split, "tokenizer": tokenizer},
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=1),
            # Not a fraction: where actors hold every CPU, a task that asks for a part of one waits for ever.
            num_cpus=0,
            # Beside the consumer: blocks elsewhere would keep an expert node from being taken away, or go with it.
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
        )
    batches = iter(stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    try:
        for batch in batches:
            if batch.num_rows:
                yield _documents_of(batch)
    except ray.exceptions.RayError as error:
        raise Unavailable(f"reading {data.source} failed: {error}") from error
    finally:
        batches.close()  # ends the pipeline now, not when the garbage collector comes by


def _documents_of(batch: pa.Table) -> pa.Table:
    """The documents of a batch; raises the fault that it carries, if any."""
    faults = batch.column("fault").drop_null()
    if len(faults):
        raise InvalidInput(faults[0].as_py())
    return batch


class Pause(ExecutionCallback):
    """Between two turns of Ray Data's own loop in this process. It waits until one of its tasks has a block, and a task
    that has worked ahead always has one that nobody wants yet: in Ray 2.60 the loop then goes round without end, and
    takes half a core from the actors on its node for as long as a job trains."""

    def on_execution_step(self, executor: object) -> None:
        time.sleep(TURN_S)


def _context() -> ray.data.DataContext:
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=READ_AHEAD_BYTES
    )
    context.target_max_block_size = BLOCK_BYTES
    # The guard takes a consumer that pauses, say while a lost expert comes back, for a pipeline that hangs.
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Pause]
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that the bars are off
    return context


# --- In the tasks ------------------------------------------------------------------------------------------------


def _read_task(batch: pa.Table, data: DataConfig, split: Split, tokenizer: Tokenizer | None) -> Iterator[pa.Table]:
    files = [SourceFile(**file) for row in batch.column("files").to_pylist() for file in row]
    payload = pa.field("text", pa.large_string()) if tokenizer is None else pa.field("ids", pa.large_list(pa.int32()))
    schema = pa.schema([payload, pa.field("fault", pa.string())])
    yield schema.empty_table()  # a task without documents has a schema too
    try:
        for texts in _chunks(_wanted_texts(files, data, split)):
            column = pa.array(texts, payload.type) if tokenizer is None else _encode(texts, tokenizer)
            yield pa.table([column, pa.nulls(len(texts), pa.string())], schema=schema)
    except InvalidInput as error:
        yield pa.table([pa.nulls(1, payload.type), pa.array([str(error)])], schema=schema)


def _wanted_texts(files: Sequence[SourceFile], data: DataConfig, split: Split) -> Iterator[str]:
    for file in files:
        for row, text in enumerate(read_documents(file, data.text_field)):
            if is_heldout(file.index, row, data.heldout_every) == (split == "heldout") and not text.isspace() and text:
                yield text


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    num_characters = 0
    for text in texts:
        chunk.append(text)
        num_characters += len(text)
        if num_characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> pa.LargeListArray:
    ids = [tokenizer.encode_array(text) for text in texts]
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(ids)))


def _empty(data: DataConfig, split: Split, num_files: int) -> InvalidInput:
    if split == "heldout":
        return InvalidInput(
            f"holds out no document of the {num_files} files",
            field="data.heldout_every",
            value=data.heldout_every,
            remedy="hold out more often, give more documents, or set it and eval.every_steps to 0",
        )
    remedy = "give files with text in them, or lower the share of data.heldout_every"
    return InvalidInput(
        f"no text to train on in {num_files} files", field="data.source", value=data.source, remedy=remedy
    )
