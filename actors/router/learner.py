"""What a router itself learns: trunk, gates and their optimizer; in and out of checkpoints, and through a growth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.compress.pieces import pieces_of
from actors.compress.settings import CompressionSettings
from actors.moe.settings import BalanceSettings, GateSettings
from actors.optim import OptimizerSettings, adamw, scale_gradients, set_lr
from actors.router.growing import Blueprint, GrownTrunk, base_settings, blank_trunk
from actors.router.pieces import bucket_bytes
from actors.router.routing import Opening, Routing
from actors.snapshots import copy_all, moments, set_moments
from actors.trunk.checkpoint import CheckpointReader
from actors.trunk.load import load_trunk, load_weights
from actors.trunk.model import ModelSource, serving_view, skeleton

_OPTIMIZER = "optimizer."
"""Prefix of the moments' names in a snapshot."""
_TRUNK = "trunk."
_ROUTING = "routing."
_OPENING = "opening."
"""Of experts that a growth lets in: between `_ROUTING` and the name."""


class Learner:
    """`trunk` trains, `view` serves from the same weights. Called by the thread that trains, alone."""

    def __init__(self, source: ModelSource, gate: GateSettings, device: str, piece_bytes: int) -> None:
        self.source, self.gate = source, gate
        self.skeleton = skeleton(source)
        self.trunk: PreTrainedModel = load_trunk(source, self.skeleton, device)
        self.view: PreTrainedModel = serving_view(source, self.trunk)
        settings = base_settings(source, gate, self.skeleton.num_experts)
        self.routing = Routing(self.trunk, self.skeleton, settings, source.seed)
        if source.path is not None and source.num_experts is None:
            self.routing.load(Path(source.path))
        self.settings = OptimizerSettings()
        self.optimizer = self._new_optimizer()
        self.memory_bytes = self._measure()
        """With gradients and moments once there was a step."""
        self._piece_bytes = piece_bytes
        self.compress(CompressionSettings())
        self.on_new_model: Callable[[], None] = lambda: None
        """`trunk`, `view` and `routing` are others now: growth, or a return to before one."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self.trunk.get_input_embeddings().weight.device
        return device

    def parameters(self) -> list[nn.Parameter]:
        return [*self.trunk.parameters(), *(p for _, p in self.routing.named_parameters())]

    # -- steps --------------------------------------------------------------------------------------------------------

    def begin_run(self, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.optimizer = self._new_optimizer()

    def follow_rules(self, balance: BalanceSettings, compression: CompressionSettings) -> None:
        """A job's. `InvalidInput` where the model's own gate or the trunk's dtype cannot follow them."""
        self.routing.begin_run(balance)
        self.compress(compression)

    def rules(self) -> dict[str, Any]:
        """As replicas are told."""
        return {"balance": asdict(self.routing.balance), "compression": asdict(self.compression)}

    def compress(self, settings: CompressionSettings) -> None:
        """Gradients travel so between routers from now on; errors of before are forgotten. `InvalidInput` where the
        trunk's dtype cannot be compressed."""
        parameters = self.parameters()
        self.pieces = pieces_of(parameters, settings, bucket_bytes(parameters, self._piece_bytes))
        self.compression = settings

    def update(self, lr: float, scale: float) -> None:
        scale_gradients(self.parameters(), scale)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.pieces.keep()
        self.memory_bytes = self._measure()
        self.optimizer.zero_grad(set_to_none=True)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.pieces.drop()
        self.routing.drop_losses()

    # -- state in and out ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Trunk and gates, without moments; what is tied counts once."""
        own = {f"{_TRUNK}{name}": tensor for name, tensor in self.trunk.state_dict(keep_vars=True).items()}
        own |= {f"{_ROUTING}{name}": tensor for name, tensor in self.routing.tensors().items()}
        if self.routing.opening is not None:
            own |= {f"{_ROUTING}{name}": tensor for name, tensor in self.routing.opening.tensors().items()}
        return {name: own[name] for name in {id(tensor): name for name, tensor in reversed(own.items())}.values()}

    def copied(self) -> dict[str, Tensor]:
        """`state` as it is now, to be kept."""
        return {name: tensor.detach().clone() for name, tensor in self.state().items()}

    def view_of(self, tensors: Mapping[str, Tensor], num_experts: int) -> tuple[PreTrainedModel, Routing]:
        """A view and gates over what was `copied` at another version, and over nothing that is trained.

        `num_experts`: of every layer then; the model may have grown since.
        """
        is_same = num_experts == self.skeleton.num_experts
        settings = self.routing.settings
        blueprint = Blueprint(self.source, self.skeleton, settings) if is_same else self.blueprint(num_experts)
        trunk = {n.removeprefix(_TRUNK): t for n, t in tensors.items() if n.startswith(_TRUNK)}
        gates = {n.removeprefix(_ROUTING): t for n, t in tensors.items() if n.startswith(_ROUTING)}
        view = serving_view(blueprint.source, self.trunk, trunk)
        routing = Routing(view, blueprint.skeleton, blueprint.gate, blueprint.source.seed)
        copy_all(routing.tensors(), {n: t for n, t in gates.items() if not n.startswith(_OPENING)})
        return view, routing

    def moments(self) -> dict[str, Tensor]:
        return moments(self.optimizer, self._named_parameters())

    def take(self, tensors: Mapping[str, Tensor], settings: OptimizerSettings, num_experts: int) -> None:
        """Counterpart of `state` and `moments`, whose number of experts may be another than that of now."""
        found = dict(tensors)
        optimizer = {name: found.pop(name) for name in tensors if name.startswith(_OPTIMIZER)}
        self._reshape(num_experts)
        opening = {name: tensor for name, tensor in found.items() if name.startswith(f"{_ROUTING}{_OPENING}")}
        self.routing.opening = None
        copy_all(self.state(), {name: tensor for name, tensor in found.items() if name not in opening})
        self.routing.opening = Opening.of({name.removeprefix(_ROUTING): t for name, t in opening.items()})
        self.pieces.forget()
        self.begin_run(settings)
        set_moments(self.optimizer, self._named_parameters(), optimizer)

    def load(self, path: str, reader: CheckpointReader) -> None:
        """Weights of another directory of the same architecture; moments start anew."""
        load_weights(self.trunk, reader)
        self.routing.load(Path(path))
        self.routing.opening = None
        self.pieces.forget()
        self.begin_run(self.settings)

    # -- growth -------------------------------------------------------------------------------------------------------

    def blueprint(self, num_experts: int) -> Blueprint:
        return Blueprint.of(self.source, self.routing.settings, self.skeleton.num_experts, num_experts)

    def grow(self, made: GrownTrunk) -> None:
        states = {name: self.optimizer.state.get(parameter) for name, parameter in self._trained()}
        self._put_on(made.blueprint, made.trunk, made.view, made.routing)
        self.optimizer = self._new_optimizer()
        for name, parameter in self._trained():
            if state := states[name]:
                self.optimizer.state[parameter] = {
                    kind: made.moment(name, tensor) if tensor.ndim else tensor for kind, tensor in state.items()
                }
        self.memory_bytes = self._measure()

    def _reshape(self, num_experts: int) -> None:
        """Gates for so many experts, to be filled by what is restored."""
        if num_experts != self.skeleton.num_experts:
            blueprint = self.blueprint(num_experts)
            trunk = blank_trunk(blueprint, self.trunk)
            routing = Routing(trunk, blueprint.skeleton, blueprint.gate, blueprint.source.seed)
            routing.balance = self.routing.balance
            self._put_on(blueprint, trunk, serving_view(blueprint.source, trunk), routing)

    def _put_on(self, blueprint: Blueprint, trunk: PreTrainedModel, view: PreTrainedModel, routing: Routing) -> None:
        self.source, self.skeleton = blueprint.source, blueprint.skeleton
        self.trunk, self.view, self.routing = trunk, view, routing
        self.compress(self.compression)
        self.on_new_model()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [*self.trunk.named_parameters(), *self.routing.named_parameters()]

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._trained():
            yield f"{_OPTIMIZER}{name}", parameter

    def _new_optimizer(self) -> torch.optim.AdamW:
        return adamw(self._trained(), self.settings)

    def _measure(self) -> int:
        """Bytes of parameters, gradients and optimizer state. By the thread that trains alone: a gradient that another
        thread reads while autograd replaces it may be gone already."""
        tensors: list[Tensor] = [*self.parameters()]
        tensors += [p.grad for p in self.parameters() if p.grad is not None]
        tensors += [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)
