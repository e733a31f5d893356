"""A router's part of a growth: gates for more experts, made and tried before anything is changed.

What is made here is a whole next trunk beside the one in use, over the same parameters but for the gates', so that
taking it is an assignment. The experts' part is in `actors.expert.births`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.errors import InvalidInput
from actors.expert.births import Births, copies_in_turn, evenly_spread
from actors.moe import growth as math
from actors.moe.gating import ComposedGate, GateContext
from actors.moe.settings import MODEL_GATE, GateSettings
from actors.router.passes import Purpose
from actors.router.routing import Opening, Routing
from actors.trunk.load import blanks
from actors.trunk.model import (
    ModelSource,
    RemoteExperts,
    Skeleton,
    connect,
    is_experts,
    second_view,
    serving_view,
    skeleton,
)
from actors.trunk.shared import Meanwhile, nothing
from actors.values import Growth, Placement

MODES = ("copy", "fresh")
Choices = tuple[Tensor, Tensor]
"""ids_TK and weights_TK of a layer."""


def check_growth(growth: Growth, num_experts: int, group_size: int) -> None:
    """What can be said without the model. `InvalidInput`."""
    if growth.mode not in MODES:
        raise InvalidInput("no such mode", field="mode", value=growth.mode, remedy=f"one of {', '.join(MODES)}")
    if growth.num_experts <= num_experts:
        raise InvalidInput(
            f"the model has {num_experts} experts a layer, and experts are only added",
            field="num_experts",
            value=growth.num_experts,
            remedy=f"use {num_experts + group_size} or more",
        )
    if growth.num_experts % group_size:
        raise InvalidInput(
            f"new experts come in groups of {group_size}",
            field="num_experts",
            value=growth.num_experts,
            remedy=f"use a multiple of {group_size}",
        )
    if not 0 <= growth.perturbation < 1:
        raise InvalidInput("must be at least 0 and below 1", field="perturbation", value=growth.perturbation)
    if growth.open_steps < 1:
        raise InvalidInput("must be at least 1", field="open_steps", value=growth.open_steps)


@dataclass(frozen=True)
class Blueprint:
    """Of the grown model: names and shapes."""

    source: ModelSource
    skeleton: Skeleton
    gate: GateSettings

    @staticmethod
    def of(source: ModelSource, gate: GateSettings, before: int, num_experts: int) -> Blueprint:
        """`gate` is that of a model of `before` experts. `InvalidInput` if this model cannot have so many."""
        source = replace(source, num_experts=num_experts)
        grown = skeleton(source)
        if grown.num_experts != num_experts:
            raise InvalidInput(
                f"the number of experts of {type(grown.model).__name__} is not set by a name that is known",
                field="num_experts",
                value=num_experts,
            )
        gate = grown_settings(gate, before, num_experts)
        gate.check_model(num_experts, grown.top_k)
        return Blueprint(source, grown, gate)


def grown_settings(gate: GateSettings, before: int, after: int) -> GateSettings:
    """Parts keep their size, so that the old experts are in the same ones."""
    if gate.kind == "node_limited" and gate.num_nodes > 1:
        raise InvalidInput(
            "a node-limited gate counts on the experts of a node having consecutive numbers, which added ones have not",
            field="model.gate.kind",
            value=gate.kind,
            remedy="use the gate deepseek, whose parts are not bound to nodes",
        )
    if gate.num_groups == 1:
        return gate
    if after * gate.num_groups % before:
        size = before // gate.num_groups
        raise InvalidInput(
            f"the gate chooses among parts of {size} experts",
            field="num_experts",
            value=after,
            remedy=f"use a multiple of {size}",
        )
    return replace(gate, num_groups=after * gate.num_groups // before)


def base_settings(source: ModelSource, gate: GateSettings, num_experts: int) -> GateSettings:
    """Those of a model that has grown to `num_experts`, if the source says so; `gate` is as its config says."""
    if source.num_experts is None:
        return gate
    return grown_settings(gate, skeleton(replace(source, num_experts=None)).num_experts, num_experts)


def blank_trunk(blueprint: Blueprint, trunk: PreTrainedModel) -> PreTrainedModel:
    """The same with gates of zeros for another number of experts, to be restored."""
    return second_view(blueprint.source, trunk, blanks(blueprint.skeleton, trunk)).train()


@dataclass(frozen=True)
class GrownTrunk:
    """All that takes the place of a router's own."""

    blueprint: Blueprint
    trunk: PreTrainedModel
    view: PreTrainedModel
    routing: Routing
    births: Births
    rows: Mapping[str, Sequence[int]]
    """Parameter that has another shape now -> the old row that each of its rows came from, -1 for one that is new."""
    way: str
    moved_share: float

    def moment(self, name: str, old: Tensor) -> Tensor:
        """Copies go on with the moments of their sources, what is new begins at zero."""
        if name not in self.rows:
            return old
        index = torch.tensor(self.rows[name], device=old.device)
        rows = old.index_select(0, index.clamp_min(0))
        rows[index < 0] = 0
        return rows


class Grower:
    """Makes a grown trunk from one that stands still meanwhile; that one stays as it is."""

    def __init__(
        self,
        growth: Growth,
        blueprint: Blueprint,
        before: Skeleton,
        trunk: PreTrainedModel,
        routing: Routing,
        placement: Placement,
    ) -> None:
        self._growth, self._blueprint, self._before = growth, blueprint, before
        self._trunk, self._routing = trunk, routing
        self._generator = torch.Generator().manual_seed(growth.seed)
        self._sets, rest = divmod(growth.num_experts, before.num_experts)
        self._splits = growth.mode == "copy" and not rest and routing.scores_are_softmax
        num_new = (growth.num_experts - before.num_experts) // placement.group_size
        of_groups = copies_in_turn(placement.num_groups, num_new) if self._splits else evenly_spread(placement, num_new)
        self._births = Births(growth, of_groups)
        self._source_N = [
            source * placement.group_size + i for source in of_groups.values() for i in range(placement.group_size)
        ]
        """Of each new expert."""
        self._instead: dict[str, Tensor] = {}
        self._rows: dict[str, Sequence[int]] = {}
        self._own: dict[str, Tensor] = {}
        """Tensors of the gates that the trunk itself does not have."""
        self._rise_LN: list[Tensor] = []

    @torch.no_grad()
    def make(self, inputs_LTD: Sequence[Tensor], sequence_length: int) -> GrownTrunk:
        """`inputs_LTD`: what each layer's gate saw of some tokens, whole sequences of this length.

        `InvalidInput` if this gate cannot take the new experts without a jump.
        """
        names = {id(tensor): name for name, tensor in self._trunk.state_dict(keep_vars=True).items()}
        for layer, inputs_TD in enumerate(inputs_LTD):
            self._make_layer(layer, inputs_TD, sequence_length, names)
        if strange := sorted(set(blanks(self._blueprint.skeleton, self._trunk)) - set(self._instead)):
            raise InvalidInput("this gate has a parameter that cannot be extended", field="model", value=strange[0])
        source = self._blueprint.source
        trunk = second_view(source, self._trunk, self._instead).train()
        routing = Routing(trunk, self._blueprint.skeleton, self._blueprint.gate, source.seed)
        routing.take_over(self._routing, self._own, self._opening())
        moved = self._moved(trunk, routing, inputs_LTD, sequence_length)
        return GrownTrunk(
            self._blueprint,
            trunk,
            serving_view(source, trunk),
            routing,
            self._births,
            self._rows,
            "split" if self._splits else "closed",
            moved,
        )

    # -- a layer ------------------------------------------------------------------------------------------------------

    def _make_layer(self, layer: int, inputs_TD: Tensor, sequence_length: int, names: Mapping[int, str]) -> None:
        router, gate = self._routing.router(layer), self._routing.gate(layer)
        if gate is not None and gate.attention is not None:
            inputs_TD = inputs_TD + gate.attention(inputs_TD, GateContext(sequence_length))
        weight_ED = getattr(router, "weight", None)
        if not isinstance(weight_ED, Tensor) or weight_ED.shape[0] != self._before.num_experts:
            raise InvalidInput(
                f"{type(router).__name__} has no projection [experts, width] to extend",
                field="model",
                value=self._before.layers[layer].name,
            )
        splits_groups = gate is not None and gate.groups is not None
        self._instead[names[id(weight_ED)]] = new_FD = self._grown_rows(weight_ED, inputs_TD, not splits_groups)
        self._rows[names[id(weight_ED)]] = self._sources(len(weight_ED))
        if gate is not None:
            self._extend_gate(layer, gate, inputs_TD)
        self._extend_biases(layer, router, inputs_TD, new_FD, names)

    def _grown_rows(self, rows_ED: Tensor, inputs_TD: Tensor, splits: bool = True) -> Tensor:
        if self._splits and splits:
            return self._split(rows_ED, inputs_TD, self._depth())
        if self._growth.mode == "fresh":
            return torch.cat((rows_ED, math.fresh_rows(rows_ED, len(self._source_N), self._generator)))
        copies_ND = rows_ED[self._source_N]
        if not self._splits:
            copies_ND = math.perturbed(copies_ND, self._growth.perturbation, self._generator)
        return torch.cat((rows_ED, copies_ND))

    def _split(self, rows: Tensor, inputs_TD: Tensor, depth: int) -> Tensor:
        settings, text = self._routing.settings, self._before.config.get_text_config()
        renormalises = settings.renormalises
        if settings.kind == MODEL_GATE:
            renormalises = getattr(text, "norm_topk_prob", None) is not False  # families without the choice do
        return math.split(rows, inputs_TD, self._sets, depth, self._generator, renormalises=renormalises)

    def _depth(self) -> int:
        """How many of a token's best scores decide: with parts, M - 1 of the best may hold all the best experts."""
        top_k, text = self._before.top_k, self._before.config.get_text_config()
        parts, visited = self._routing.settings.parts
        if self._routing.settings.kind == MODEL_GATE:
            parts, visited = getattr(text, "n_group", None) or 1, getattr(text, "topk_group", None) or 1
        return max(top_k, (visited - 1) * self._before.num_experts // parts + 1) if parts > 1 else top_k

    def _extend_gate(self, layer: int, gate: ComposedGate, inputs_TD: Tensor) -> None:
        if gate.noise is not None:
            name = f"gates.{layer}.noise.weight"
            self._own[name] = self._grown_rows(gate.noise.weight, inputs_TD, splits=False)
            self._rows[name] = self._sources(len(gate.noise.weight))
        if gate.groups is not None:
            name, rows_GD = f"gates.{layer}.groups.weight", gate.groups.weight
            if not self._splits:
                raise InvalidInput(
                    "a two-level gate has no bias that could keep new experts out at first",
                    field="model.gate.kind",
                    value=gate.settings.kind,
                    remedy=f"use mode copy and a multiple of {self._before.num_experts} experts, or another gate",
                )
            self._own[name] = self._split(rows_GD, inputs_TD, gate.settings.groups_per_token)
            self._rows[name] = [*range(len(rows_GD))] * self._sets

    def _extend_biases(
        self, layer: int, router: nn.Module, inputs_TD: Tensor, new_FD: Tensor, names: Mapping[int, str]
    ) -> None:
        old, biases = self._before.num_experts, self._routing.biases(layer)
        if not biases and not self._splits:
            raise InvalidInput(
                f"{type(router).__name__} has no bias that could keep new experts out at first",
                field="mode" if self._growth.mode == "fresh" else "num_experts",
                value=self._growth.mode if self._growth.mode == "fresh" else self._growth.num_experts,
                remedy=f"use mode copy and a multiple of {old} experts, or a gate of ours (model.gate.kind: deepseek)",
            )
        rise_N = torch.zeros(len(self._source_N))
        for number, bias_E in enumerate(biases):
            aim_N = self._aim(layer, bias_E, is_first=number == 0)
            if self._splits or number:
                new_N = aim_N
            else:
                closed = self._closed(bias_E, aim_N, inputs_TD, new_FD)
                new_N, rise_N = closed.bias_N, closed.rise_N.float().cpu()
            self._put(layer, bias_E, torch.cat((bias_E.detach(), new_N.to(bias_E))), names)
        self._rise_LN.append(rise_N)

    def _aim(self, layer: int, bias_E: Tensor, is_first: bool) -> Tensor:
        """Where the new experts' biases are to be in the end. Sources may be on their own way there."""
        opening = self._routing.opening
        final_E = bias_E.detach().clone()
        if is_first and opening is not None:
            final_E += (opening.rise_LE[layer] * opening.left_E).to(final_E)
        if self._growth.mode == "fresh":
            return final_E.mean().expand(len(self._source_N)).clone()
        return final_E[self._source_N] if not self._splits else bias_E.detach()[self._source_N]

    def _closed(self, bias_E: Tensor, aim_N: Tensor, inputs_TD: Tensor, new_FD: Tensor) -> math.Closed:
        old, steps = self._before.num_experts, self._growth.open_steps
        if not self._routing.has_choice_bias:
            scores_TF = F.linear(inputs_TD.float(), new_FD.float())
            scores_TE = scores_TF[:, :old] + bias_E.float()
            return math.closed_scores(scores_TE, scores_TF[:, old:], self._before.top_k, aim_N.float(), steps)
        return math.closed_choice(bias_E.detach(), aim_N, steps)

    def _put(self, layer: int, old: Tensor, new: Tensor, names: Mapping[int, str]) -> None:
        if (name := names.get(id(old))) is None:
            bias_LE = self._own.setdefault("bias_LE", new.new_zeros(len(self._before.layers), len(new)))
            bias_LE[layer] = new
        else:
            self._instead[name] = new
            self._rows[name] = self._sources(len(old))

    def _sources(self, num_old: int) -> list[int]:
        new = [-1] * len(self._source_N) if self._growth.mode == "fresh" else self._source_N
        return [*range(num_old), *new]

    def _opening(self) -> Opening | None:
        """That of an earlier growth goes on beside it."""
        count, steps = len(self._source_N), 0 if self._splits else self._growth.open_steps
        before = self._routing.opening
        rise_LE = torch.zeros(len(self._rise_LN), self._before.num_experts) if before is None else before.rise_LE
        left_E = torch.zeros(self._before.num_experts, dtype=torch.int64) if before is None else before.left_E
        new_LN, left_N = torch.stack(self._rise_LN), torch.full((count,), steps)
        if self._splits and before is not None:  # copies of what still opens go on opening
            new_LN, left_N = rise_LE[:, self._source_N], left_E[self._source_N]
        opening = Opening(torch.cat((rise_LE, new_LN), dim=1), torch.cat((left_E, left_N)))
        return opening if opening.is_under_way else None

    # -- tried before it is taken -------------------------------------------------------------------------------------

    def _moved(
        self, trunk: PreTrainedModel, routing: Routing, inputs_LTD: Sequence[Tensor], sequence_length: int
    ) -> float:
        before = choices(self._trunk, self._routing, self._before, inputs_LTD, sequence_length)
        after = choices(trunk, routing, self._blueprint.skeleton, inputs_LTD, sequence_length)
        sources, old = self._sources(self._before.num_experts), self._before.num_experts
        moved_L = [math.moved_share(b, a, sources, old) for b, a in zip(before, after, strict=True)]
        moved = sum(moved_L) / len(moved_L)
        if moved > math.MAX_MOVED:
            raise InvalidInput(
                f"the gate would give {moved:.1%} of its weight to other experts at once, more than "
                f"{math.MAX_MOVED:.0%}, and the loss would jump",
                field="num_experts",
                value=self._growth.num_experts,
                remedy="use a gate with a balance bias and renormalised weights (model.gate.kind: deepseek); "
                "a gate in 16 bits may need router.dtype: float32",
            )
        return moved


class _Recorder:
    """Stands in for the experts and keeps what the gates chose."""

    def __init__(self, sequence_length: int) -> None:
        self.purpose = Purpose(sequence_length=sequence_length)
        self.choices: dict[int, Choices] = {}

    def layer_function(self, layer: int) -> RemoteExperts:
        def record(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, meanwhile: Meanwhile = nothing, /) -> Tensor:
            self.choices[layer] = ids_TK, weights_TK
            return torch.zeros_like(x_TD)

        return record


def choices(
    trunk: PreTrainedModel,
    routing: Routing,
    description: Skeleton,
    inputs_LTD: Sequence[Tensor],
    sequence_length: int,
) -> list[Choices]:
    """Of every layer's gate for what it saw. The trunk is to be connected to its experts afterwards."""
    recorder = _Recorder(sequence_length)
    connect(trunk, [routing.layer_function(i, recorder) for i in range(len(inputs_LTD))])
    trunk.eval()
    try:
        for layer, x_TD in zip(description.layers, inputs_LTD, strict=True):
            block = trunk.get_submodule(layer.name.rpartition(".")[0])
            block(x_TD.unsqueeze(0))
    finally:
        trunk.train()
    return [recorder.choices[i] for i in range(len(inputs_LTD))]


@contextmanager
def seen_by_gates(view: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What the layers' experts, and so their gates, get in the forwards inside, in the order of the layers. [T, D]"""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        for module in view.modules()
        if is_experts(module)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
