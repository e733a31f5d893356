"""The gates of a trunk as one object: the model's own or ours in their place, their balance, their files.

A gate of ours works inside the experts call: it decides anew from the tokens, with the projection of the model's own
gate, whose parameter thereby keeps its name in every checkpoint. What the model's gate had decided is not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.errors import CheckpointError, InvalidInput
from actors.moe.balance import balance_loss, bias_update
from actors.moe.gating import ComposedGate, GateContext, GatePast, build_gate
from actors.moe.settings import MODEL_GATE, BalanceSettings, GateSettings
from actors.router.passes import Purpose
from actors.trunk.model import RemoteExperts, Skeleton
from actors.trunk.shared import Meanwhile, nothing

GATES_FILE = "moe_cluster_gates.safetensors"
"""Beside a model's shards: parameters of gates of ours that the model's family has no name for."""
MAX_MICROBATCHES = 1 << 20


class ComputesExperts(Protocol):
    """What the gates give their choices to: a dispatcher, as a rule."""

    @property
    def purpose(self) -> Purpose: ...

    def layer_function(self, layer: int) -> RemoteExperts: ...


@dataclass
class Opening:
    """How experts that a gate's bias keeps out are let in: `rise_LE` is added after each step, while steps are left."""

    rise_LE: Tensor
    left_E: Tensor

    @property
    def is_under_way(self) -> bool:
        return bool((self.left_E > 0).any())

    def tensors(self) -> dict[str, Tensor]:
        return {"opening.rise_LE": self.rise_LE, "opening.left_E": self.left_E}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Opening | None:
        """Counterpart of `tensors`; None without them."""
        if "opening.rise_LE" not in tensors:
            return None
        return Opening(tensors["opening.rise_LE"], tensors["opening.left_E"])


class Routing:
    """Holds the parameters that the trunk itself does not have, and the balance bias where its family has none."""

    def __init__(self, trunk: PreTrainedModel, skeleton: Skeleton, settings: GateSettings, seed: int) -> None:
        self.balance = BalanceSettings()
        self.opening: Opening | None = None
        self._settings = settings
        self._losses: dict[int, dict[int, Tensor]] = {}
        """By micro-batch and layer: one that is computed twice (activation checkpointing) counts once."""
        self._routers: list[Any] = [_router_of(trunk, layer.name) for layer in skeleton.layers]
        self._gates = nn.ModuleList()
        if settings.kind != MODEL_GATE:
            for router in self._routers:
                _check_projection(router, skeleton.num_experts)
            self._gates = _new_gates(skeleton, settings, seed).to(trunk.device)
        self._bias_LE: Tensor | None = None
        if self._gates and not self._model_has_bias:
            self._bias_LE = torch.zeros(len(self._routers), skeleton.num_experts, device=trunk.device)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._gates.named_parameters(prefix="gates")

    def layer_function(self, layer: int, dispatcher: ComputesExperts) -> RemoteExperts:
        """What the experts module of this layer calls: gate, then dispatch."""
        remote = dispatcher.layer_function(layer)
        if not self._gates:
            return remote
        gate = self._gates[layer]

        def gated(x_TD: Tensor, _ids_TK: Tensor, _weights_TK: Tensor, meanwhile: Meanwhile = nothing, /) -> Tensor:
            context = _context(layer, dispatcher.purpose)
            output = gate(x_TD, context, self._routers[layer].weight, self.bias(layer))
            if context.training and self.balance.has_loss:
                losses = self._losses.setdefault(dispatcher.purpose.microbatch, {})
                losses[layer] = balance_loss(self.balance, output, context)
            return remote(x_TD, output.ids_TK, output.weights_TK, meanwhile)

        return gated

    def new_pasts(self) -> list[GatePast] | None:
        """For one decoding session: what gates that look at earlier tokens keep of them."""
        return [GatePast() for _ in self._routers] if self._settings.attention else None

    def begin_run(self, balance: BalanceSettings) -> None:
        """A job's balance rules. `InvalidInput` where the model's own gate cannot follow them."""
        if not self._gates and balance.has_loss:
            raise InvalidInput(
                "balance losses need the gate's scores, which the model's own gate does not give out",
                field="balance",
                remedy="set model.gate.kind, for example to deepseek or top_k, or use bias_speed alone",
            )
        if not self._gates and balance.bias_speed and not self._model_has_bias:
            raise InvalidInput(
                "the model's own gate takes no balance bias",
                field="balance.bias_speed",
                value=balance.bias_speed,
                remedy="set model.gate.kind, for example to top_k",
            )
        self.balance = balance
        self._losses.clear()

    def take_loss(self, microbatch: int) -> Tensor | None:
        """Sum over the layers of its forward, which has just been run; None where no rule has a loss."""
        losses = self._losses.pop(microbatch, {})
        return torch.stack([*losses.values()]).sum() if losses else None

    def drop_losses(self) -> None:
        self._losses.clear()

    @torch.no_grad()
    def update_bias(self, load_LE: Tensor, speed: float) -> None:
        """After a committed step, in place (S13)."""
        if speed:
            for layer, load_E in enumerate(load_LE):
                bias_E = self.bias(layer)
                assert bias_E is not None
                bias_E.copy_(bias_update(bias_E, load_E.to(bias_E.device), speed))

    def bias(self, layer: int) -> Tensor | None:
        if self._model_has_bias:
            bias_E: Tensor = self._routers[layer].e_score_correction_bias
            return bias_E
        return None if self._bias_LE is None else self._bias_LE[layer]

    # -- growth -------------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> GateSettings:
        return self._settings

    @property
    def scores_are_softmax(self) -> bool:
        """Which a common shift of the logits leaves alone. Families with a bias of the choice take the sigmoid."""
        return not self._settings.uses_sigmoid if self._gates else not self._model_has_bias

    @property
    def has_choice_bias(self) -> bool:
        return self._bias_LE is not None or self._model_has_bias

    def router(self, layer: int) -> nn.Module:
        """The family's gate module."""
        return cast(nn.Module, self._routers[layer])

    def gate(self, layer: int) -> ComposedGate | None:
        """Ours, if it is in the place of the family's."""
        return cast(ComposedGate, self._gates[layer]) if self._gates else None

    def biases(self, layer: int) -> list[Tensor]:
        """Every bias of the layer's gate, [E] each: first the one that can keep experts out."""
        of_choice = self.bias(layer)
        of_scores = getattr(self._routers[layer], "bias", None)
        return [bias for bias in (of_choice, of_scores) if isinstance(bias, Tensor)]

    @torch.no_grad()
    def take_over(self, before: Routing, own: Mapping[str, Tensor], opening: Opening | None) -> None:
        """All that a smaller gate was; `own`: the tensors of `tensors` that have another shape here."""
        self.balance, self.opening = before.balance, opening
        values = {**before.tensors(), **own}
        for name, tensor in self.tensors().items():
            tensor.copy_(values[name])

    @torch.no_grad()
    def open_further(self) -> None:
        """After a committed step."""
        if (opening := self.opening) is None:
            return
        rise_LE = opening.rise_LE * (opening.left_E > 0)
        for layer, rise_E in enumerate(rise_LE):
            bias_E = self.biases(layer)[0]
            bias_E += rise_E.to(bias_E)
        opening.left_E = (opening.left_E - 1).clamp_min(0)
        if not opening.is_under_way:
            self.opening = None

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        if tensors := self.tensors():
            save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, directory / GATES_FILE)

    def load(self, directory: Path) -> None:
        """Nothing happens for a directory without the file: gates start as they were drawn."""
        own, file = self.tensors(), directory / GATES_FILE
        if not own or not file.is_file():
            return
        loaded = load_file(file)
        if {n: t.shape for n, t in loaded.items()} != {n: t.shape for n, t in own.items()}:
            raise CheckpointError(
                f"{GATES_FILE} of {directory} holds other gates",
                field="model.gate.kind",
                value=self._settings.kind,
                remedy="give the gate settings that the model was trained with",
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(loaded[name])

    def tensors(self) -> dict[str, Tensor]:
        """What is saved beside the trunk's own tensors."""
        named: dict[str, Tensor] = dict(self.named_parameters())
        return named if self._bias_LE is None else {**named, "bias_LE": self._bias_LE}

    @property
    def _model_has_bias(self) -> bool:
        return hasattr(self._routers[0], "e_score_correction_bias")


def _context(layer: int, purpose: Purpose) -> GateContext:
    return GateContext(
        sequence_length=purpose.sequence_length,
        training=purpose.keep,
        step=purpose.min_version,
        # Not of the attempt: a step that runs again makes the same choices.
        seed=purpose.step * MAX_MICROBATCHES + purpose.microbatch,
        past=purpose.pasts[layer] if purpose.pasts else None,
        layer=layer,
    )


def _router_of(trunk: nn.Module, experts_name: str) -> nn.Module:
    """The family's gate module beside its experts module."""
    block = trunk.get_submodule(experts_name.rpartition(".")[0])
    for name in ("gate", "router"):
        if isinstance(module := getattr(block, name, None), nn.Module):
            return module
    return block


def _new_gates(skeleton: Skeleton, settings: GateSettings, seed: int) -> nn.ModuleList:
    width = int(skeleton.config.get_text_config().hidden_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(
            build_gate(settings, skeleton.num_experts, skeleton.top_k, width, skeleton.dtype) for _ in skeleton.layers
        )


def _check_projection(router: nn.Module, num_experts: int) -> None:
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[0] != num_experts:
        raise InvalidInput(
            f"the gate of this model family, {type(router).__name__}, has no projection [experts, width] to take over",
            field="model.gate.kind",
            remedy=f"leave it at {MODEL_GATE}",
        )
