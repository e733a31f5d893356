"""Every gate against a reading of its rule one token at a time in plain Python, and against transformers' own gates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from actors.errors import InvalidInput, NonFinite
from actors.moe.gating import ComposedGate, GateContext, GateOutput, GatePast, GateSettings, build_gate, shared_share
from actors.moe.gating.choice import Choice, best
from actors.moe.gating.scores import DROPOUT, NOISE
from actors.trunk.model import ModelSource, skeleton
from tests.families import FAMILIES

E, K, D, B, S = 12, 4, 6, 2, 5

GROUPS = {"num_groups": 3, "groups_per_token": 2}
KINDS: dict[str, dict[str, Any]] = {
    "top_k": {"kind": "top_k"},
    "deepseek_moe": {"kind": "deepseek_moe"},
    "deepseek": {"kind": "deepseek", **GROUPS},
    "node_limited": {"kind": "node_limited", "num_nodes": 6, "nodes_per_token": 3},
    "two_level": {"kind": "two_level", **GROUPS},
}
CASES: dict[str, dict[str, Any]] = {
    **KINDS,
    "sigmoid": {"kind": "top_k", "score": "sigmoid", "routed_scaling_factor": 2.5},
    "not renormalised": {"kind": "node_limited", "num_nodes": 4, "nodes_per_token": 2, "renormalise": False},
    "fewer nodes than M": {"kind": "node_limited", "num_nodes": 2},
    "deepseek with softmax": {"kind": "deepseek", **GROUPS, "score": "softmax", "renormalise": False},
    "one group": {"kind": "two_level", "num_groups": 3, "groups_per_token": 1},
    "temperature": {"temperature": 0.7},
    "decaying temperature": {"temperature_decay": 0.95, "temperature_decay_steps": 100},
    "temperature at its floor": {"kind": "two_level", **GROUPS, "temperature_decay": 0.1, "temperature_floor": 0.5},
    "noise": {"noise_std": 0.7},
    "noise in groups": {"kind": "two_level", **GROUPS, "noise_std": 0.7},
    "attention": {"attention": True, "attention_width": 4},
    "attention of two heads": {"kind": "deepseek", **GROUPS, "attention": True, "attention_heads": 2},
    "mass": {"mass": 0.5},
    "mass of unequal sigmoids": {"kind": "deepseek", **GROUPS, "mass": 0.3, "routed_scaling_factor": 2.0},
    "mass 0": {"kind": "deepseek_moe", "mass": 0.0},
    "dropout": {"expert_dropout": 0.4},
    "all at once": {
        **KINDS["deepseek"],
        "temperature": 0.7,
        "noise_std": 0.3,
        "attention": True,
        "mass": 0.25,
        "expert_dropout": 0.3,
    },
}


def make(settings: dict[str, Any], seed: int = 0, batch: int = B) -> tuple[ComposedGate, Tensor, Tensor, Tensor]:
    """-> gate with random parameters, x_TD, weight_ED, bias_E; float64."""
    torch.manual_seed(seed)
    gate = build_gate(GateSettings(**{"kind": "top_k", **settings}), E, K, D, torch.float64)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x_TD = torch.randn(batch * S, D, dtype=torch.float64)
    return gate, x_TD, torch.randn(E, D, dtype=torch.float64), torch.randn(E) * 0.05


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def product(matrix: Tensor, row: list[float]) -> list[float]:
    return [sum(m * r for m, r in zip(line, row, strict=True)) for line in matrix.tolist()]


def ranking(scores: dict[int, float]) -> list[int]:
    return sorted(scores, key=lambda place: (-scores[place], place))


def attended(gate: ComposedGate, rows: list[list[float]], token: int) -> list[float]:
    """The token's hidden state with what its sequence so far adds."""
    part, size = gate.attention, gate.settings.attention_width // gate.settings.attention_heads
    assert part is not None
    seen = rows[token - token % S : token + 1]
    mixed: list[float] = []
    for first in range(0, gate.settings.attention_width, size):
        query = product(part.query[first : first + size], rows[token])
        keys = [product(part.key[first : first + size], row) for row in seen]
        values = [product(part.value[first : first + size], row) for row in seen]
        share = softmax([sum(q * k for q, k in zip(query, key, strict=True)) / size**0.5 for key in keys])
        mixed += [sum(a * value[i] for a, value in zip(share, values, strict=True)) for i in range(size)]
    return [a + b for a, b in zip(rows[token], product(part.output, mixed), strict=True)]


def choose(settings: GateSettings, biased: list[float], sigmoid: bool) -> list[int]:
    if settings.kind in ("top_k", "deepseek_moe"):
        return ranking(dict(enumerate(biased)))[:K]
    on_nodes = settings.kind == "node_limited"
    parts = settings.num_nodes if on_nodes else settings.num_groups
    visited = min(settings.nodes_per_token, parts) if on_nodes else settings.groups_per_token
    counted = {"node_limited": math.ceil(K / visited), "deepseek": 2 if sigmoid else 1, "two_level": E}[settings.kind]
    inside = [range(p * E // parts, (p + 1) * E // parts) for p in range(parts)]
    value = {p: sum(sorted((biased[e] for e in inside[p]), reverse=True)[:counted]) for p in range(parts)}
    allowed = {e: biased[e] for p in ranking(value)[:visited] for e in inside[p]}
    return ranking(allowed)[:K]


def one_token(
    gate: ComposedGate, row: list[float], weight_ED: Tensor, bias: list[float], noise: list[float] | None, step: int
) -> tuple[list[int], list[float], list[float]]:
    """-> ids in order of choice, their weights before any is dropped, probabilities of all experts."""
    settings = gate.settings
    tau = settings.temperature * settings.temperature_decay ** (step // settings.temperature_decay_steps)
    if settings.temperature_decay < 1:
        tau = max(tau, settings.temperature_floor)
    logits = product(weight_ED, row)
    if noise is not None:
        assert gate.noise is not None
        logits = [a + b for a, b in zip(logits, product(gate.noise.weight, noise), strict=True)]
    logits = [logit / tau for logit in logits]
    sigmoid = (settings.score or {"deepseek": "sigmoid", "node_limited": "sigmoid"}.get(settings.kind)) == "sigmoid"
    if gate.groups is not None:
        group = softmax([logit / tau for logit in product(gate.groups.weight, row)])
        size = E // settings.num_groups
        scores = [group[e // size] * softmax(logits[e // size * size :][:size])[e % size] for e in range(E)]
    elif sigmoid:
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        scores = softmax(logits)
    probabilities = [score / sum(scores) for score in scores]
    ids = choose(settings, [s + b for s, b in zip(scores, bias, strict=True)], sigmoid)
    if settings.mass is not None:
        fewest = next((n for n in range(1, K) if sum(probabilities[e] for e in ids[:n]) > settings.mass), K)
        ids = ids[:fewest]
    weights = [scores[e] for e in ids]
    renormalise = settings.renormalise
    if renormalise is None:
        renormalise = settings.kind in ("top_k", "deepseek", "node_limited")
    if renormalise:
        weights = [w / sum(weights) for w in weights]
    return ids, [w * settings.routed_scaling_factor for w in weights], probabilities


def dropped(ids: list[int], weights: list[float], draws: list[float], probability: float) -> None:
    """Expert dropout, in place."""
    whole = sum(weights)
    for place in range(1, len(ids)):
        if draws[place] < probability:
            ids[place], weights[place] = -1, 0.0
    weights[:] = [w / sum(weights) * whole for w in weights]


def reference(gate: ComposedGate, x_TD: Tensor, context: GateContext, weight_ED: Tensor, bias_E: Tensor) -> GateOutput:
    settings, cpu = gate.settings, torch.device("cpu")
    rows = x_TD.tolist()
    noise_TD = torch.randn(x_TD.shape, generator=context.generator(NOISE, cpu), dtype=torch.float64).tolist()
    draws_TK = torch.rand(len(rows), K, generator=context.generator(DROPOUT, cpu), dtype=torch.float32).tolist()
    all_ids, all_weights, all_probabilities = [], [], []
    for token in range(len(rows)):
        row = attended(gate, rows, token) if settings.attention else rows[token]
        noise = noise_TD[token] if settings.noise_std and context.training else None
        ids, weights, probabilities = one_token(gate, row, weight_ED, bias_E.tolist(), noise, context.step)
        if settings.expert_dropout and context.training:
            dropped(ids, weights, draws_TK[token], settings.expert_dropout)
        unused = K - len(ids)
        all_ids.append(ids + [-1] * unused)
        all_weights.append(weights + [0.0] * unused)
        all_probabilities.append(probabilities)
    return GateOutput(torch.tensor(all_ids), *(torch.tensor(v).double() for v in (all_weights, all_probabilities)))


def same(got: GateOutput, expected: GateOutput) -> None:
    assert got.ids_TK.tolist() == expected.ids_TK.tolist()
    torch.testing.assert_close(got.weights_TK, expected.weights_TK)
    torch.testing.assert_close(got.scores_TE, expected.scores_TE)


@pytest.fixture(autouse=True)
def _float64_in_plain_python() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_one_token_at_a_time(case: str, training: bool) -> None:
    gate, x_TD, weight_ED, bias_E = make(CASES[case], batch=6)
    context = GateContext(S, training=training, step=1250, seed=3)
    with torch.no_grad():
        got = gate(x_TD, context, weight_ED, bias_E)
        same(got, reference(gate, x_TD, context, weight_ED, bias_E))
    torch.testing.assert_close(got.scores_TE.sum(1), torch.ones(len(x_TD)))
    assert ((got.ids_TK >= 0) == (got.weights_TK > 0)).all()


@pytest.mark.parametrize("case", CASES)
def test_gradients_by_finite_differences(case: str) -> None:
    gate, x_TD, weight_ED, bias_E = make(CASES[case], seed=1, batch=1)
    names = [name for name, _ in gate.named_parameters()]
    context = GateContext(S, training=True, step=100, seed=5)

    def outputs(x_TD: Tensor, weight_ED: Tensor, *own: Tensor) -> tuple[Tensor, Tensor]:
        parameters = dict(zip(names, own, strict=True))
        out = torch.func.functional_call(gate, parameters, (x_TD, context, weight_ED, bias_E))
        return out.weights_TK, out.scores_TE

    leaves = [t.detach().clone().requires_grad_() for t in (x_TD, weight_ED, *gate.parameters())]
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)
    weights_TK, _ = outputs(*leaves)
    grads = torch.autograd.grad((weights_TK * torch.randn(S, K)).sum(), leaves)
    assert all(grad.abs().sum() > 0 for grad in grads), "every parameter learns"


def router(family: str, **values: Any) -> tuple[Any, int]:
    classes = {
        "deepseek_v3": DeepseekV3TopkRouter,
        "deepseek_v2": DeepseekV2TopkRouter,
        "mixtral": MixtralTopKRouter,
        "qwen3_moe": Qwen3MoeTopKRouter,
    }
    torch.set_default_dtype(torch.float32)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **values})
    module = classes[family](config)
    torch.nn.init.normal_(module.weight, std=0.3)
    if family == "deepseek_v3":
        module.e_score_correction_bias.normal_(std=0.1)
    return module, config.num_experts_per_tok


@pytest.mark.parametrize(
    ("family", "values", "settings"),
    [
        ("mixtral", {}, {}),
        ("mixtral", {"num_experts_per_tok": 1}, {}),
        ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 3}, {}),
        ("qwen3_moe", {"norm_topk_prob": False}, {"kind": "deepseek_moe"}),
        (
            "deepseek_v3",
            {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 5},
            {"kind": "deepseek", "num_groups": 4, "groups_per_token": 2, "routed_scaling_factor": 2.5},
        ),
        (
            "deepseek_v3",
            {"n_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
            {"kind": "deepseek", "renormalise": False},
        ),
        (
            "deepseek_v2",
            {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
            {
                "kind": "deepseek",
                "score": "softmax",
                "renormalise": False,
                "num_groups": 4,
                "groups_per_token": 2,
                "routed_scaling_factor": 1.5,
            },
        ),
    ],
)
def test_equals_transformers(family: str, values: dict[str, Any], settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, top_k = router(family, **values)
    x_TD = torch.randn(200, 32)
    gate = build_gate(GateSettings(**{"kind": "top_k", **settings}), module.weight.shape[0], top_k, 32, torch.float32)
    out = gate(x_TD, GateContext(50), module.weight, getattr(module, "e_score_correction_bias", None))
    with torch.no_grad():
        _, weights_TK, ids_TK = module(x_TD)
    assert out.weights_TK.dtype == torch.float32
    expected, order = ids_TK.sort(dim=1)
    assert torch.equal(out.ids_TK.sort(dim=1).values, expected)
    torch.testing.assert_close(
        out.weights_TK.gather(1, out.ids_TK.argsort(dim=1)), weights_TK.gather(1, order), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_the_lower_expert(kind: str) -> None:
    gate, x_TD, weight_ED, _ = make(KINDS[kind])
    if gate.groups is not None:
        torch.nn.init.zeros_(gate.groups.weight)
    out = gate(x_TD, GateContext(S), torch.zeros_like(weight_ED), torch.zeros(E))
    assert out.ids_TK.tolist() == [list(range(K))] * len(x_TD)


def test_ties_between_groups_go_to_the_lower_expert_too() -> None:
    scores_TE = torch.tensor([[0.5, 0.1, 0.0, 0.5, 0.4, 0.1, 0.0, 0.0, 0.0]])  # the second group is the best
    assert Choice(top_k=2, num_parts=3, parts_per_token=2, scored_by=2)(scores_TE).tolist() == [[0, 3]]


@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_the_best_of_many_and_of_few_rows(rows: int) -> None:
    scores_TN = torch.randint(-3, 3, (rows, 20)).double()
    expected = [ranking(dict(enumerate(row)))[:7] for row in scores_TN.tolist()]
    assert best(scores_TN, 7).tolist() == expected


def test_the_bias_moves_the_choice_and_no_weight() -> None:
    gate, x_TD, weight_ED, bias_E = make({"score": "sigmoid", "renormalise": False})
    bias_E[5] = 10.0
    bias_E.requires_grad_()
    plain, biased = (gate(x_TD, GateContext(S), weight_ED.requires_grad_(), b) for b in (None, bias_E))
    assert (biased.ids_TK[:, 0] == 5).all()
    torch.testing.assert_close(biased.weights_TK, torch.sigmoid(x_TD @ weight_ED.t()).gather(1, biased.ids_TK))
    assert torch.equal(plain.scores_TE, biased.scores_TE)
    biased.weights_TK.sum().backward()
    assert bias_E.grad is None


@pytest.mark.parametrize("case", ["noise", "dropout", "all at once"])
def test_equal_seeds_give_equal_choices(case: str) -> None:
    gate, x_TD, weight_ED, bias_E = make(CASES[case], batch=20)
    torch.manual_seed(0)
    first = GateContext(S, training=True, seed=7, layer=1)
    drawn = torch.get_rng_state()
    once = gate(x_TD, first, weight_ED, bias_E)
    assert torch.equal(torch.get_rng_state(), drawn), "the global generator is the trunk's"
    same(once, gate(x_TD, first, weight_ED, bias_E))
    for change in (dataclasses.replace(first, seed=8), dataclasses.replace(first, layer=2)):
        other = gate(x_TD, change, weight_ED, bias_E)
        assert not torch.equal(once.weights_TK, other.weights_TK), change
    quiet = dataclasses.replace(first, training=False)
    same(gate(x_TD, quiet, weight_ED, bias_E), gate(x_TD, dataclasses.replace(quiet, seed=8), weight_ED, bias_E))


def test_dropout_drops_its_share_and_keeps_the_sum() -> None:
    gate, x_TD, weight_ED, _ = make({"expert_dropout": 0.3, "routed_scaling_factor": 2.0}, batch=400)
    out = gate(x_TD, GateContext(S, training=True, seed=1), weight_ED)
    unused_TK = out.ids_TK == -1
    assert not unused_TK[:, 0].any()
    assert unused_TK[:, 1:].double().mean().item() == pytest.approx(0.3, abs=0.03)  # five standard deviations
    torch.testing.assert_close(out.weights_TK.sum(1), torch.full((len(x_TD),), 2.0))


@pytest.mark.parametrize("chunks", [[1] * S, [4, 1], [1, 3, 1], [2, 3]])
@pytest.mark.parametrize("heads", [1, 2])
def test_decoding_sees_what_prefill_saw(chunks: list[int], heads: int) -> None:
    gate, x_TD, weight_ED, bias_E = make({"attention": True, "attention_heads": heads})
    whole = gate(x_TD, GateContext(S), weight_ED, bias_E)
    x_BSD, past, start = x_TD.view(B, S, D), GatePast(), 0
    for length in chunks:
        context = GateContext(length, past=past)
        x_chunk = x_BSD[:, start : start + length].reshape(-1, D)
        out = gate(x_chunk, context, weight_ED, bias_E)
        past.crop(start)  # the same chunk once more, as after a fault
        same(out, gate(x_chunk, context, weight_ED, bias_E))
        start += length
        assert past.length == start
        assert torch.equal(out.ids_TK.view(B, length, K), whole.ids_TK.view(B, S, K)[:, start - length : start])
        expected = whole.weights_TK.view(B, S, K)[:, start - length : start]
        torch.testing.assert_close(out.weights_TK.view(B, length, K), expected)


def test_a_long_past_grows() -> None:
    gate, _, weight_ED, _ = make({"attention": True})
    x_TD, past = torch.randn(150, D), GatePast()
    whole = gate(x_TD, GateContext(150), weight_ED)
    steps = [gate(x_TD[t : t + 1], GateContext(1, past=past), weight_ED) for t in range(150)]
    torch.testing.assert_close(torch.cat([out.scores_TE for out in steps]), whole.scores_TE)


def test_attention_starts_as_nothing() -> None:
    _, x_TD, weight_ED, bias_E = make({})
    outs = [
        build_gate(GateSettings(kind="top_k", attention=on), E, K, D, torch.float32)(
            x_TD, GateContext(S), weight_ED, bias_E
        )
        for on in (True, False)
    ]
    assert all(torch.equal(getattr(outs[0], f), getattr(outs[1], f)) for f in ("ids_TK", "weights_TK", "scores_TE"))


def test_reset_parameters_draws_from_the_global_generator() -> None:
    gate, *_ = make({"kind": "two_level", **GROUPS, "noise_std": 0.5, "attention": True})
    drawn = []
    for _ in range(2):
        torch.manual_seed(11)
        gate.reset_parameters()
        drawn.append({name: p.detach().clone() for name, p in gate.named_parameters()})
    assert set(drawn[0]) == {f"attention.{n}" for n in ("query", "key", "value", "output")} | {
        "noise.weight",
        "groups.weight",
    }
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not drawn[0]["attention.output"].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_are_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    gate, x_TD, weight_ED, bias_E = make(KINDS[kind])
    gate.to(dtype)
    x_low, weight_low = x_TD.to(dtype), weight_ED.to(dtype)
    low = gate(x_low, GateContext(S), weight_low, bias_E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(gate(x_low, GateContext(S), weight_low, bias_E), low)
    gate.float()
    same(low, gate(x_low.float(), GateContext(S), weight_low.float(), bias_E))
    assert low.weights_TK.dtype == low.scores_TE.dtype == torch.float32
    assert low.ids_TK.dtype == torch.int64


@pytest.mark.parametrize("case", CASES)
def test_no_tokens(case: str) -> None:
    gate, x_TD, weight_ED, bias_E = make(CASES[case])
    out = gate(x_TD[:0], GateContext(S, training=True), weight_ED, bias_E)
    assert out.ids_TK.shape == out.weights_TK.shape == (0, K)
    assert out.scores_TE.shape == (0, E)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_named(kind: str, value: float) -> None:
    gate, x_TD, weight_ED, _ = make(KINDS[kind])
    x_TD[3, 2] = value
    with pytest.raises(NonFinite, match="gate scores of layer 4 are not finite") as caught:
        gate(x_TD, GateContext(S, step=9, layer=4), weight_ED)
    assert caught.value.step == 9


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("gate.kind", {"kind": "best"}),
        ("gate.score", {"score": "relu"}),
        ("gate.score", {"kind": "two_level", "score": "sigmoid"}),
        ("gate.renormalise", {"kind": "two_level", "num_groups": 3, "renormalise": True}),
        *[("gate.temperature", {"temperature": t}) for t in (0.0, -1.0, math.nan, math.inf)],
        *[("gate.temperature_decay", {"temperature_decay": t}) for t in (0.0, 1.1)],
        ("gate.temperature_decay_steps", {"temperature_decay_steps": 0}),
        ("gate.temperature_floor", {"temperature_floor": 0.0}),
        ("gate.temperature_floor", {"temperature": 0.7, "temperature_decay": 0.9, "temperature_floor": 0.8}),
        ("gate.routed_scaling_factor", {"routed_scaling_factor": 0.0}),
        ("gate.noise_std", {"noise_std": -0.1}),
        *[("gate.mass", {"mass": p}) for p in (-0.1, 1.0, math.nan)],
        *[("gate.expert_dropout", {"expert_dropout": p}) for p in (-0.1, 1.0, math.nan)],
        ("gate.attention_width", {"attention_width": 0}),
        ("gate.attention_heads", {"attention_heads": 5}),
        ("gate.num_groups", {"kind": "top_k", "num_groups": 3}),
        ("gate.num_groups", {"kind": "deepseek", "num_groups": 5}),
        ("gate.num_groups", {"kind": "two_level", "num_groups": 0}),
        ("gate.groups_per_token", {"kind": "deepseek", "num_groups": 3, "groups_per_token": 4}),
        ("gate.groups_per_token", {"kind": "two_level", "num_groups": 6, "groups_per_token": 1}),
        ("gate.num_nodes", {"kind": "deepseek", "num_nodes": 3}),
        ("gate.num_nodes", {"kind": "node_limited", "num_nodes": 5}),
        ("gate.nodes_per_token", {"kind": "node_limited", "num_nodes": 6, "nodes_per_token": 1}),
    ],
)
def test_bad_settings_name_the_field(field: str, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        build_gate(GateSettings(**{"kind": "top_k", **settings}), E, K, D, torch.float32)
    assert caught.value.field == field


@pytest.mark.parametrize("top_k", [0, E + 1])
def test_top_k_must_fit_the_model(top_k: int) -> None:
    with pytest.raises(InvalidInput, match=r"gate\.top_k"):
        build_gate(GateSettings(kind="top_k"), E, top_k, D, torch.float32)


def test_the_temperature_follows_its_schedule() -> None:
    decaying = GateSettings(kind="top_k", temperature_decay=0.95, temperature_floor=0.5)
    assert [decaying.temperature_at(s) for s in (0, 999, 1000, 2500)] == pytest.approx([1, 1, 0.95, 0.95**2])
    assert decaying.temperature_at(10**6) == 0.5
    assert GateSettings(kind="top_k", temperature=0.07).temperature_at(10**6) == 0.07, (
        "no floor for what does not decay"
    )


@pytest.mark.parametrize(("family", "shared"), [("deepseek_v3", 2 * 3 * 32 * 16), ("mixtral", 0)])
def test_share_of_shared_experts(family: str, shared: int) -> None:
    torch.set_default_dtype(torch.float32)
    found = skeleton(ModelSource(values={"model_type": family, **FAMILIES[family]}))
    assert shared_share(found.model) == shared / found.num_parameters
