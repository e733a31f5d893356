"""Copies of expert groups: they stay equal bit for bit, come and go in the middle of a run, take over from the dead;
nobody can tell from the numbers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import LinkError, MoeClusterError, StepAborted
from actors.expert.exchange import Exchange
from actors.optim import OptimizerSettings
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.transport.message import Message
from actors.trunk.model import ModelSource
from actors.values import Address, Placement
from tests.families import save
from tests.local import LocalCluster, cluster

BATCHES = [
    [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(5)
]
IDS = BATCHES[0][0]


Numbers = tuple[list[float], torch.Tensor]
"""Losses of the steps, logits after them."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


@pytest.fixture(scope="module")
def unmoved(source: ModelSource) -> Numbers:
    return numbers_of(source)


def numbers_of(source: ModelSource) -> Numbers:
    with cluster(source, 2) as still:
        return run(still), still.router.serving.logits(IDS)


def run(
    local: LocalCluster, between: Mapping[int, Callable[[], object]] | None = None, *, agree: bool = True
) -> list[float]:
    """Losses of the steps; `between[t]` is called before step t. With `agree` copies are compared after each, which
    confirms its commit."""
    local.router.begin_run(OptimizerSettings())
    losses = []
    for number, batch in enumerate(BATCHES):
        if between and number in between:
            between[number]()
        losses.append(local.router.train_step(batch, lr=1e-2, clip_norm=1.0).loss)
        if agree:
            copies_agree(local)
    return losses


def copies_agree(local: LocalCluster) -> None:
    """Bit for bit: weights, moments and counts of every group at all of its holders."""
    local.router.status()  # waits for the commit
    for group, holders in enumerate(local.placement.holders):
        first, *others = [local.members[n].host.holdings for n in holders if not local.members[n].dead]
        for layer in range(len(first.stacks)):
            tensors, updates = first.read(group, layer)
            for other in others:
                copy, copy_updates = other.read(group, layer)
                assert copy_updates == updates
                assert all(torch.equal(a, b) for a, b in zip(tensors, copy, strict=True)), f"group {group}"


def same(local: LocalCluster, losses: list[float], expected: Numbers) -> None:
    torch.testing.assert_close(losses, expected[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(local.router.serving.logits(IDS), expected[1], rtol=1e-9, atol=1e-10)


# Four groups on actors 0 and 1, which own two each; "02": owned by actor 0, with a copy on actor 2.
PLACEMENTS: dict[str, dict[int, tuple[str, ...]]] = {
    "a group moves before the first step": {0: ("1", "0", "1", "1")},
    "there and back": {1: ("0", "1", "1", "1"), 3: ("0", "0", "1", "1")},
    "an exchange": {2: ("1", "0", "1", "0")},
    "at each step": {t: (str(t % 2), "0", "1", "1") for t in range(5)},
    "a copy": {1: ("01", "0", "1", "1")},
    "all have copies": {1: ("01", "01", "10", "10")},
    "copies come, own, and go": {1: ("01", "0", "1", "1"), 2: ("10", "0", "1", "1"), 3: ("1", "0", "1", "1")},
    "another actor joins": {1: ("0", "2", "1", "2")},
    "another actor joins with copies only": {2: ("02", "02", "12", "1")},
    "one joins, one leaves": {1: ("0", "0", "2", "2")},
    "two join, both old ones leave": {1: ("02", "02", "13", "13"), 3: ("2", "2", "3", "3")},
}


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("links", ["local", "socket"])
def test_losses_and_logits_are_those_of_an_unmoved_run(
    source: ModelSource, unmoved: Numbers, name: str, links: str
) -> None:
    placements = PLACEMENTS[name]
    with cluster(source, 2, links=links) as local:
        for _ in range(2, 1 + max(int(n) for held in placements.values() for digits in held for n in digits)):
            local.add()
        losses = run(local, {t: lambda held=held: local.adopt(*held) for t, held in placements.items()})  # type: ignore[misc]
        same(local, losses, unmoved)
        for member in local.members.values():
            in_use = local.placement.held_by(member.name)
            assert set(member.host.groups) == set(in_use) or member.name not in local.placement.actors


def test_experts_with_biases_have_copies_too(tmp_path: Path) -> None:
    source = ModelSource(path=str(save("gpt_oss", tmp_path / "m", torch.float64)), dtype="float64")
    with cluster(source, 2) as local:
        local.add()
        between = {1: lambda: local.adopt("02", "0", "12", "1"), 3: lambda: local.adopt("2", "0", "21", "1")}
        same(local, run(local, between), numbers_of(source))


def test_redundancy_from_the_start(source: ModelSource, unmoved: Numbers) -> None:
    with cluster(source, 3, links="socket", redundancy=2) as local:
        assert all(len(held) == 2 for held in local.placement.holders)
        same(local, run(local), unmoved)


def test_a_group_arrives_while_steps_go_on(source: ModelSource, unmoved: Numbers) -> None:
    """The new actor gets layers of several versions and makes the updates in between itself."""
    with cluster(source, 2, links="socket") as local:
        name = local.add()
        sent: list[int] = []
        threads = [threading.Thread(target=lambda g=g: sent.append(local.arrive(g, "expert-0", name))) for g in (0, 1)]  # type: ignore[misc]

        def switch() -> None:
            for thread in threads:
                thread.join(20)
            assert len(sent) == 2
            local.adopt("2", "02", "1", "1")

        losses = run(local, {1: threads[0].start, 2: threads[1].start, 4: switch})
        same(local, losses, unmoved)
        assert sorted(local.members[name].host.groups) == [0, 1]


@pytest.mark.parametrize("links", ["local", "socket"])
def test_links_to_who_has_arrived_are_ended(source: ModelSource, links: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors come and go for months: an owner that kept a link to each that it ever sent a group to would run out of
    file handles."""
    opened: list[tuple[str, Link]] = []
    real = LocalCluster.open_exchange

    def open_exchange(self: LocalCluster, name: str, address: Address) -> Link:
        opened.append((name, link := real(self, name, address)))
        return link

    monkeypatch.setattr(LocalCluster, "open_exchange", open_exchange)
    with cluster(source, 2, links=links) as local:
        name = local.add()
        between = {1: lambda: local.arrive(0, "expert-0", name), 3: lambda: local.adopt("2", "0", "1", "1")}
        run(local, between)
        told = [link for to, link in opened if to == name]
        assert told
        assert all(link.closed for link in told)


@pytest.mark.parametrize("links", ["local", "socket"])
def test_who_gave_a_group_up_is_sent_no_more_of_it(
    source: ModelSource, unmoved: Numbers, links: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of a whole group are as much as its weights, every step: not until some other placement comes."""
    told: list[tuple[int, int]] = []
    """Group and version of every update that came."""
    put = Exchange._put_update

    def noted(self: Exchange, question: Message) -> bool:
        told.append((question.fields["group"], question.fields["version"]))  # type: ignore[arg-type]
        return put(self, question)

    monkeypatch.setattr(Exchange, "_put_update", noted)
    with cluster(source, 2, links=links) as local:
        name = local.add()
        owner, follower = local.members["expert-0"].host.state, local.members[name].host

        def bring() -> None:
            for group in (0, 1):
                local.arrive(group, "expert-0", name)

        def answered() -> None:
            """Which the owner hears at its next update."""
            link, unconfirmed = owner.followers._links[name]
            assert all(link.look(sent.pending.id, 20.0) for sent in unconfirmed)

        def give_up() -> None:
            """When the update before, which nobody waits for, is done: it was wanted."""
            deadline = time.monotonic() + 20.0
            while not {(0, 2), (1, 2)} <= set(told):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            answered()
            follower.placing.leave_off(0)

        same(local, run(local, {1: bring, 2: give_up, 3: answered}), unmoved)
        assert owner.followers.groups == {1}
        answered()
        local.arrive(0, "expert-0", name)
        assert owner.followers.groups == {0, 1}
        assert {version for group, version in told if group == 1} == {2, 3, 4, 5}
        assert {version for group, version in told if group == 0} == {2, 3}
        local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0)
        local.adopt("2", "2", "1", "1")
        copies_agree(local)
        assert sorted(follower.groups) == [0, 1]


@pytest.mark.parametrize("links", ["local", "socket"])
def test_who_follows_a_group_anew_gets_its_updates(source: ModelSource, unmoved: Numbers, links: str) -> None:
    """The owner hears that the group was given up after it was asked for it again."""
    with cluster(source, 2, links=links) as local:
        name = local.add()
        follower = local.members[name].host

        def again() -> None:
            local.router.status()  # an update that came too late is answered by now
            local.arrive(0, "expert-0", name)

        def switch() -> None:
            """To what has arrived."""
            local.placement = Placement(2, tuple((f"expert-{n}",) for n in (2, 0, 1, 1)), 2)
            local.router.placing.adopt(local.roster(local.placement))

        between = {
            1: lambda: local.arrive(0, "expert-0", name),
            2: lambda: follower.placing.leave_off(0),
            3: again,
            4: switch,
        }
        same(local, run(local, between), unmoved)
        assert follower.groups == (0,)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("when", ["between steps", "forward", "backward", "prepare", "reduce", "commit"])
def test_copies_take_over_from_the_dead(source: ModelSource, unmoved: Numbers, victim: int, when: str) -> None:
    victims: list[Callable[[], None]] = []

    def wrap(actor: int, link: Link) -> Link:
        return _Deadly(link, when, victims) if actor == victim else link

    with cluster(source, 3, links="socket", redundancy=2, heals=True, wrap=wrap) as local:
        victims.append(local.members[f"expert-{victim}"].kill)
        between = {2: victims[0]} if when == "between steps" else {}
        losses = run(local, between)  # type: ignore[arg-type]
        assert local.members[f"expert-{victim}"].dead
        assert f"expert-{victim}" not in local.placement.actors
        same(local, losses, unmoved)


class _Deadly(FaultyLink):
    """The peer dies of the third message of a kind."""

    def __init__(self, inner: Link, op: str, victims: list[Callable[[], None]]) -> None:
        super().__init__(inner, [Fault(op, 3, "close")])
        self._victims = victims

    def close(self) -> None:
        if self.struck:
            self._victims[0]()
        super().close()


def test_serving_goes_on_at_another_copy(source: ModelSource, unmoved: Numbers) -> None:
    with cluster(source, 3, links="socket", redundancy=2) as local:
        run(local)
        local.members["expert-1"].kill()
        torch.testing.assert_close(local.router.serving.logits(IDS), unmoved[1], rtol=1e-9, atol=1e-10)
        local.members["expert-2"].kill()
        with pytest.raises(StepAborted, match="no expert actor holds"):
            local.router.serving.logits(IDS)


def test_without_a_copy_the_death_of_an_actor_is_an_error(source: ModelSource) -> None:
    with cluster(source, 2, links="socket") as local:
        local.router.begin_run(OptimizerSettings())
        local.members["expert-1"].kill()
        with pytest.raises(LinkError, match="expert-1"):
            local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0)


@pytest.mark.parametrize("kind", ["drop_question", "drop_answer", "close"])
@pytest.mark.parametrize("op", ["place", "retire"])
def test_a_switch_that_fails_can_be_made_again(source: ModelSource, unmoved: Numbers, op: str, kind: str) -> None:
    scripted: list[Link] = []

    def wrap(actor: int, link: Link) -> Link:
        if actor == 1 and not scripted:
            # The first `place` is that of the start.
            scripted.append(FaultyLink(link, [Fault(op, 2 if op == "place" else 1, kind)]))  # type: ignore[arg-type]
            return scripted[0]
        return link

    with cluster(source, 2, links="socket", wrap=wrap) as local:

        def switch() -> None:
            if op == "place":
                with pytest.raises(LinkError):
                    local.adopt("1", "0", "1", "1")
            local.adopt("1", "0", "1", "1")

        same(local, run(local, {2: switch}), unmoved)
        assert [set(h.groups) for h in local.hosts] == [{1}, {0, 2, 3}]


def test_a_new_job_gives_up_what_is_on_its_way(source: ModelSource) -> None:
    with cluster(source, 2) as local:
        run(local)
        local.arrive(0, "expert-0", "expert-1")
        local.router.begin_run(OptimizerSettings())
        held = tuple((f"expert-{n}",) for n in (1, 0, 1, 1))
        with pytest.raises(StepAborted, match="is not here"):
            local.router.placing.adopt(local.roster(Placement(2, held, 2)))
        assert local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0).step == len(BATCHES) + 1
        assert local.hosts[1].holdings.arriving == ()


@pytest.mark.parametrize("links", ["local", "socket"])
def test_who_had_taken_a_placement_that_another_refused_has_no_part_in_steps(
    source: ModelSource, unmoved: Numbers, links: str
) -> None:
    """A new actor that has already placed what never came to be used; it can get the group again."""
    with cluster(source, 2, links=links) as local:
        name = local.add()

        def refused() -> None:
            local.arrive(0, "expert-0", name)
            held = tuple((f"expert-{n}",) for n in (2, 1, 1, 1))  # group 1 is not on its way to anybody
            with pytest.raises(StepAborted, match="is not here"):
                local.router.placing.adopt(local.roster(Placement(2, held, 2)))
            assert name not in local.router.state.training.links
            assert local.members[name].host.groups == ()

        def again() -> None:
            local.placement = replace(local.placement, epoch=9)
            local.adopt("2", "0", "1", "1")

        same(local, run(local, {1: refused, 3: again}), unmoved)
        assert local.members[name].host.groups == (0,)


def test_who_was_told_by_nobody_that_a_placement_is_not_used_gives_its_group_up(
    source: ModelSource, unmoved: Numbers
) -> None:
    with cluster(source, 2) as local:
        name = local.add()

        def in_vain() -> None:
            local.arrive(0, "expert-0", name)
            fields: dict[str, Any] = {"epoch": 2, "holders": [[name], ["expert-0"], ["expert-1"], ["expert-1"]]}
            question = Message("place", {**fields, "addresses": {}, "version": 1, "run": 1})
            answer = local.members[name].host.handle("router", question)
            assert answer.fields["experts"] == [0, 1], answer.fields
            local.members[name].host.placing.leave_off(0)
            assert local.members[name].host.groups == ()

        def again() -> None:
            local.placement = replace(local.placement, epoch=9)
            local.adopt("2", "0", "1", "1")

        same(local, run(local, {1: in_vain, 3: again}), unmoved)


def test_an_actor_that_was_forgotten_in_a_switch_that_failed_is_asked_for_again(source: ModelSource) -> None:
    """It died, and who was to have its groups did not have them."""
    with cluster(source, 3, links="socket", redundancy=2, heals=True) as local:
        run(local)
        local.members["expert-0"].kill()
        local.router.state.training.links["expert-0"].close()
        without = local.placement.without({"expert-0"})
        held = (("expert-1",),) * len(without.holders)
        with pytest.raises(StepAborted, match="is not here"):
            local.router.placing.adopt(local.roster(Placement(without.epoch, held, 2)))
        local.placement = replace(local.placement, epoch=without.epoch)
        assert local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0).step == len(BATCHES) + 1
        assert "expert-0" not in local.router.placement.actors


def test_a_group_that_left_and_missed_a_step_is_not_taken_back(source: ModelSource) -> None:
    with cluster(source, 2) as local:
        run(local, {1: lambda: local.adopt("1", "0", "1", "1")})
        held = tuple((f"expert-{n}",) for n in (0, 0, 1, 1))
        with pytest.raises(StepAborted, match="is not here"):
            local.router.placing.adopt(local.roster(Placement(9, held, 2)))
        assert local.router.serving.logits(IDS).isfinite().all()


@pytest.mark.parametrize(
    ("group", "source_actor", "target", "text"),
    [
        (2, "expert-0", "expert-1", "holds it already"),
        (9, "expert-0", "expert-1", "the last group is 3"),
        (0, "expert-1", "expert-1", "holds|own"),
        (1, "expert-1", "expert-2", "does not own"),
    ],
)
def test_arrivals_that_cannot_be_are_refused(
    source: ModelSource, group: int, source_actor: str, target: str, text: str
) -> None:
    with cluster(source, 2, links="socket") as local:
        local.add()
        with pytest.raises(MoeClusterError, match=text):
            local.arrive(group, source_actor, target)
        assert local.router.serving.logits(IDS).isfinite().all()


def test_a_message_of_another_placement_is_refused(source: ModelSource) -> None:
    with cluster(source, 2) as local:
        answer = local.hosts[0].handle("test", Message("forward", {"layer": 0, "epoch": 7, "counts_E": [0] * 4}))
        assert (answer.op, answer.fields["kind"]) == ("error", "step_aborted")


def test_memory_of_groups_that_left_is_given_back(source: ModelSource) -> None:
    with cluster(source, 1) as local:
        before = local.hosts[0].status()["memory_bytes"]
        local.add()
        local.adopt("0", "1", "1", "1")
        # One place stays free for the next group that comes.
        assert local.hosts[0].status()["memory_bytes"] <= before / 2
        assert local.hosts[0].groups == (0,)


def test_a_death_between_steps_is_switched_away_from_at_once(source: ModelSource, unmoved: Numbers) -> None:
    """The coordinator hears of it first: nobody has asked the dead actor anything since its last commit."""
    deadline_s = 30.0
    with cluster(source, 3, links="socket", redundancy=2, timeout_s=deadline_s) as local:

        def die() -> None:
            local.members["expert-1"].kill()
            assert local.router.placing.adopt(local.without(["expert-1"])) < deadline_s / 2

        started = time.monotonic()
        same(local, run(local, {2: die}, agree=False), unmoved)
        assert time.monotonic() - started < deadline_s / 2, "a wait ran into its deadline"


@pytest.mark.parametrize("when", ["between steps", "in a step"])
def test_who_is_cut_off_is_not_waited_for(source: ModelSource, unmoved: Numbers, when: str) -> None:
    """A frozen actor: its sockets are open and take connections, and nothing comes back."""
    deadline_s = 30.0
    with cluster(source, 3, links="socket", redundancy=2, heals=True, timeout_s=deadline_s) as local:
        frozen = local.members["expert-1"]

        def freeze() -> None:
            frozen.freeze()
            delay_s = 0.0 if when == "between steps" else 0.5
            timer = threading.Timer(delay_s, local.cut, ["expert-1"])
            timer.start()
            if not delay_s:
                timer.join()

        started = time.monotonic()
        losses = run(local, {2: freeze})
        assert time.monotonic() - started < deadline_s / 2, "a wait ran into its deadline"
        assert "expert-1" not in local.placement.actors
        same(local, losses, unmoved)
        frozen.thaw()
