"""Streams that decode together: one thread computes, a forward for the next token of all of them at a time.

A new stream's prompt is computed beside the batch, or with those that wait beside it and are as long: a chunk of it
between two steps. Its keys and values are copied into a slot; from then on it goes with the batch until it ends or is
closed. Streams of another version are another batch, which takes turns with the first.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.errors import PeerLost, StepAborted
from actors.router.prompt import Computed, PromptRun, Wish
from actors.router.sampling import choose_each
from actors.router.served import Served
from actors.router.slots import Slots
from actors.trunk.shared import Meanwhile, nothing
from actors.values import Sampling, TokenEvent

logger = logging.getLogger(__name__)

AHEAD = 32
"""Tokens of a stream that may wait for their reader; with more its row stands still."""
MAX_JOINT_TOKENS = 4096
"""Of prompts that are computed in one forward."""
_POLL_S = 1.0
_CLOSE_S = 30.0


class Forward(Protocol):
    """How a batch's forward is computed."""

    def __call__(self, model: PreTrainedModel, slots: Slots, tokens: Sequence[int]) -> Tensor:
        """The streams' next tokens -> logits [B, V] after them. Keys and values go to the slots, whose lengths stay."""
        ...


class Launched:
    """The half of a forward that is launched whole, and during which the host has time."""

    meanwhile: Meanwhile = staticmethod(nothing)
    """To be called as soon as the device computes, and before anything else that takes time."""

    def chain(
        self, model: PreTrainedModel, slots: Slots, tokens: Sequence[int], goes_on: Callable[[], bool]
    ) -> Iterator[list[int]]:
        """The likeliest token after each stream's last one, then the one after that, and so on: the device begins a
        step before the host knows what the one before has given. `goes_on` is asked before each, when of the one before
        nobody knows yet; whoever iterates counts `slots.lengths` up as tokens come. Gives nothing, or ends, where the
        next step cannot be launched like this."""
        yield from ()


def plain_forward(model: PreTrainedModel, slots: Slots, tokens: Sequence[int]) -> Tensor:
    window = slots.begin()
    ids_B1 = torch.tensor(tokens, device=window.position_B.device).unsqueeze(1)
    out = model(
        input_ids=ids_B1,
        position_ids=window.position_B.unsqueeze(1),
        attention_mask=window.masks(slots.layout, model.dtype),
        past_key_values=slots.cache,
        use_cache=True,
    )
    logits_BV: Tensor = out.logits[:, -1]
    return logits_BV


class Stream:
    """One session: written by the loop, read by one other thread."""

    def __init__(
        self,
        served: Served,
        prompt: Sequence[int],
        sampling: Sampling,
        budget: int,
        end_ids: frozenset[int],
        wish: Wish = Wish(),  # noqa: B008 - a value
    ) -> None:
        self.served, self.prompt, self.sampling, self.wish = served, prompt, sampling, wish
        self.closed = self.ended = False
        self.last_token = -1
        self._budget, self._end_ids = budget, end_ids
        self._num_tokens = 0
        self._untold: list[TokenEvent] = []
        self._events: queue.SimpleQueue[TokenEvent | Exception] = queue.SimpleQueue()

    @property
    def position(self) -> int:
        """Of the token that comes next."""
        return len(self.prompt) + self._num_tokens

    @property
    def is_read(self) -> bool:
        """Whether its reader keeps up."""
        return self._events.qsize() < AHEAD

    @property
    def goes_on(self) -> bool:
        """Whether, as far as is known before its next token is, one more comes after that."""
        is_last = self._num_tokens + 1 >= self._budget
        has_room = self._events.qsize() + len(self._untold) + 2 < AHEAD
        return has_room and not (is_last or self.ended or self.closed or self.sampling.temperature)

    def give(self, token: int, version: int) -> None:
        """Its next token, which the reader hears of with `tell`."""
        self._num_tokens += 1
        self.last_token = token
        is_end = token in self._end_ids
        reason = "end_of_text" if is_end else "length" if self._num_tokens == self._budget else ""
        self.ended = bool(reason)
        self._untold.append(TokenEvent(token, version, reason))

    def tell(self) -> None:
        for event in self._untold:
            self._events.put(event)
        self._untold.clear()

    def fail(self, error: Exception) -> None:
        self.ended = True
        self.tell()
        self._events.put(error)

    def is_wanted(self) -> bool:
        """Whether its prompt is still to be computed. Whoever waits for one that is not is told."""
        try:
            self.wish.check()
        except (StepAborted, TimeoutError) as error:
            if not self.ended:
                self.fail(error)
        return not (self.ended or self.closed)

    def read(self, is_alive: Callable[[], bool], on_read: Callable[[], None]) -> Iterator[TokenEvent]:
        """Tokens until the last one, or the error that ended it. `is_alive`: of the loop; `on_read` tells it."""
        while True:
            try:
                event = self._events.get(timeout=_POLL_S)
            except queue.Empty:
                if is_alive() or not self._events.empty():
                    continue
                raise StepAborted("the decode loop has ended") from None
            on_read()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.finish_reason:
                return


class Batch:
    """Streams of one model; row b of its forwards is slot b. Called by the loop alone."""

    def __init__(
        self, served: Served, slots: Slots, forward: Forward, last_only: Mapping[str, Any], prompt_chunk: int = 0
    ) -> None:
        """`last_only`: arguments by which the model computes logits of the last token alone. `prompt_chunk`: tokens of
        prompts that are computed at a time; 0: all."""
        self.served = served
        self.streams: list[Stream] = []
        self._untold: list[Stream] = []
        """Whose readers have not heard of their last tokens: waking many readers takes as long as launching a step, so
        that they are woken while the next one is computed."""
        if isinstance(forward, Launched):
            forward.meanwhile = self.tell
        self._slots, self._forward, self._last_only = slots, forward, dict(last_only)
        self._prompt_chunk = prompt_chunk

    @property
    def num_free(self) -> int:
        return self._slots.num_free

    def join(self, streams: Sequence[Stream]) -> Joining:
        """Begins with their prompts, which are equally long. Nobody else may join until this is over."""
        chunk = self._prompt_chunk and max(1, self._prompt_chunk // len(streams))
        prompts = [stream.prompt for stream in streams]
        return Joining(self, streams, lambda: PromptRun(self.served, prompts, chunk, self._last_only))

    def first_tokens(self, streams: Sequence[Stream], computed: Computed) -> list[int]:
        return self._chosen(computed.logits_BV, streams)

    def take_in(self, streams: Sequence[Stream], computed: Computed, tokens: Sequence[int]) -> None:
        """Gives their first tokens, those aside that have ended meanwhile. An error that is raised ends all streams
        here, since it came while their slots were written."""
        for row, (stream, token) in enumerate(zip(streams, tokens, strict=True)):
            if not stream.ended:
                stream.give(token, computed.version)
                stream.tell()
            if not stream.ended:
                try:
                    self._slots.add(computed.cache, computed.pasts, len(stream.prompt), row)
                except Exception as error:
                    for lost in streams[row:]:  # nobody else knows of these
                        if not lost.ended:
                            lost.fail(error)
                    raise
                self.streams.append(stream)

    def step(self, is_alone: Callable[[], bool] = lambda: False) -> None:
        """Another token of every stream that is read, and then more for as long as the batch `is_alone`. An error ends
        them all."""
        try:
            try:
                self._step(is_alone)
            except PeerLost as error:  # in the middle; what was written to the slots is written again
                logger.info("a step is computed once more: %s", error)
                self._step(is_alone)
        except Exception as error:
            self.fail(error)

    def _step(self, is_alone: Callable[[], bool]) -> None:
        with self.served.guard(1, self._slots.pasts) as used_version, torch.no_grad():
            model, is_first = self.served.model(), True
            for tokens in self._chain(model, is_alone):
                self._give(tokens, used_version())
                is_first = False
            if not is_first:
                return
            logits_BV, version = self._forward(model, self._slots, self._last_tokens()), used_version()
        self._give(self._chosen(logits_BV, self.streams), version)

    def _chain(self, model: PreTrainedModel, is_alone: Callable[[], bool]) -> Iterator[list[int]]:
        """Of the step that comes and those that follow before anybody else has their turn."""

        def goes_on() -> bool:
            return is_alone() and not self.served.is_awaited() and all(stream.goes_on for stream in self.streams)

        if isinstance(self._forward, Launched) and all(stream.goes_on for stream in self.streams):
            yield from self._forward.chain(model, self._slots, self._last_tokens(), goes_on)

    def _give(self, tokens: Sequence[int], version: int) -> None:
        for slot, (stream, token) in enumerate(zip(self.streams, tokens, strict=True)):
            if stream.is_read and not stream.ended:  # of one that is not read, the same is computed again
                self._slots.lengths[slot] += 1
                stream.give(token, version)
                self._untold.append(stream)
        if not isinstance(self._forward, Launched):
            self.tell()

    def _last_tokens(self) -> list[int]:
        return [stream.last_token for stream in self.streams]

    @staticmethod
    def _chosen(logits_BV: Tensor, streams: Sequence[Stream]) -> list[int]:
        return choose_each(logits_BV, [stream.sampling for stream in streams], [stream.position for stream in streams])

    def tell(self) -> None:
        """Readers hear of all tokens."""
        for stream in self._untold:
            stream.tell()
        self._untold.clear()

    def fail(self, error: Exception) -> None:
        for stream in self.streams:
            stream.fail(error)
        self.drop_ended()

    def drop_ended(self) -> None:
        for slot in reversed(range(len(self.streams))):
            if self.streams[slot].ended or self.streams[slot].closed:
                self._slots.remove(slot)
                last = self.streams.pop()
                if slot < len(self.streams):
                    self.streams[slot] = last
        if not self.streams:  # and no other step
            self.tell()

    @property
    def is_read(self) -> bool:
        return any(stream.is_read for stream in self.streams)


class Joining:
    """Streams on their way into a batch, while their prompts are computed."""

    def __init__(self, batch: Batch, streams: Sequence[Stream], begin: Callable[[], PromptRun]) -> None:
        self.batch, self._streams, self._begin = batch, streams, begin
        self._run: PromptRun | None = None
        self.is_over = False

    def advance(self) -> None:
        """Another chunk, or all that are left where an update waits for them. After the last one the streams are in the
        batch; an error ends them, and one that is raised all streams there."""
        try:
            self._advance()
            while not self.is_over and self._run is not None and self._run.is_awaited:
                self._advance()
            computed = None if self._run is None else self._run.computed
            tokens = [] if computed is None else self.batch.first_tokens(self._streams, computed)
        except Exception as error:
            self.fail(error)
            return
        if computed is not None:
            self.batch.take_in(self._streams, computed, tokens)

    def fail(self, error: Exception) -> None:
        self._end()
        for stream in self._streams:
            if not stream.ended:
                stream.fail(error)

    def _advance(self) -> None:
        if self._run is None:
            self._run = self._begin()
        elif not self._is_wanted():
            self._end()
            return
        self._run.advance()
        if self._run.computed is not None:
            self._end()

    def _is_wanted(self) -> bool:
        """Whether any of them is. Those that are not are told, and go along as long as others are."""
        wanted = [stream.is_wanted() for stream in self._streams]
        return any(wanted)

    def _end(self) -> None:
        self.is_over = True
        if self._run is not None:
            self._run.close()


class DecodeLoop:
    """The thread that computes all batches. It runs while there are streams, and `linger_s` more."""

    def __init__(self, new_batch: Callable[[Served], Batch], *, linger_s: float = 1.0) -> None:
        self._new_batch, self._linger_s = new_batch, linger_s
        self._changed = threading.Condition()
        self._waiting: deque[Stream] = deque()
        self._batches: list[Batch] = []
        self._joining: Joining | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = self._is_resting = False

    def run(self, stream: Stream) -> Iterator[TokenEvent]:
        """Its tokens. Closing the iterator frees its slot."""
        with self._changed:
            if self._is_closed:
                raise StepAborted("the router is closed")
            self._waiting.append(stream)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            yield from stream.read(lambda: self._thread is not None, self._wake)
        finally:
            stream.closed = True
            self._wake()

    def stop(self) -> None:
        """All streams end with an error, after the forward at hand."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def close(self) -> None:
        """Waits until they have."""
        self.stop()
        if (thread := self._thread) is not None:
            thread.join(_CLOSE_S)

    def _wake(self) -> None:
        if self._is_resting:
            with self._changed:
                self._changed.notify()

    def _run(self) -> None:
        while self._rest_until_needed():
            try:
                self._turn()
            except Exception as error:  # the thread must live on, whatever became of these streams
                logger.exception("decoding failed")
                self._fail_all(error)

    def _rest_until_needed(self) -> bool:
        """False when there is nothing more to do: whoever comes then starts another thread."""
        with self._changed:
            self._is_resting = True
            while not self._is_closed:
                if self._has_work():
                    self._is_resting = False
                    return True
                self._tell_all()
                is_idle = not any(batch.streams for batch in self._batches)
                if not self._changed.wait(self._linger_s) and is_idle and not self._has_work():
                    break
            self._fail_all(StepAborted("the router is closed"))
            self._thread, self._is_resting = None, False
            return False

    def _has_work(self) -> bool:
        """Whether somebody waits for something. Streams that are not read do not."""
        return bool(self._waiting or self._joining) or any(
            batch.is_read or any(stream.closed for stream in batch.streams) for batch in self._batches
        )

    def _turn(self) -> None:
        """A chunk of those that join, and a step of every batch."""
        for batch in self._batches:
            batch.drop_ended()
        if self._joining is None and self._waiting:
            first = self._waiting[0]
            batch = self._batch_for(first)
            most = min(batch.num_free, max(1, MAX_JOINT_TOKENS // len(first.prompt)))
            if joining := [stream for stream in self._take_like(first, most) if stream.is_wanted()]:
                self._joining = batch.join(joining)
        if self._joining is not None:
            self._tell_all()
            self._joining.advance()
            self._joining = None if self._joining.is_over else self._joining
        for batch in self._batches:
            if batch.is_read:
                batch.step(self._is_alone)
                batch.drop_ended()
            else:
                batch.tell()
        lasting = [batch for batch in self._batches if batch.served.is_lasting]
        joined = None if self._joining is None else self._joining.batch
        self._batches = [batch for batch in self._batches if batch.streams or batch is joined] or lasting[:1]

    def _is_alone(self) -> bool:
        """Whether one batch is all there is to do."""
        return len(self._batches) == 1 and self._joining is None and not (self._waiting or self._is_closed)

    def _take_like(self, first: Stream, most: int) -> list[Stream]:
        """Those that wait whose prompts can be computed with that of the first, which is among them."""
        key, length = first.served.key, len(first.prompt)
        with self._changed:
            alike = [stream for stream in self._waiting if (stream.served.key, len(stream.prompt)) == (key, length)]
            for stream in alike[:most]:
                self._waiting.remove(stream)
        return alike[:most]

    def _batch_for(self, stream: Stream) -> Batch:
        for batch in self._batches:
            if batch.served.key == stream.served.key and batch.num_free:
                return batch
        batch = self._new_batch(stream.served)
        self._batches.append(batch)
        return batch

    def _tell_all(self) -> None:
        for batch in self._batches:
            batch.tell()

    def _fail_all(self, error: Exception) -> None:
        """Raises nothing, or whoever reads a stream would wait for a thread that is gone. Slots are not touched: a GPU
        on which something has failed may fail at all that follows."""
        if self._joining is not None:
            self._joining.fail(error)
            self._joining = None
        self._tell_all()
        for stream in [stream for batch in self._batches for stream in batch.streams]:
            stream.fail(error)
        self._batches = []
        while self._waiting:
            self._waiting.popleft().fail(error)
