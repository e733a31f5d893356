"""The transaction of a step: whatever is lost on the way, a batch counts exactly once."""

from __future__ import annotations

import time
from typing import Literal

import pytest
import torch

from actors.errors import InvalidInput, LinkError, NonFinite, StepAborted
from actors.optim import OptimizerSettings
from actors.reference import Reference
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.transport.message import Message
from actors.trunk.model import ModelSource
from tests.families import save
from tests.local import cluster

STEPS = 4
BATCHES = [
    [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(STEPS)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


@pytest.fixture(scope="module")
def undisturbed(source: ModelSource) -> list[float]:
    reference = Reference(str(source.path), dtype="float64")
    reference.begin_run(OptimizerSettings())
    return [reference.train_step(b, lr=1e-2, clip_norm=1.0)[0] for b in BATCHES]


def losses_with(source: ModelSource, faults: list[Fault], links: str = "socket") -> tuple[list[float], int]:
    """Losses of a run whose first link to actor 1 (the training link) is disturbed once per fault."""
    scripted: list[FaultyLink] = []

    def wrap(actor: int, link: Link) -> Link:
        if actor == 1 and not scripted:
            scripted.append(FaultyLink(link, faults))
            return scripted[0]
        return link

    with cluster(source, 2, links=links, wrap=wrap) as local:
        local.router.begin_run(OptimizerSettings())
        reports = [local.router.train_step(b, lr=1e-2, clip_norm=1.0) for b in BATCHES]
        assert len(scripted[0].struck) == len(faults), "the script must have struck"
        versions = {a["version"] for a in local.router.status()}
        assert versions == {STEPS}
        return [r.loss for r in reports], sum(r.retries for r in reports)


@pytest.mark.parametrize("op", ["forward", "backward", "prepare", "commit"])
@pytest.mark.parametrize("kind", ["drop_question", "drop_answer", "duplicate", "close"])
def test_losses_equal_those_of_an_undisturbed_run(
    source: ModelSource, undisturbed: list[float], op: str, kind: str
) -> None:
    losses, retries = losses_with(source, [Fault(op, 3, kind)])  # type: ignore[arg-type]
    torch.testing.assert_close(losses, undisturbed, rtol=1e-9, atol=0)
    if kind == "duplicate":
        assert retries == 0
    elif op != "commit":
        assert retries == 1


def test_nobody_waits_for_answers_that_were_forgotten(source: ModelSource) -> None:
    """An attempt fails while answers to the commit before it are still unread: they are asked for again at once."""
    deadline_s = 30.0
    scripted: list[Link] = []

    def wrap(actor: int, link: Link) -> Link:
        if actor == 1 and not scripted:
            # Each step asks for four forwards: two micro-batches of two layers.
            scripted.append(FaultyLink(link, [Fault("forward", 5, "close")]))
            return scripted[0]
        return link

    with cluster(source, 2, links="socket", wrap=wrap, timeout_s=deadline_s) as local:
        local.router.begin_run(OptimizerSettings())
        started = time.monotonic()
        reports = [local.router.train_step(b, lr=1e-2, clip_norm=1.0) for b in BATCHES[:2]]
        assert [r.retries for r in reports] == [0, 1]
        assert time.monotonic() - started < deadline_s / 2, "a wait ran into its deadline"


@pytest.mark.parametrize("kind", ["drop_question", "close"])
def test_the_last_commit_arrives_with_whoever_needs_it(
    source: ModelSource, kind: Literal["drop_question", "close"]
) -> None:
    """Nobody trains on, so only serving can bring it."""

    scripted: list[Link] = []

    def wrap(actor: int, link: Link) -> Link:
        if actor == 1 and not scripted:
            scripted.append(FaultyLink(link, [Fault("commit", 1, kind)]))
            return scripted[0]
        return link

    with cluster(source, 2, links="socket") as whole, cluster(source, 2, links="socket", wrap=wrap) as disturbed:
        for local in (whole, disturbed):
            local.router.begin_run(OptimizerSettings())
            local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0)
        assert disturbed.hosts[1].version == 0, "the commit must be lost"
        ids = BATCHES[1][0]
        assert torch.equal(disturbed.router.serving.logits(ids), whole.router.serving.logits(ids))
        assert disturbed.hosts[1].version == 1


def test_experts_without_a_token_decay_as_in_one_process(source: ModelSource) -> None:
    """The same token twice reaches no expert of some actors."""
    tiny = [[torch.tensor([[0, 0]])] for _ in range(4)]
    reference = Reference(str(source.path), dtype="float64")
    reference.begin_run(OptimizerSettings(weight_decay=0.5))
    with cluster(source, 4) as local:
        local.router.begin_run(OptimizerSettings(weight_decay=0.5))
        for batch in tiny:
            reference.train_step(batch, lr=3e-2, clip_norm=1.0)
            report = local.router.train_step(batch, lr=3e-2, clip_norm=1.0)
        assert any(not sum(load_E[:2]) or not sum(load_E[6:]) for load_E in report.load_LE), "an actor must be left out"
        ids = BATCHES[0][0]
        torch.testing.assert_close(local.router.serving.logits(ids), reference.logits(ids), rtol=1e-8, atol=1e-9)


def test_two_faults_in_one_step(source: ModelSource, undisturbed: list[float]) -> None:
    losses, retries = losses_with(source, [Fault("forward", 5, "drop_answer"), Fault("forward", 9, "drop_question")])
    torch.testing.assert_close(losses, undisturbed, rtol=1e-9, atol=0)
    assert retries == 2


def test_retries_are_bounded_and_the_version_stays(source: ModelSource) -> None:
    def wrap(actor: int, link: Link) -> Link:
        return FaultyLink(link, [Fault("prepare", n, "drop_answer") for n in range(1, 99)])

    with cluster(source, 2, links="socket", wrap=wrap, max_step_retries=2) as local:
        local.router.begin_run(OptimizerSettings())
        before = local.router.serving.logits(BATCHES[0][0])
        with pytest.raises((LinkError, StepAborted)):
            local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0)
        assert local.router.version == 0
        assert torch.equal(local.router.serving.logits(BATCHES[0][0]), before)


def test_a_non_finite_loss_names_the_step_and_changes_nothing(source: ModelSource, undisturbed: list[float]) -> None:
    with cluster(source, 2) as local:
        local.router.begin_run(OptimizerSettings())
        first = local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0)
        embedding = local.router.learner.trunk.get_input_embeddings().weight
        kept = embedding.detach().clone()
        with torch.no_grad():
            embedding[BATCHES[1][0][0, 0]] = float("nan")
        with pytest.raises(NonFinite, match="version 1") as caught:
            local.router.train_step(BATCHES[1], lr=1e-2, clip_norm=1.0)
        assert caught.value.step == 2
        with torch.no_grad():
            embedding.copy_(kept)
        again = [local.router.train_step(b, lr=1e-2, clip_norm=1.0) for b in BATCHES[1:]]
        torch.testing.assert_close([r.loss for r in [first, *again]], undisturbed, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (torch.zeros(0, 16, dtype=torch.int64), "token_ids"),
        (torch.zeros(2, 1, dtype=torch.int64), "at least 2"),
        (torch.full((2, 16), 260), "outside the vocabulary"),
        (torch.full((2, 16), -1), "outside the vocabulary"),
        (torch.zeros(1, 129, dtype=torch.int64), "longer than the model"),
    ],
)
def test_bad_batches_are_named(source: ModelSource, ids: torch.Tensor, text: str) -> None:
    with cluster(source, 2) as local:
        with pytest.raises(InvalidInput, match=text):
            local.router.train_step([ids], lr=1e-2, clip_norm=1.0)
        local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0)


def test_no_micro_batch_is_named(source: ModelSource) -> None:
    with cluster(source, 2) as local, pytest.raises(InvalidInput, match="microbatches"):
        local.router.train_step([], lr=1e-2, clip_norm=1.0)


def test_messages_out_of_order_are_refused(source: ModelSource) -> None:
    """A host does not trust its callers: late, early and unprepared messages change nothing."""
    with cluster(source, 2) as local:
        handle = local.hosts[0].handle
        refused = {
            "commit before prepare": Message("commit", {"step": 1, "attempt": 0, "lr": 1.0, "scale": 1.0}),
            "a step too far": Message("prepare", {"step": 2, "attempt": 0}),
            "backward without forward": Message(
                "backward",
                {"step": 1, "attempt": 0, "layer": 0, "microbatch": 0},
                (torch.zeros(1, 32, dtype=torch.float64),),
            ),
            "another layer": Message("forward", {"layer": 9, "step": 1, "attempt": 0}),
            "unknown operation": Message("become", {}),
            "newer than it is": Message("forward", {"layer": 0, "min_version": 5}),
        }
        for what, message in refused.items():
            assert handle("test", message).op == "error", what
        local.router.begin_run(OptimizerSettings())
        assert local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0).step == 1
