"""The step of a batch as CUDA graphs, replayed instead of being launched operation by operation.

    graph 0: embedding ... gate of layer 0 | experts of layer 0, over their links | graph 1: ... gate of layer 1 | ...

A graph ends where a MoE layer calls its experts and the next begins with a buffer for what they answer; between the
two tokens go out as always. One graph holds the whole step where all experts are in this process and on this device, so
that they are computed inside (`actors.router.inplace`), or where this device reaches those of all expert actors, which
then replay their part of the step at the same time (`actors.router.apart`).

Shapes are static: a step has 1, 2, 4, ... rows, of which the last may be unused, and looks at 128, 256, 512, ...
positions. A graph reads weights and caches where they were when it was captured. In-place updates are seen; what moves
them (another view, more room in the slots, copies of weights) is noticed before the replay, which is then not made.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.errors import LinkTimeout, NonFinite, PeerLost
from actors.router.batch import Launched, plain_forward
from actors.router.slots import BLOCK, Slots, Window
from actors.trunk.model import is_experts
from actors.trunk.shared import Meanwhile, nothing

logger = logging.getLogger(__name__)

SEEN_BEFORE = 3
"""Steps of the same shapes that are made without a graph first: a passing state of the batch is not worth one."""
MAX_STEPS = 8
"""Captured at a time; the one that was used longest ago goes."""
SETTLED_AFTER = 100
"""Steps without a move of the experts' weights after which they are captured again."""


class Done(Protocol):
    """What a device has to do, as a CUDA event tells it."""

    def query(self) -> bool: ...


class Inside(Protocol):
    """The experts of one captured step, as its graph computes them."""

    is_here: bool
    """Whether their weights are this process's, so that what changes them has to come after a replay."""

    def arrange(self, num_layers: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> bool:
        """Before it is captured; tensors as those of each layer. False where it cannot be now."""
        ...

    def layer(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, meanwhile: Meanwhile) -> Tensor:
        """While it is captured: sums [T, D]. `meanwhile` may be called."""
        ...

    def begin(self) -> bool:
        """Before each replay. False where something has moved, so that it must not be made."""
        ...

    def finish(self, done: Done) -> None:
        """Until it is `done`, after it was launched. An error where what it gives counts nothing."""
        ...


@dataclass(frozen=True)
class Standing:
    """Where experts are."""

    placement: Hashable
    """Which of them are in which rows of the stacks."""
    parts: Sequence[object]
    """What must be the very same for a graph to hold: weights of each layer's stacks, or the ways to their actors."""
    inside: Callable[[], Inside]
    is_over: Callable[[], bool] = lambda: False
    """Whether one of those parts has ended: what holds it is to let go of it."""

    def is_as(self, other: Standing) -> bool:
        if self.placement != other.placement:
            return False
        return all(mine is theirs for mine, theirs in zip(self.parts, other.parts, strict=True))


class Experts(Protocol):
    """The experts of every MoE layer."""

    def holding(self) -> AbstractContextManager[Standing | None]:
        """Inside, nothing moves or changes that a graph depends on, or `Inside.begin` tells. None where they cannot be
        in a graph."""
        ...


class Nowhere:
    """Experts that are in no graph."""

    def holding(self) -> AbstractContextManager[None]:
        return nullcontext()


class FirstOf:
    """Experts wherever the first of these finds them."""

    def __init__(self, *candidates: Experts) -> None:
        self._candidates = candidates

    @contextmanager
    def holding(self) -> Iterator[Standing | None]:
        for experts in self._candidates:
            with experts.holding() as standing:
                if standing is not None:
                    yield standing
                    return
        yield None


class Moved(Exception):
    """A step cannot be replayed, or captured, as things are now."""


@dataclass(frozen=True)
class _Call:
    """Of a MoE layer's experts, between two graphs."""

    module: nn.Module
    inputs: tuple[Tensor, Tensor, Tensor]
    output_TD: Tensor

    def make(self, rows: int) -> None:
        x_TD, ids_TK, weights_TK = self.inputs
        y_TD = self.module.__dict__["remote"](x_TD[:rows], ids_TK[:rows], weights_TK[:rows])
        self.output_TD[:rows].copy_(y_TD)


class Replay:
    """Of a captured step with its experts: one that the device has begun, or will when it is through with the last."""

    def __init__(self, inside: Inside, done: torch.cuda.Event, told_2B: Tensor) -> None:
        self._inside, self._done, self._told_2B = inside, done, told_2B

    def wait(self) -> None:
        """`PeerLost`, `LinkTimeout`: what it gives counts nothing."""
        self._inside.finish(self._done)
        self._done.synchronize()

    def tokens(self, num_rows: int) -> list[int]:
        """The likeliest next token of each row, once it is there."""
        self.wait()
        tokens: list[int]
        tokens, are_finite = self._told_2B[:, :num_rows].tolist()
        if not all(are_finite):
            raise NonFinite("gate scores are not finite", step=0)
        return tokens

    def abandon(self) -> None:
        """Nobody wants to know what it gives."""
        with contextlib.suppress(PeerLost, LinkTimeout):
            self.wait()


class CapturedStep:
    """One forward of up to `num_rows` streams over `length` positions, on a CUDA device."""

    def __init__(
        self,
        model: PreTrainedModel,
        slots: Slots,
        num_rows: int,
        length: int,
        standing: Standing | None,
        tokens: Sequence[int],
    ) -> None:
        """`standing`: of experts that are to be inside. `tokens`: of the step that comes next, at whose positions keys
        and values are written while it is captured. `Moved` where experts cannot be inside now."""
        device = next(model.parameters()).device
        self.num_rows, self.length = num_rows, length
        self._inside = None if standing is None else standing.inside()
        self._model = weakref.ref(model)
        self._slots, self._generation = slots, slots.generation
        self._tensors = [*model.parameters(), *model.buffers()]
        self._places = _places(self._tensors)
        self._standing = standing
        self._input_2B = torch.zeros(2, num_rows, dtype=torch.int64, device=device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._calls: list[_Call] = []
        self._weights_TK: list[Tensor] = []
        """Of each layer's gate; only where experts are computed inside."""
        self._told_2B = torch.zeros(2, num_rows, dtype=torch.int64, device=device)
        """Of each row its likeliest next token, and whether all gates gave it finite weights; likewise."""
        self._heard_2B = [torch.zeros(2, num_rows, dtype=torch.int64, pin_memory=device.type == "cuda") for _ in "ab"]
        """The same on the host, of a step and of the one before, which may still be read."""
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._put(tokens, slots.lengths)
        self._capture(model)

    @property
    def is_whole(self) -> bool:
        """Whether experts are computed inside."""
        return self._inside is not None

    def is_of(self, model: PreTrainedModel, slots: Slots) -> bool:
        """Whether trunk and caches are still where they were."""
        return (
            self._model() is model and slots.generation == self._generation and _places(self._tensors) == self._places
        )

    @property
    def is_over(self) -> bool:
        """Whether what its graph goes through has ended, which waits for the graph's end in its turn."""
        return self._standing is not None and self._standing.is_over()

    def has(self, standing: Standing | None) -> bool:
        """Whether the experts are, too."""
        return standing is not None and self._standing is not None and self._standing.is_as(standing)

    def run(self, tokens: Sequence[int], lengths: Sequence[int], meanwhile: Meanwhile) -> Tensor:
        """-> logits [B, V] of these rows, until the next run. `Moved` where experts are not as they were. Calls
        `meanwhile` while the device computes."""
        rows = len(tokens)
        self._slots.window = Window(self._input_2B[1, :rows], self.length)
        if self.is_whole:
            replay = self.launch(tokens, lengths)
            meanwhile()
            replay.tokens(rows)
        else:
            self._put(tokens, lengths)
            self._run_parts(rows, meanwhile)
        return self._logits_BV[:rows]

    def _run_parts(self, rows: int, meanwhile: Meanwhile) -> None:
        for graph, call in zip(self._graphs, [*self._calls, None], strict=True):
            graph.replay()
            meanwhile()
            if call is not None:
                call.make(rows)

    def launch(self, tokens: Sequence[int] = (), lengths: Sequence[int] = ()) -> Replay:
        """Of a whole step. Without `tokens`: each row goes on with the likeliest one after the last launch, which need
        not be through. `Moved` as in `run`."""
        assert self._inside is not None
        if tokens:
            self._put(tokens, lengths)
        # What is launched here after others have begun must wait for nothing that may wait for them: not for what other
        # threads put into this thread's stream meanwhile.
        self._stream.wait_stream(torch.cuda.current_stream())
        self._heard_2B.reverse()
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            if not self._inside.begin():
                raise Moved
            self._graphs[0].replay()
            self._heard_2B[0].copy_(self._told_2B, non_blocking=True)
            done.record(self._stream)
        if self._inside.is_here:
            torch.cuda.current_stream().wait_event(done)
        return Replay(self._inside, done, self._heard_2B[0])

    def _put(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """Rows that are not used write to the beginning of slots that are free."""
        unused = [0] * (self.num_rows - len(tokens))
        self._input_2B.copy_(torch.tensor([[*tokens, *unused], [*lengths, *unused]]))

    def _capture(self, model: PreTrainedModel) -> None:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream), torch.no_grad():
            shapes: list[tuple[Tensor, Tensor, Tensor]] = []
            with _instead_of_experts(model, partial(self._warm, shapes)):
                self._forward(model)  # whatever libraries do when they are first used must not be captured
            torch.cuda.synchronize()
            if self._inside is not None and not self._inside.arrange(len(shapes), *shapes[0]):
                raise Moved
            with _instead_of_experts(model, self._cut):
                self._begin()
                try:
                    self._logits_BV = self._forward(model)
                    if self._inside is not None:
                        self._conclude()
                finally:
                    self._graphs[-1].capture_end()
        torch.cuda.synchronize()

    def _forward(self, model: PreTrainedModel) -> Tensor:
        self._slots.window = window = Window(self._input_2B[1], self.length)
        logits_BV: Tensor = model(
            input_ids=self._input_2B[0].unsqueeze(1),
            position_ids=window.position_B.unsqueeze(1),
            attention_mask=window.masks(self._slots.layout, model.dtype),
            past_key_values=self._slots.cache,
            use_cache=True,
        ).logits[:, -1]
        return logits_BV

    def _conclude(self) -> None:
        """What the host is told of the step, and what the next one begins with unless it is told something else."""
        token_B = self._logits_BV.argmax(dim=-1)
        finite_B = torch.isfinite(torch.stack(self._weights_TK)).all(dim=2).all(dim=0)
        self._weights_TK.clear()
        self._told_2B.copy_(torch.stack((token_B, finite_B.to(token_B.dtype))))
        self._input_2B[0].copy_(token_B)
        self._input_2B[1].add_(1)

    def _begin(self) -> None:
        self._graphs.append(torch.cuda.CUDAGraph())
        # Other threads train meanwhile: what they do is no concern of this capture.
        self._graphs[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

    @staticmethod
    def _warm(
        shapes: list[tuple[Tensor, Tensor, Tensor]],
        layer: int,
        module: nn.Module,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        meanwhile: Meanwhile = nothing,
        /,
    ) -> Tensor:
        shapes.append((x_TD, ids_TK, weights_TK))
        return torch.zeros_like(x_TD)

    def _cut(
        self,
        layer: int,
        module: nn.Module,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        meanwhile: Meanwhile = nothing,
        /,
    ) -> Tensor:
        if self._inside is not None:
            self._weights_TK.append(weights_TK)
            return self._inside.layer(layer, x_TD, ids_TK, weights_TK, meanwhile)
        self._graphs[-1].capture_end()
        output_TD = torch.zeros_like(x_TD)
        self._calls.append(_Call(module, (x_TD, ids_TK, weights_TK), output_TD))
        self._begin()
        return output_TD


class CapturedForward(Launched):
    """A batch's forward: captured at shapes that come again and again, as long as nothing moves; else launched.

    `must`: a capture that fails is an error instead of a reason to go on without.
    """

    def __init__(self, experts: Experts, *, must: bool = False) -> None:
        self._experts, self._must = experts, must
        self._steps: dict[tuple[int, int, bool], CapturedStep] = {}
        """By rows, positions and whether experts are inside; the last used last."""
        self._seen: dict[tuple[int, int, bool], int] = {}
        self._given_up = False
        self._calm = SETTLED_AFTER
        """Steps since the experts' weights moved."""
        self.num_replays = self.num_captures = 0

    def __call__(self, model: PreTrainedModel, slots: Slots, tokens: Sequence[int]) -> Tensor:
        if self._given_up:
            return self._plain(model, slots, tokens)
        if any(step.is_over for step in self._steps.values()):
            self._forget_whole()
        with self._experts.holding() as standing:
            self._calm += 1
            step = self._step(model, slots, tokens, standing)
            if step is not None and step.is_whole:
                try:
                    return self._replay(step, slots, tokens)
                except (Moved, PeerLost, LinkTimeout) as error:
                    logger.info("a captured step is computed as usual: %r", error)
                    self._forget_whole()
                    step = None
        # Not inside: here the actors are asked.
        return self._plain(model, slots, tokens) if step is None else self._replay(step, slots, tokens)

    def chain(
        self, model: PreTrainedModel, slots: Slots, tokens: Sequence[int], goes_on: Callable[[], bool]
    ) -> Iterator[list[int]]:
        key = *self._shape(slots), True
        replay = self._launched(key, model, slots, tokens)
        try:
            while replay is not None:
                current, replay = replay, None
                if max(slots.lengths) + 2 <= key[1] and goes_on():
                    replay = self._launched(key, model, slots)
                self.meanwhile()
                yield current.tokens(len(slots.lengths))
        except (PeerLost, LinkTimeout) as error:
            logger.info("a captured step is computed as usual: %r", error)
            self._forget_whole()
        finally:
            if replay is not None:
                replay.abandon()

    def _launched(
        self, key: tuple[int, int, bool], model: PreTrainedModel, slots: Slots, tokens: Sequence[int] = ()
    ) -> Replay | None:
        """Of the step that was captured for this, see `CapturedStep.launch`. None where it was not, or cannot be
        replayed as things are."""
        if (step := self._steps.get(key)) is None:
            return None
        with self._experts.holding() as standing:
            if not step.has(standing) or not step.is_of(model, slots):
                return None
            try:
                replay = step.launch(tokens, slots.lengths)
            except Moved:
                self._forget_whole()
                return None
        self._calm += 1
        self.num_replays += 1
        self._steps[key] = self._steps.pop(key)
        return replay

    def _plain(self, model: PreTrainedModel, slots: Slots, tokens: Sequence[int]) -> Tensor:
        self.meanwhile()
        return plain_forward(model, slots, tokens)

    def _replay(self, step: CapturedStep, slots: Slots, tokens: Sequence[int]) -> Tensor:
        self.num_replays += 1
        return step.run(tokens, slots.lengths, self.meanwhile)

    def _step(
        self, model: PreTrainedModel, slots: Slots, tokens: Sequence[int], standing: Standing | None
    ) -> CapturedStep | None:
        """What was captured for these shapes, or is now; None to go without."""
        whole = standing is not None and self._calm > SETTLED_AFTER
        key = *self._shape(slots), whole
        step = self._steps.pop(key, None)
        if step is not None and step.is_whole and not step.has(standing):
            del step
            self._forget_whole()
            return self._step(model, slots, tokens, standing)
        if step is not None and not step.is_of(model, slots):
            step = None
        if step is None:
            step = self._captured(key, model, slots, tokens, standing)
        if step is not None:
            self._steps[key] = step
        return step

    @staticmethod
    def _shape(slots: Slots) -> tuple[int, int]:
        """Rows and positions of a step, for which there is room then."""
        rows, length = _power_of_2(len(slots.lengths)), _power_of_2(max(slots.lengths) + 1, BLOCK)
        slots.reserve(rows, length)
        return min(rows, slots.room[0]), min(length, slots.room[1])

    def _forget_whole(self) -> None:
        """What is captured with experts that have moved, which nobody else may keep either."""
        self._calm = 0
        self._steps = {key: step for key, step in self._steps.items() if not step.is_whole}

    def _captured(
        self,
        key: tuple[int, int, bool],
        model: PreTrainedModel,
        slots: Slots,
        tokens: Sequence[int],
        standing: Standing | None,
    ) -> CapturedStep | None:
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= SEEN_BEFORE:
            return None
        del self._seen[key]
        rows, length, whole = key
        self.meanwhile()
        while len(self._steps) >= MAX_STEPS:
            del self._steps[next(iter(self._steps))]
        try:
            step = CapturedStep(model, slots, rows, length, standing if whole else None, tokens)
        except (Moved, PeerLost, LinkTimeout):
            self._forget_whole()
            return None
        except Exception as error:  # whatever a family does that a graph cannot hold
            if whole and standing is not None and standing.is_over():  # or what the end of a way does to a capture
                self._forget_whole()
                return None
            if self._must:
                raise
            logger.warning("decoding goes on uncaptured: %s", error)
            self._given_up = True
            self._steps.clear()
            return None
        self.num_captures += 1
        return step


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


@contextmanager
def _instead_of_experts(model: PreTrainedModel, function: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, MoE layers call `function(layer, module, x_TD, ids_TK, weights_TK, meanwhile)` for their experts. What
    could be done meanwhile and is not they do afterwards."""
    modules = [module for module in model.modules() if is_experts(module)]
    before = [module.__dict__["remote"] for module in modules]
    try:
        for layer, module in enumerate(modules):
            module.__dict__["remote"] = partial(function, layer, module)
        yield
    finally:
        for module, remote in zip(modules, before, strict=True):
            module.__dict__["remote"] = remote


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Where the trunk's weights are."""
    return [tensor.data_ptr() for tensor in tensors]


def _power_of_2(number: int, least: int = 1) -> int:
    while least < number:
        least *= 2
    return least
