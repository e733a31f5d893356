"""What the router computes while tokens are away: shared experts, in both directions. No number changes by it, and
nothing is counted or left behind twice, also where layers are computed a second time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.errors import PeerLost
from actors.moe.settings import BalanceSettings, GateSettings
from actors.optim import OptimizerSettings
from actors.transport.contract import Link
from actors.transport.message import Message
from actors.trunk.model import ModelSource, is_experts
from actors.trunk.shared import shared_of
from actors.values import StepReport
from tests.families import save
from tests.local import LocalCluster, cluster

BATCHES = [
    [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(3)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


def run(local: LocalCluster, balance: BalanceSettings | None = None) -> list[StepReport]:
    local.router.begin_run(OptimizerSettings(), balance)
    return [local.router.train_step(b, lr=1e-2, clip_norm=1.0) for b in BATCHES]


class Watched:
    """What happens in the last layer, in order."""

    def __init__(self, local: LocalCluster) -> None:
        self.log: list[str] = []
        block = local.router.learner.trunk.model.layers[-1].mlp
        layer = len(local.router.learner.skeleton.layers) - 1
        block.shared_experts.down_proj.register_forward_hook(lambda *args: self.log.append("shared forward"))
        block.shared_experts.down_proj.register_full_backward_hook(lambda *args: self.log.append("shared backward"))
        self._watch(local.router.state.training.links["expert-0"], layer)

    def _watch(self, link: Link, layer: int) -> None:
        start, wait, asked = link.start, link.wait, dict[int, str]()

        def watched_start(question: Message) -> Any:
            pending = start(question)
            if question.op in ("forward", "backward") and question.fields["layer"] == layer:
                asked[pending.id] = question.op
                self.log.append(f"{question.op} sent")
            return pending

        def watched_wait(question_id: int, timeout_s: float) -> Message:
            if question_id in asked:
                self.log.append(f"{asked[question_id]} awaited")
            return wait(question_id, timeout_s)

        link.start, link.wait = watched_start, watched_wait  # type: ignore[method-assign]


def test_shared_experts_are_computed_while_tokens_are_away(source: ModelSource) -> None:
    with cluster(source, 2) as local:
        local.router.begin_run(OptimizerSettings())
        watched = Watched(local)
        local.router.train_step(BATCHES[0][:1], lr=1e-2, clip_norm=1.0)
        assert watched.log == [
            *("forward sent", "shared forward", "forward awaited"),
            *("backward sent", "shared backward", "backward awaited"),
        ]


def test_no_bit_changes_by_it(source: ModelSource) -> None:
    """Against a trunk whose shared experts are never computed early."""
    losses, logits = [], []
    for is_early in (True, False):
        with cluster(source, 2) as local:
            learner = local.router.learner
            layers = [m for tree in (learner.trunk, learner.view) for m in tree.modules() if is_experts(m)]
            for module in [] if is_early else layers:
                shared = shared_of(module)
                assert shared is not None
                shared._source = ""
            losses.append([(report.loss, report.grad_norm) for report in run(local)])
            logits.append([local.router.serving.logits(BATCHES[0][0]) for _ in range(2)])
            found = [shared for m in layers if (shared := shared_of(m)) is not None]
            assert [shared.is_early for shared in found] == [is_early] * len(found)
    assert losses[0] == losses[1]
    assert torch.equal(logits[0][0], logits[1][0])
    assert torch.equal(logits[0][1], logits[1][1])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_layer_that_is_computed_twice_counts_once(source: ModelSource, use_reentrant: bool, in_flight: int) -> None:
    gate, balance = GateSettings(kind="top_k"), BalanceSettings(sequence=0.01)
    found = []
    for is_checkpointed in (False, True):
        with cluster(source, 2, gate=gate, links="socket", in_flight=in_flight) as local:
            if is_checkpointed:
                kwargs = {"use_reentrant": use_reentrant}
                local.router.learner.trunk.train().gradient_checkpointing_enable(kwargs)
            # A loss of the gates has no way back through a forward without a graph, as the reentrant kind makes it.
            reports = run(local, None if use_reentrant else balance)
            found.append([(r.loss, r.grad_norm, r.balance_loss, r.load_LE) for r in reports])
            links = local.router.state.training.links.values()
            # One is open on purpose: that to the last commit.
            assert all(not link._early and len(link._waiting) == 1 for link in links), "answers nobody waits for"
    assert found[1] == found[0]


def test_serving_goes_around_an_actor_that_is_lost_between_the_halves(source: ModelSource) -> None:
    ids = BATCHES[0][0]
    with cluster(source, 3, redundancy=2) as local:
        expected = local.router.serving.logits(ids)
        dispatcher = local.router.state.requests
        link = dispatcher.links["expert-1"]
        wait, armed, struck = link.wait, list[bool](), list[int]()

        def dies(question_id: int, timeout_s: float) -> Message:
            if armed:
                struck.append(question_id)
                raise PeerLost("died with the tokens", peer=link.peer)
            return wait(question_id, timeout_s)

        link.wait = dies  # type: ignore[method-assign]
        block = local.router.learner.view.model.layers[-1].mlp
        block.shared_experts.down_proj.register_forward_hook(lambda *args: armed.append(True))
        torch.testing.assert_close(local.router.serving.logits(ids), expected, rtol=1e-9, atol=1e-12)
        assert len(struck) == 1
        assert len(armed) == 1, "what others compute anew is no reason to compute shared experts again"
        assert dispatcher.links.lost == {"expert-1"}


def test_answers_are_dropped_after_an_error_between_the_halves(source: ModelSource) -> None:
    ids, broken = BATCHES[0][0], list[bool]()

    def may_break(*args: object) -> None:
        if broken:
            raise RuntimeError("out of memory, say")

    with cluster(source, 2, links="socket") as local:
        expected = local.router.serving.logits(ids)
        block = local.router.learner.view.model.layers[-1].mlp
        block.shared_experts.down_proj.register_forward_pre_hook(may_break)
        broken.append(True)
        with pytest.raises(RuntimeError, match="out of memory"):
            local.router.serving.logits(ids)
        broken.clear()
        links = local.router.state.requests.links.values()
        assert not any(link._waiting or link._early for link in links)
        assert torch.equal(local.router.serving.logits(ids), expected)
