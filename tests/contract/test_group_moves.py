"""Expert groups change their actor in the middle of a run, and nobody can tell from the numbers."""

from __future__ import annotations

import pytest
import torch

from actors.errors import InvalidInput, LinkError
from actors.optim import OptimizerSettings
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.transport.message import Message
from actors.trunk.model import ModelSource
from tests.families import save
from tests.local import LocalCluster, cluster

BATCHES = [
    [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(5)
]
IDS = BATCHES[0][0]


@pytest.fixture(scope="module", params=["deepseek_v3", "gpt_oss"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save(request.param, tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


def run(local: LocalCluster, moves: dict[int, list[tuple[int, int, int]]]) -> list[float]:
    """Losses of the steps; `moves[t]` (group, source, target) are made before step t."""
    local.router.begin_run(OptimizerSettings())
    losses = []
    for number, batch in enumerate(BATCHES):
        for move in moves.get(number, []):
            local.router.move_group(*move)
        losses.append(local.router.train_step(batch, lr=1e-2, clip_norm=1.0).loss)
    return losses


MOVES = {
    "before the first step": {0: [(0, 0, 1)]},
    "there and back": {1: [(1, 0, 1)], 3: [(1, 1, 0)]},
    "an exchange": {2: [(0, 0, 1), (3, 1, 0)]},
    "at each step": {t: [(0, t % 2, 1 - t % 2)] for t in range(5)},
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("links", ["local", "socket"])
def test_losses_and_logits_are_those_of_an_unmoved_run(source: ModelSource, name: str, links: str) -> None:
    with cluster(source, 2) as still:
        expected = run(still, {})
        logits = still.router.logits(IDS)
    with cluster(source, 2, links=links) as local:
        torch.testing.assert_close(run(local, MOVES[name]), expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(local.router.logits(IDS), logits, rtol=1e-9, atol=1e-10)
        held = sorted(e for host in local.hosts for e in host.experts)
        assert held == list(range(8)), "every expert has one owner"


def test_a_move_that_fails_leaves_the_group_where_it_was(source: ModelSource) -> None:
    with cluster(source, 2) as still:
        expected = run(still, {})

    def wrap(actor: int, link: Link) -> Link:
        return FaultyLink(link, [Fault("stage_group", 2, "drop_answer")]) if actor == 1 else link

    with cluster(source, 2, links="socket", wrap=wrap, timeout_s=1.0) as local:
        local.router.begin_run(OptimizerSettings())
        first = local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0).loss
        with pytest.raises(LinkError):
            local.router.move_group(0, 0, 1)
        assert (local.hosts[0].groups, local.hosts[1].groups) == ((0, 1), (2, 3))
        local.router.move_group(0, 0, 1)
        assert (local.hosts[0].groups, local.hosts[1].groups) == ((1,), (2, 3, 0))
        rest = [local.router.train_step(b, lr=1e-2, clip_norm=1.0).loss for b in BATCHES[1:]]
        torch.testing.assert_close([first, *rest], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("op", "strikes", "moved"), [("take_group", 1, False), ("drop_group", 0, True)])
def test_a_lost_answer_leaves_the_group_with_one_owner(source: ModelSource, op: str, strikes: int, moved: bool) -> None:
    """The host has done it, the router does not know."""
    with cluster(source, 2) as still:
        expected = run(still, {})
    scripted: list[Link] = []

    def wrap(actor: int, link: Link) -> Link:
        if actor == strikes and not scripted:
            scripted.append(FaultyLink(link, [Fault(op, 1, "drop_answer")]))
            return scripted[0]
        return link

    with cluster(source, 2, links="socket", wrap=wrap, timeout_s=1.0) as local:
        local.router.begin_run(OptimizerSettings())
        first = local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0).loss
        if moved:
            local.router.move_group(0, 0, 1)
        else:
            with pytest.raises(LinkError):
                local.router.move_group(0, 0, 1)
        expected_groups = ((1,), (2, 3, 0)) if moved else ((0, 1), (2, 3))
        assert (local.hosts[0].groups, local.hosts[1].groups) == expected_groups
        rest = [local.router.train_step(b, lr=1e-2, clip_norm=1.0).loss for b in BATCHES[1:]]
        torch.testing.assert_close([first, *rest], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("move", "text"),
    [((2, 0, 1), "does not own"), ((9, 0, 1), "does not own"), ((0, 0, 0), "does not own")],
)
def test_moves_that_cannot_be_are_refused(source: ModelSource, move: tuple[int, int, int], text: str) -> None:
    with cluster(source, 2) as local:
        local.router.begin_run(OptimizerSettings())
        with pytest.raises(InvalidInput, match=text):
            local.router.move_group(*move)
        assert local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0).step == 1


def test_an_actor_keeps_its_last_group(source: ModelSource) -> None:
    with cluster(source, 4) as local:
        with pytest.raises(InvalidInput, match="owns no other"):
            local.router.move_group(0, 0, 1)
        assert [h.groups for h in local.hosts] == [(0,), (1,), (2,), (3,)], "the taker gives it back"
        assert local.router.logits(IDS).isfinite().all()


def test_a_group_of_another_version_is_refused(source: ModelSource) -> None:
    with cluster(source, 2) as local:
        local.router.begin_run(OptimizerSettings())
        local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0)
        giver, taker = (host.handle for host in local.hosts)
        for layer in range(2):
            part = giver("test", Message("export_group", {"group": 0, "layer": layer}))
            assert taker("test", Message("stage_group", {"group": 0, "layer": layer}, part.tensors)).op == "ok"
        answer = taker("test", Message("take_group", {"group": 0, "version": 0, "updates": 0}))
        assert (answer.op, answer.fields["kind"]) == ("error", "step_aborted")
        unstaged = taker("test", Message("take_group", {"group": 0, "version": 1, "updates": 1}))
        assert "did not come" in str(unstaged.fields["text"])
