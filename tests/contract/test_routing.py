"""Gates of ours in a live model: what they compute, what retries, decoding and checkpoints make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import CheckpointError, InvalidInput, NonFinite
from actors.moe.measures import max_vio
from actors.moe.settings import BalanceSettings, GateSettings
from actors.optim import OptimizerSettings
from actors.router.routing import GATES_FILE
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.transport.message import Message
from actors.trunk.config import config_of
from actors.trunk.model import ModelSource
from actors.values import Sampling
from tests.families import save
from tests.local import cluster

BATCHES = [
    [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(4)
]
IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(99))

KINDS: dict[str, dict[str, Any]] = {
    "top_k": {"kind": "top_k"},
    "deepseek": {"kind": "deepseek", "num_groups": 4, "groups_per_token": 2},
    "deepseek_moe": {"kind": "deepseek_moe"},
    "node_limited": {"kind": "node_limited", "num_nodes": 4, "nodes_per_token": 2},
    "two_level": {"kind": "two_level", "num_groups": 4, "groups_per_token": 2},
    "noise and temperature": {"kind": "top_k", "noise_std": 0.5, "temperature": 0.7},
    "attention": {"kind": "top_k", "attention": True, "attention_width": 8},
    "adaptive": {"kind": "top_k", "mass": 0.2},
    "expert dropout": {"kind": "top_k", "expert_dropout": 0.3},
}


def source_of(family: str, folder: Path) -> ModelSource:
    return ModelSource(path=str(save(family, folder / family, torch.float64)), dtype="float64")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return source_of("deepseek_v3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return source_of("mixtral", tmp_path_factory.mktemp("model"))


def losses(source: ModelSource, gate: dict[str, Any] | None, **options: Any) -> list[float]:
    settings = GateSettings(**gate) if gate else None
    with cluster(source, 2, gate=settings, **options) as local:
        local.router.begin_run(OptimizerSettings())
        return [local.router.train_step(b, lr=1e-2, clip_norm=1.0).loss for b in BATCHES]


def test_ours_in_place_of_mixtrals_changes_nothing(mixtral: ModelSource) -> None:
    torch.testing.assert_close(losses(mixtral, {"kind": "top_k"}), losses(mixtral, None), rtol=1e-5, atol=0)


def test_ours_in_place_of_deepseeks_changes_nothing(deepseek: ModelSource) -> None:
    own = config_of(deepseek)
    gate = {
        "kind": "deepseek",
        "num_groups": own.n_group,
        "groups_per_token": own.topk_group,
        "routed_scaling_factor": own.routed_scaling_factor,
        "renormalise": own.norm_topk_prob,
    }
    torch.testing.assert_close(losses(deepseek, gate), losses(deepseek, None), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_every_gate_learns_and_a_retried_step_chooses_the_same(deepseek: ModelSource, name: str) -> None:
    undisturbed = losses(deepseek, KINDS[name])
    scripted: list[Link] = []

    def wrap(actor: int, link: Link) -> Link:
        if actor == 1 and not scripted:
            scripted.append(FaultyLink(link, [Fault("backward", 3, "drop_answer")]))
            return scripted[0]
        return link

    disturbed = losses(deepseek, KINDS[name], links="socket", wrap=wrap)
    torch.testing.assert_close(disturbed, undisturbed, rtol=1e-9, atol=0)
    with cluster(deepseek, 2, gate=GateSettings(**KINDS[name])) as local:
        local.router.begin_run(OptimizerSettings())
        again = [local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0).loss for _ in range(8)]
        assert again[-1] < 0.9 * again[0]
        trained = dict(local.router.routing.named_parameters())
        assert all(p.abs().sum() > 0 for p in trained.values()), "each parameter of the gate has learned"


@pytest.mark.parametrize("name", ["attention", "adaptive", "deepseek"])
def test_decoding_token_by_token_sees_what_a_whole_forward_sees(deepseek: ModelSource, name: str) -> None:
    with cluster(deepseek, 2, gate=GateSettings(**KINDS[name])) as local:
        local.router.begin_run(OptimizerSettings())
        for batch in BATCHES:
            local.router.train_step(batch, lr=3e-2, clip_norm=1.0)
        ids = IDS[0].tolist()
        greedy = [e.token for e in local.router.serving.generate(ids, Sampling(max_tokens=12), timeout_s=30)]
        for token in greedy:
            assert token == int(local.router.serving.logits(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_the_bias_evens_the_load(tmp_path: Path, family: str) -> None:
    source = source_of(family, tmp_path)
    with cluster(source, 2, gate=GateSettings(kind="top_k")) as local:
        local.router.begin_run(OptimizerSettings(), BalanceSettings(bias_speed=0.01))

        def violation(bias_speed: float) -> float:
            report = local.router.train_step(BATCHES[0], lr=1e-9, clip_norm=1.0, bias_speed=bias_speed)
            return float(max_vio(torch.tensor(report.load_LE)).min())

        for layer in range(2):
            local.router.routing.bias(layer)[0] = 0.2  # type: ignore[index]
        before = violation(0.01)
        assert before > 2, "one expert is in every choice"
        for _ in range(25):
            violation(0.01)
        assert violation(0.0) < 0.5 * before
        kept = local.router.routing.bias(0).clone()  # type: ignore[union-attr]
        violation(0.0)
        assert torch.equal(local.router.routing.bias(0), kept), "speed 0 leaves it as it is"  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["entropy", "frequency", "sequence"])
def test_each_loss_evens_the_load_and_is_reported_apart(deepseek: ModelSource, rule: str) -> None:
    with cluster(deepseek, 2, gate=GateSettings(kind="top_k")) as local:
        local.router.begin_run(OptimizerSettings(), BalanceSettings(**{rule: 30.0}))
        reports = [local.router.train_step(BATCHES[0], lr=1e-3, clip_norm=1.0) for _ in range(10)]
        assert reports[-1].balance_loss < reports[0].balance_loss
        assert reports[0].loss == pytest.approx(losses(deepseek, {"kind": "top_k"})[0]), "apart from the loss"


def test_the_models_own_gate_cannot_follow_every_rule(deepseek: ModelSource, mixtral: ModelSource) -> None:
    with cluster(deepseek, 2) as local:
        with pytest.raises(InvalidInput, match=r"model\.gate\.kind"):
            local.router.begin_run(OptimizerSettings(), BalanceSettings(entropy=0.01))
        local.router.begin_run(OptimizerSettings(), BalanceSettings(bias_speed=0.001))  # it has a bias of its own
        local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0, bias_speed=0.001)
        assert local.router.routing.bias(0).abs().sum() > 0  # type: ignore[union-attr]
    with cluster(mixtral, 2) as local, pytest.raises(InvalidInput, match="bias_speed"):
        local.router.begin_run(OptimizerSettings(), BalanceSettings(bias_speed=0.001))


def test_gates_go_out_and_come_in_with_the_model(mixtral: ModelSource, tmp_path: Path) -> None:
    gate = GateSettings(kind="top_k", attention=True, noise_std=0.5)
    with cluster(mixtral, 2, gate=gate) as local:
        local.router.begin_run(OptimizerSettings(), BalanceSettings(bias_speed=0.01))
        for batch in BATCHES:
            local.router.train_step(batch, lr=3e-2, clip_norm=1.0, bias_speed=0.01)
        assert GATES_FILE in local.router.export(tmp_path / "out")
        expected = local.router.serving.logits(IDS)
    again = ModelSource(path=str(tmp_path / "out"), dtype="float64")
    with cluster(again, 2, gate=gate) as local:
        torch.testing.assert_close(local.router.serving.logits(IDS), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(CheckpointError, match="other gates"), cluster(again, 2, gate=GateSettings(kind="top_k")):
        pass


@pytest.mark.parametrize("gate", [None, GateSettings(kind="top_k")])
def test_gate_scores_that_are_not_finite_name_layer_and_step(mixtral: ModelSource, gate: GateSettings | None) -> None:
    with cluster(mixtral, 2, gate=gate) as local:
        local.router.begin_run(OptimizerSettings())
        local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0)
        weight = local.router.routing._routers[1].weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[0, 0] = float("nan")
        with pytest.raises(NonFinite, match=r"gate scores of layer 1 .* version 1") as caught:
            local.router.train_step(BATCHES[1], lr=1e-2, clip_norm=1.0)
        assert caught.value.step == 2
        with torch.no_grad():
            weight.copy_(kept)
        assert local.router.train_step(BATCHES[1], lr=1e-2, clip_norm=1.0).step == 2


@pytest.mark.parametrize("nodes_per_token", [1, 2, 4])
def test_a_token_visits_no_more_nodes_than_its_gate_allows(deepseek: ModelSource, nodes_per_token: int) -> None:
    """Counted on the links: one actor a node, and a token crosses a link once for each actor that it needs."""
    rows: dict[tuple[int, int, int], int] = {}

    def wrap(actor: int, link: Link) -> Link:
        send = link._send

        def counted(question: Message) -> None:
            if question.op == "forward" and question.fields["keep"]:
                key = tuple(question.fields[name] for name in ("step", "microbatch", "layer"))
                rows[key] = rows.get(key, 0) + question.tensors[0].shape[0]
            send(question)

        link._send = counted  # type: ignore[method-assign]
        return link

    gate = GateSettings(kind="node_limited", num_nodes=4, nodes_per_token=nodes_per_token)
    with cluster(deepseek, 4, gate=gate, wrap=wrap) as local:
        local.router.begin_run(OptimizerSettings())
        for batch in BATCHES:
            local.router.train_step(batch, lr=1e-2, clip_norm=1.0)
    tokens = BATCHES[0][0].numel()
    assert all(tokens <= count <= nodes_per_token * tokens for count in rows.values())
    if nodes_per_token == 1:
        assert set(rows.values()) == {tokens}
