"""An expert actor's inside: owns expert groups, computes for routers, keeps their gradients, applies its own optimizer.

Everything it is asked comes as a `Message` to `handle`, one at a time, whichever link brought it. A training step is a
transaction: forward and backward accumulate under (step, attempt); `prepare` says the gradients are complete; `commit`
applies the optimizer and makes the version the step; `abort` drops everything of that attempt.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.errors import InvalidInput, MoeClusterError, StepAborted
from actors.moe.experts import ExpertStack, Saved, WeightGradients, Work
from actors.optim import OptimizerSettings, adamw, scale_gradients, set_lr, square_sum
from actors.transport.message import Message, error_answer
from actors.trunk.checkpoint import CheckpointReader
from actors.trunk.init import initial_experts
from actors.trunk.model import ModelSource, Skeleton, skeleton

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Attempt:
    """One try at one step. A repeated try has a higher number, which tells late messages of the earlier one apart."""

    step: int
    number: int


class ExpertHost:
    """Owns `groups` (expert group numbers, in local order) of every MoE layer of the model.

    Thread-safe: a lock makes every question and every control call exclusive.
    """

    def __init__(
        self,
        name: str,
        source: ModelSource,
        groups: Sequence[int],
        *,
        group_size: int,
        device: str = "cpu",
        version: int = 0,
    ) -> None:
        self.name = name
        self.groups = tuple(groups)
        self.group_size = group_size
        self.experts = _experts_of(self.groups, group_size)
        self.version = version
        self.tokens = 0
        self._source = source
        self._device = torch.device(device)
        self._skeleton: Skeleton = skeleton(source)
        self._check_experts()
        self._stacks = self._load(source)
        self._lock = threading.Lock()
        self._settings = OptimizerSettings()
        self._optimizer = self._new_optimizer()
        self._memory_bytes = self._measure()
        self._attempt = Attempt(version, 0)
        self._prepared: Attempt | None = None
        self._saved: dict[tuple[int, int], Saved] = {}
        self._deferred: deque[tuple[int, WeightGradients]] = deque()
        self._staged: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        """(group, layer) -> what came of a group that is on its way here."""
        self._handlers: dict[str, Callable[[Message], Message]] = {
            "forward": self._forward,
            "backward": self._backward,
            "prepare": self._prepare,
            "commit": self._commit,
            "abort": self._abort,
            "begin_run": self._begin_run,
            "status": self._status,
            "echo": self._echo,
            "export_layer": self._export_layer,
            "export_experts": self._export_experts,
            "import_experts": self._import_experts,
            "export_group": self._export_group,
            "stage_group": self._stage_group,
            "take_group": self._take_group,
            "drop_group": self._drop_group,
            "load": self._load_model,
        }

    # -- what routers ask ---------------------------------------------------------------------------------------------

    def handle(self, peer: str, question: Message) -> Message:
        """One question, one answer. Never raises: errors of the tree and unexpected ones are answers too."""
        handler = self._handlers.get(question.op)
        if handler is None:
            return error_answer(InvalidInput("unknown operation", field="op", value=question.op))
        with self._lock:
            try:
                return handler(question)
            except MoeClusterError as error:
                logger.info("%s refused %s of %s: %s", self.name, question.op, peer, error)
                return error_answer(error)
            except Exception as error:  # the host must live on, whatever one message does
                logger.exception("%s failed in %s of %s", self.name, question.op, peer)
                return error_answer(error)

    def idle(self) -> bool:
        """Does one piece of deferred work, between questions. False when none is left."""
        with self._lock:
            if self._deferred:
                layer, part = self._deferred.popleft()
                self._stacks[layer].accumulate(part)
            return bool(self._deferred)

    def _forward(self, question: Message) -> Message:
        """Tokens of one layer -> weighted sums. `keep` (training) saves what backward needs, by micro-batch, layer."""
        fields = question.fields
        layer, keep = self._layer(fields), bool(fields.get("keep"))
        if keep:
            self._enter(fields)
        self._check_version(int(fields.get("min_version", 0)))  # type: ignore[arg-type]
        x_TD, token_P, weight_P = question.tensors
        stack = self._stacks[layer]
        work = Work(token_P.to(self._device), list(fields["counts_E"]), weight_P.to(self._device))  # type: ignore[arg-type]
        self._check_tokens(x_TD)
        work.check(x_TD.shape[0], stack.num_experts)
        y_TD, saved = stack(x_TD.to(self._device), work, keep=keep)
        if saved is not None:
            # A second forward of the same micro-batch (activation checkpointing) takes the place of the first.
            self._saved[int(fields["microbatch"]), layer] = saved  # type: ignore[arg-type]
        self.tokens += x_TD.shape[0]
        return Message("ok", {"version": self.version}, (y_TD,))

    def _backward(self, question: Message) -> Message:
        self._enter(question.fields)
        layer = self._layer(question.fields)
        microbatch = int(question.fields["microbatch"])  # type: ignore[arg-type]
        saved = self._saved.pop((microbatch, layer), None)
        if saved is None:
            raise StepAborted(f"micro-batch {microbatch} of layer {layer} has no forward here")
        (grad_y_TD,) = question.tensors
        self._check_tokens(grad_y_TD)
        grad_x_TD, grad_weight_P, part = self._stacks[layer].backward(saved, grad_y_TD.to(self._device))
        if part is not None:
            self._deferred.append((layer, part))
        return Message("ok", {}, (grad_x_TD, grad_weight_P))

    def _prepare(self, question: Message) -> Message:
        """Gradients are complete: answers the sum of their squares. From here on only commit or abort is right."""
        self._enter(question.fields)
        if self._saved:
            raise StepAborted(f"{len(self._saved)} forwards have no backward yet")
        self._finish_deferred()
        for parameter in self._parameters():
            # Experts without a token have a gradient too: zero. Without one the optimizer would pass them over, and
            # neither their moments nor their weights would decay as they do in one process.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = square_sum(self._parameters())
        self._prepared = self._attempt
        return Message("ok", {"square_sum": norm if math.isfinite(norm) else None})

    def _commit(self, question: Message) -> Message:
        fields = question.fields
        step = int(fields["step"])  # type: ignore[arg-type]
        if step == self.version:
            return Message("ok", {"version": self.version})  # repeated: already done
        if self._prepared != Attempt(step, int(fields["attempt"])):  # type: ignore[arg-type]
            raise StepAborted(f"commit of step {step}, prepared is {self._prepared}")
        set_lr(self._optimizer, float(fields["lr"]))  # type: ignore[arg-type]
        scale_gradients(self._parameters(), float(fields["scale"]))  # type: ignore[arg-type]
        self._optimizer.step()
        self._drop_gradients()
        self._memory_bytes = self._measure()
        self.version = step
        return Message("ok", {"version": self.version})

    def _abort(self, question: Message) -> Message:
        attempt = _attempt(question.fields)
        # An abort of a later step must not touch gradients that are prepared: their commit may still be on its way.
        if attempt >= self._attempt and attempt.step == self.version + 1:
            # The next try has a higher number; anything of this one that is still on its way is refused.
            self._attempt = Attempt(attempt.step, attempt.number + 1)
            self._drop_gradients()
        return Message("ok", {"version": self.version})

    def _begin_run(self, question: Message) -> Message:
        """A new job: its optimizer settings, fresh moments."""
        self._settings = OptimizerSettings(**question.fields["optimizer"])  # type: ignore[arg-type]
        self._drop_gradients()
        self._optimizer = self._new_optimizer()
        return Message("ok", {"version": self.version})

    # -- state in and out ---------------------------------------------------------------------------------------------

    def _echo(self, question: Message) -> Message:
        """What a message costs without the experts' computation."""
        return Message("ok", {"version": self.version}, question.tensors[:1])

    def _status(self, question: Message) -> Message:
        return Message("ok", self.status())

    def status(self) -> dict[str, Any]:
        """Cheap and without the lock: it is also the heartbeat of an actor that is busy."""
        return {
            "version": self.version,
            "groups": list(self.groups),
            "experts": self.experts,
            "tokens": self.tokens,
            "memory_bytes": self._memory_bytes,
        }

    def _measure(self) -> int:
        """Bytes of parameters, gradients and optimizer state."""
        tensors: list[Tensor] = [*self._parameters()]
        tensors += [p.grad for p in self._parameters() if p.grad is not None]
        tensors += [t for state in self._optimizer.state.values() for t in state.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _export_layer(self, question: Message) -> Message:
        """Stacked weights of one layer's experts here, in the order of `experts`."""
        stack = self._stacks[self._layer(question.fields)]
        names = sorted(stack._parameters)
        tensors = tuple(stack.get_parameter(n).detach().clone() for n in names)
        return Message("ok", {"names": names, "experts": self.experts, "version": self.version}, tensors)

    def _export_experts(self, question: Message) -> Message:
        """One expert of one layer with its optimizer state: for each of `names` weights, first and second moment."""
        layer, expert = self._layer(question.fields), self._local(question.fields)
        names = sorted(self._stacks[layer]._parameters)
        tensors: list[Tensor] = []
        for name in names:
            tensors += [t[expert].clone() for t in self._with_moments(self._stacks[layer].get_parameter(name))]
        return Message("ok", {"names": names, "version": self.version, "updates": self._updates()}, tuple(tensors))

    def _import_experts(self, question: Message) -> Message:
        """Counterpart of `export_experts`. The update count must be that of the experts already here."""
        layer, expert = self._layer(question.fields), self._local(question.fields)
        names = sorted(self._stacks[layer]._parameters)
        tensors = iter(question.tensors)
        if len(question.tensors) != 3 * len(names):
            raise InvalidInput(f"need {3 * len(names)} tensors", field="tensors", value=len(question.tensors))
        updates = int(question.fields.get("updates", 0))  # type: ignore[arg-type]
        for name in names:
            parameter = self._stacks[layer].get_parameter(name)
            self._write_expert(parameter, expert, [next(tensors) for _ in range(3)], updates)
        return Message("ok", {"version": self.version})

    def _write_expert(self, parameter: Tensor, expert: int, parts: list[Tensor], updates: int) -> None:
        for part in parts:
            if part.shape != parameter.shape[1:] or part.dtype != parameter.dtype:
                raise InvalidInput(
                    f"need {tuple(parameter.shape[1:])} of {parameter.dtype}", field="tensors", value=tuple(part.shape)
                )
        state = self._optimizer.state[parameter]
        if not state:
            state |= _moments(updates, torch.zeros_like(parameter), torch.zeros_like(parameter))
        if int(state["step"]) != updates:
            raise InvalidInput(
                f"the experts here had {int(state['step'])} updates",
                field="updates",
                value=updates,
                remedy="import an expert of the same version",
            )
        with torch.no_grad():
            for target, part in zip((parameter, state["exp_avg"], state["exp_avg_sq"]), parts, strict=True):
                target[expert] = part

    # A group moves between two steps: `export_group` here and `stage_group` there for each layer, `take_group` there,
    # `drop_group` here. Until the last of them the group is whole where it was.

    def _export_group(self, question: Message) -> Message:
        """One layer of a group: weights, first and second moment of each of `names`, stacked."""
        layer, place = self._layer(question.fields), self._span(self._own_group(question.fields))
        stack = self._stacks[layer]
        names = sorted(stack._parameters)
        tensors = [t[place].clone() for name in names for t in self._with_moments(stack.get_parameter(name))]
        return Message("ok", {"names": names, "updates": self._updates()}, tuple(tensors))

    def _stage_group(self, question: Message) -> Message:
        layer, group = self._layer(question.fields), self._new_group(question.fields)
        stack = self._stacks[layer]
        shapes = [stack.get_parameter(n).shape[1:] for n in sorted(stack._parameters) for _ in range(3)]
        if [t.shape for t in question.tensors] != [(self.group_size, *shape) for shape in shapes]:
            raise InvalidInput("other tensors than a group of this model has", field="tensors")
        self._staged[group, layer] = tuple(t.to(self._device, copy=True) for t in question.tensors)
        return Message("ok", {})

    def _take_group(self, question: Message) -> Message:
        """The staged layers become part of the stacks. The group must come from a host of the same version."""
        group = self._new_group(question.fields)
        staged = [self._staged.pop((group, layer), None) for layer in range(len(self._stacks))]
        self._staged.clear()
        if any(part is None for part in staged):
            raise InvalidInput("some layers did not come", field="group", value=group)
        wanted = (question.fields.get("version"), question.fields.get("updates"))
        if wanted != (self.version, self._updates()):
            raise StepAborted(f"group of version and updates {wanted}, here they are {self.version, self._updates()}")

        def arrange(layer: int, number: int, tensor: Tensor) -> Tensor:
            return torch.cat((tensor, staged[layer][number]))  # type: ignore[index]

        self._regroup((*self.groups, group), arrange)
        return Message("ok", {})

    def _drop_group(self, question: Message) -> Message:
        group = self._own_group(question.fields)
        if len(self.groups) == 1:
            raise InvalidInput(f"{self.name} owns no other", field="group", value=group)
        place = self._span(group)
        kept = torch.ones(len(self.experts), dtype=torch.bool)
        kept[place] = False
        kept_E = kept.nonzero().squeeze(1).to(self._device)
        self._regroup(
            tuple(g for g in self.groups if g != group), lambda layer, number, tensor: tensor.index_select(0, kept_E)
        )
        return Message("ok", {})

    def _regroup(self, groups: tuple[int, ...], arrange: Callable[[int, int, Tensor], Tensor]) -> None:
        """Stacks and optimizer for other groups. `arrange(layer, number, tensor)` gives each new stacked tensor;
        numbers go over weights, first and second moment of each parameter by name."""
        if self._saved or self._prepared or self._deferred:
            raise StepAborted("groups move between steps, and one is under way")
        updates = self._updates()
        arranged = [
            [
                arrange(layer, 3 * number + kind, tensor)
                for number, name in enumerate(sorted(stack._parameters))
                for kind, tensor in enumerate(self._with_moments(stack.get_parameter(name)))
            ]
            for layer, stack in enumerate(self._stacks)
        ]
        names = [sorted(stack._parameters) for stack in self._stacks]
        self._stacks = [
            ExpertStack(layer.template, dict(zip(names[i], arranged[i][::3], strict=True)))
            for i, layer in enumerate(self._skeleton.layers)
        ]
        self.groups = groups
        self.experts = _experts_of(groups, self.group_size)
        self._optimizer = self._new_optimizer()
        for i, stack in enumerate(self._stacks if updates else []):
            for number, name in enumerate(names[i]):
                first, second = arranged[i][3 * number + 1 : 3 * number + 3]
                self._optimizer.state[stack.get_parameter(name)] = _moments(updates, first, second)
        self._memory_bytes = self._measure()

    def _with_moments(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self._optimizer.state.get(parameter, {})
        first, second = (state.get(key) for key in ("exp_avg", "exp_avg_sq"))
        zeros = torch.zeros_like(parameter) if first is None else first
        return parameter.detach(), zeros, zeros if second is None else second

    def _span(self, group: int) -> slice:
        """Places of a group's experts among the local ones."""
        first = self.groups.index(group) * self.group_size
        return slice(first, first + self.group_size)

    def _own_group(self, fields: Any) -> int:
        if (group := fields.get("group")) not in self.groups:
            raise InvalidInput(f"{self.name} does not own it", field="group", value=group)
        return int(group)

    def _new_group(self, fields: Any) -> int:
        group = fields.get("group")
        num_groups = self._skeleton.num_experts // self.group_size
        if type(group) is not int or not 0 <= group < num_groups or group in self.groups:
            raise InvalidInput(
                f"need one of 0 to {num_groups - 1} that {self.name} does not own", field="group", value=group
            )
        return group

    def _load_model(self, question: Message) -> Message:
        """Replaces all weights by those of another directory of the same architecture; moments start anew."""
        source = ModelSource(path=str(question.fields["path"]), dtype=self._source.dtype)
        stacks = self._load(source)
        for mine, loaded in zip(self._stacks, stacks, strict=True):
            for name, parameter in loaded.named_parameters():
                if mine.get_parameter(name).shape != parameter.shape:
                    raise InvalidInput("another architecture", field=name, value=tuple(parameter.shape))
        self._stacks = stacks
        self._drop_gradients()
        self._optimizer = self._new_optimizer()
        return Message("ok", {"version": self.version})

    # -- inside -------------------------------------------------------------------------------------------------------

    def _load(self, source: ModelSource) -> list[ExpertStack]:
        stacks = []
        reader = CheckpointReader(source.path, self._skeleton) if source.path else None
        for number, layer in enumerate(self._skeleton.layers):
            if reader is not None:
                tensors = reader.expert_tensors(layer.name, self.experts)
            else:
                tensors = initial_experts(self._skeleton, number, self.groups, self.group_size, source.seed)
            stacks.append(ExpertStack(layer.template, {n: t.to(self._device) for n, t in tensors.items()}))
        return stacks

    def _enter(self, fields: Any) -> None:
        """Admits a message of the current attempt; a new step may start only after the commit of the last."""
        attempt = _attempt(fields)
        if attempt < self._attempt or attempt.step <= self.version:
            raise StepAborted(
                f"message of {attempt} came after it ended; now at {self._attempt}, version {self.version}"
            )
        if attempt.step != self.version + 1:
            raise StepAborted(f"message of step {attempt.step}, version here is {self.version}")
        if attempt > self._attempt:
            self._drop_gradients()
            self._attempt = attempt

    def _check_version(self, wanted: int) -> None:
        if wanted > self.version:
            raise StepAborted(f"version {wanted} is asked for, {self.version} is here")

    def _check_experts(self) -> None:
        if not self.experts or max(self.experts) >= self._skeleton.num_experts:
            raise InvalidInput(
                f"the model has {self._skeleton.num_experts} experts a layer",
                field="groups",
                value=self.groups,
                remedy=f"with groups of {self.group_size} the last group is "
                f"{self._skeleton.num_experts // self.group_size - 1}",
            )

    def _layer(self, fields: Any) -> int:
        layer = fields.get("layer")
        if type(layer) is not int or not 0 <= layer < len(self._stacks):
            raise InvalidInput(f"must be 0 to {len(self._stacks) - 1}", field="layer", value=layer)
        return layer

    def _local(self, fields: Any) -> int:
        if (expert := fields.get("expert")) not in self.experts:
            raise InvalidInput(f"{self.name} does not own it", field="expert", value=expert)
        return self.experts.index(expert)

    def _check_tokens(self, x_TD: Tensor) -> None:
        width = self._stacks[0].width
        if x_TD.ndim != 2 or x_TD.shape[1] != width or x_TD.dtype != self._skeleton.dtype:
            raise InvalidInput(
                f"need [T, {width}] of {self._skeleton.dtype}", field="x_TD", value=(tuple(x_TD.shape), x_TD.dtype)
            )

    def _finish_deferred(self) -> None:
        while self._deferred:
            layer, part = self._deferred.popleft()
            self._stacks[layer].accumulate(part)

    def _drop_gradients(self) -> None:
        self._saved.clear()
        self._deferred.clear()
        self._prepared = None
        for parameter in self._parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for stack in self._stacks for p in stack.parameters()]

    def _updates(self) -> int:
        return next((int(s["step"]) for s in self._optimizer.state.values() if "step" in s), 0)

    def _new_optimizer(self) -> torch.optim.AdamW:
        named = [(f"{i}.{n}", p) for i, stack in enumerate(self._stacks) for n, p in stack.named_parameters()]
        return adamw(named, self._settings)


def _experts_of(groups: Sequence[int], group_size: int) -> list[int]:
    return [g * group_size + i for g in groups for i in range(group_size)]


def _moments(updates: int, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter. The fused step wants the count on the parameter's device."""
    count = torch.tensor(float(updates), dtype=torch.float32, device=first.device)
    return {"step": count, "exp_avg": first, "exp_avg_sq": second}


def _attempt(fields: Any) -> Attempt:
    return Attempt(int(fields["step"]), int(fields["attempt"]))
