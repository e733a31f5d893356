"""The split: a transformers model whose experts modules hold no weights and call a function of ours instead.

transformers routes every family's experts through one registry, `ALL_EXPERTS_FUNCTIONS`; `remote_experts` is our entry.
The trunk (embeddings, attention, norms, gates, shared experts, head) stays exactly the family's own code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from actors.errors import CheckpointError
from actors.trunk.config import config_of
from actors.trunk.gates import fuse_gates
from actors.trunk.latents import attend_to_latents
from actors.trunk.norms import fuse_norms
from actors.trunk.shared import Meanwhile, nothing, shared_of, watch
from actors.trunk.source import DTYPES as DTYPES
from actors.trunk.source import ModelSource as ModelSource

REMOTE_EXPERTS = "moe_cluster"


class RemoteExperts(Protocol):
    """What computes one MoE layer: -> y_TD. It may do `meanwhile` while it waits, once."""

    def __call__(
        self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, meanwhile: Meanwhile = ..., /
    ) -> Tensor: ...


def remote_experts(module: nn.Module, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    remote: RemoteExperts | None = module.__dict__.get("remote")
    assert remote is not None, "a trunk runs only after connect()"
    shared = shared_of(module)
    return remote(x_TD, topk_ids_TK, topk_weights_TK, nothing if shared is None else shared.sending(x_TD))


ALL_EXPERTS_FUNCTIONS.register(REMOTE_EXPERTS, remote_experts)


def is_experts(module: nn.Module) -> bool:
    """Whether it went through `use_experts_implementation`, which leaves these marks in every release since 5.17."""
    return hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")


@dataclass(frozen=True)
class ExpertLayer:
    """One MoE layer as an expert actor sees it."""

    name: str
    """Module path in the model, e.g. `model.layers.1.mlp.experts`."""
    template: nn.Module
    """The family's experts module on the meta device: its functions, flags and parameter shapes."""

    @property
    def num_experts(self) -> int:
        template: Any = self.template
        return int(template.num_experts)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of one expert's part."""
        return {name: tuple(p.shape[1:]) for name, p in self.template.named_parameters()}


@dataclass(frozen=True)
class Skeleton:
    """The whole model on the meta device: every name and shape, no memory."""

    config: PretrainedConfig
    model: PreTrainedModel
    layers: tuple[ExpertLayer, ...]
    num_experts: int
    top_k: int
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def expert_names(self) -> set[str]:
        """Full names of the stacked expert parameters."""
        return {f"{layer.name}.{name}" for layer in self.layers for name in layer.shapes()}


def skeleton(source: ModelSource) -> Skeleton:
    config = config_of(source)
    dtype = DTYPES[source.dtype]
    model = meta_model(config, dtype)
    layers = tuple(ExpertLayer(name, module) for name, module in model.named_modules() if is_experts(module))
    if not layers:
        raise CheckpointError(
            f"{type(model).__name__} has no mixture-of-experts layer",
            field="model",
            value=config.model_type,
            remedy="use a model whose experts go through transformers' experts registry",
        )
    for layer in layers:
        _check_supported(layer)
    counts = {layer.num_experts for layer in layers}
    if len(counts) > 1:
        raise CheckpointError("layers with different numbers of experts", field="model", value=sorted(counts))
    return Skeleton(config, model, layers, counts.pop(), _top_k(config), dtype)


def _check_supported(layer: ExpertLayer) -> None:
    if getattr(layer.template, "has_post_expert_norm", False):
        raise CheckpointError(
            "a norm after the expert has weights shared by all experts of the layer, which cannot be split yet",
            field=layer.name,
            value=type(layer.template).__name__,
        )


def _top_k(config: PretrainedConfig) -> int:
    text = config.get_text_config()
    for name in ("num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    return 0


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False))


def empty_trunk(source: ModelSource) -> PreTrainedModel:
    """A model without expert weights on the meta device, its experts modules bound to `remote_experts`."""
    config = config_of(source)
    trunk = meta_model(config, DTYPES[source.dtype])
    trunk.set_experts_implementation(REMOTE_EXPERTS)
    for module in trunk.modules():
        if is_experts(module):
            for name in list(module._parameters):
                del module._parameters[name]
            module._is_hf_initialized = True  # nothing left to initialise
    return trunk


def _no_experts(
    x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, meanwhile: Meanwhile = nothing, /
) -> Tensor:
    return torch.zeros_like(x_TD)


def connect(trunk: PreTrainedModel, remotes: list[RemoteExperts]) -> None:
    """Gives every MoE layer, in order, the function that computes its experts."""
    weight = trunk.get_input_embeddings().weight
    x_BSD = torch.zeros(1, 1, int(trunk.config.get_text_config().hidden_size), dtype=weight.dtype, device=weight.device)
    modules = [(name, m) for name, m in trunk.named_modules() if is_experts(m)]
    for (name, module), remote in zip(modules, remotes, strict=True):
        module.__dict__["remote"] = _no_experts
        watch(trunk, name, x_BSD)
        module.__dict__["remote"] = remote


def second_view(
    source: ModelSource, trunk: PreTrainedModel, instead: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Another module tree over the same parameters and buffers, in eval mode: module flags and connections differ,
    weights are the same memory. `instead`: tensors by name that take the place of the trunk's, e.g. gates of another
    number of experts, which `source` names.
    """
    view = empty_trunk(source)
    state = trunk.state_dict(keep_vars=True)
    for name, tensor in (instead or {}).items():
        state[name] = nn.Parameter(tensor) if isinstance(state[name], nn.Parameter) else tensor
    view.load_state_dict(state, assign=True)
    buffers = {**dict(trunk.named_buffers()), **{name: state[name] for name in instead or {}}}
    for name, _ in list(view.named_buffers()):
        module_name, _, buffer_name = name.rpartition(".")
        view.get_submodule(module_name)._buffers[buffer_name] = buffers[name]
    view.tie_weights()
    return view.eval()


def serving_view(
    source: ModelSource, trunk: PreTrainedModel, instead: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """`second_view`, for forwards without gradients alone."""
    return fuse_gates(fuse_norms(attend_to_latents(second_view(source, trunk, instead))))


def config_json(config: PretrainedConfig) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, default=str)
