"""Several routers train one trunk: their numbers are those of one, whoever joins, leaves or dies, whenever it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import CheckpointError, MoeClusterError, NonFinite, PeerLost, StepAborted
from actors.expert.exchange import Attempt
from actors.moe.settings import BalanceSettings, GateSettings
from actors.optim import OptimizerSettings
from actors.router.steps import Update
from actors.snapshots import Key, SavedState, Snapshot
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.transport.message import Message
from actors.trunk.model import ModelSource
from actors.values import Growth, Sampling, StepReport
from tests.families import save
from tests.routers import DeadlyLink, Killed, Routers, routers_of

SIZES = (4, 3, 1)
"""Sequences of the micro-batches: such as divide evenly, such as do not, and fewer than there are routers."""
BATCHES = [
    [
        torch.randint(0, 256, (size, 16), generator=torch.Generator().manual_seed(10 * t + m))
        for m, size in enumerate(SIZES)
    ]
    for t in range(5)
]
IDS = BATCHES[0][0]
SPEED = 1e-3
GATE = GateSettings(kind="top_k")
"""In float64; the family's own computes in float32, where a matrix product depends on how many tokens are in it."""
OPTIMIZER = OptimizerSettings(eps=1e-4)
"""Sums in another order differ by 1e-16; with the usual eps AdamW makes 1e-8 of that where a gradient is all but 0."""
WAIT_S = 20.0
Between = Mapping[int, Callable[[], object]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


def routers(source: ModelSource, count: int, **changes: Any) -> AbstractContextManager[Routers]:
    return routers_of(source, count, **{"links": "socket", "gate": GATE, **changes})


def step(group: Routers, number: int) -> StepReport:
    return group.router.train_step(BATCHES[number], lr=1e-2, clip_norm=1.0, bias_speed=SPEED)


def run(group: Routers, between: Between | None = None) -> list[StepReport]:
    """`between[t]` is called before step t. All routers are compared after each."""
    group.router.begin_run(OPTIMIZER)
    reports = []
    for number in range(len(BATCHES)):
        if between and number in between:
            between[number]()
        reports.append(step(group, number))
        group.agree()
    return reports


@pytest.fixture(scope="module")
def alone(source: ModelSource) -> tuple[list[StepReport], torch.Tensor]:
    with routers(source, 1, links="local") as group:
        return run(group), group.router.serving.logits(IDS)


Numbers = tuple[list[StepReport], torch.Tensor]


def same(group: Routers, reports: list[StepReport], alone: Numbers) -> None:
    expected, logits = alone
    assert [r.step for r in reports] == [r.step for r in expected]
    assert [r.num_tokens for r in reports] == [r.num_tokens for r in expected]
    assert [r.load_LE for r in reports] == [r.load_LE for r in expected]
    for name in ("loss", "grad_norm"):
        measured = [getattr(r, name) for r in reports]
        torch.testing.assert_close(measured, [getattr(r, name) for r in expected], rtol=1e-9, atol=0)
    for router in group.living.values():
        torch.testing.assert_close(router.serving.logits(IDS), logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("links", ["local", "socket"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("redundancy", [1, 2])
def test_losses_and_updates_are_those_of_one_router(
    source: ModelSource, alone: Numbers, count: int, links: str, redundancy: int
) -> None:
    with routers(source, count, links=links, redundancy=redundancy) as group:
        reports = run(group)
        assert len(group.living) == count
        same(group, reports, alone)


def test_all_rules_of_balance_are_followed_alike(source: ModelSource) -> None:
    """The loss of a sequence is its own business, so that one is exact as well."""
    gate = GateSettings(kind="top_k")
    balance = BalanceSettings(sequence=0.01, bias_speed=SPEED)
    totals = []
    for count in (1, 2):
        with routers(source, count, gate=gate) as group:
            group.router.begin_run(OPTIMIZER, balance)
            reports = [step(group, number) for number in range(3)]
            group.agree()
            totals.append([(r.loss, r.balance_loss) for r in reports])
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-9, atol=0)
    assert all(balance > 0 for _, balance in totals[0])


def test_routers_join_and_leave_between_steps(source: ModelSource, alone: Numbers) -> None:
    with routers(source, 1) as group:

        def leave() -> None:
            group.router.part("router-1")
            group.seats["router-1"].kill()

        reports = run(group, {1: group.add, 2: group.add, 3: leave})
        assert list(group.living) == ["router-0", "router-2"]
        assert group.router.replicas.lost == []
        same(group, reports, alone)


def test_a_placement_moves_under_two_routers(source: ModelSource, alone: Numbers) -> None:
    with routers(source, 2) as group:
        group.local.add()
        adopt = group.local.adopt
        moves: Between = {
            1: lambda: adopt("1", "0", "1", "1"),
            2: lambda: adopt("12", "0", "10", "1"),
            4: lambda: adopt("2", "2", "1", "0"),
        }
        reports = run(group, moves)
        same(group, reports, alone)
        assert len(group.living) == 2


def test_a_router_that_joins_later_knows_the_placement(source: ModelSource, alone: Numbers) -> None:
    with routers(source, 1) as group:
        reports = run(group, {1: lambda: group.local.adopt("1", "0", "10", "1"), 2: group.add})
        same(group, reports, alone)


@pytest.mark.parametrize("op", ["accumulate", "gradients", "prepare", "sum", "commit", "begin_run"])
@pytest.mark.parametrize("after", [False, True])
def test_the_death_of_a_replica_costs_one_attempt_at_most(
    source: ModelSource, alone: Numbers, op: str, after: bool
) -> None:
    strikes: list[Callable[[], None]] = []

    def wrap(name: str, link: Link) -> Link:
        nth = {"begin_run": 1, "gradients": 40, "sum": 40}.get(op, 3)
        return DeadlyLink(link, op, nth, lambda: strikes[0](), after=after) if name == "router-1" else link

    with routers(source, 3, wrap_replica=wrap) as group:
        strikes.append(group.seats["router-1"].kill)
        reports = run(group)
        assert list(group.living) == ["router-0", "router-2"]
        assert group.router.replicas.lost == ["router-1"]
        assert sum(r.retries for r in reports) <= 1
        same(group, reports, alone)


def test_gradients_are_sent_while_backward_goes_on(source: ModelSource) -> None:
    answered, seen = threading.Event(), []
    with routers(source, 2) as group:
        replica = group.seats["router-1"].replica
        gradients = replica._handlers["gradients"]

        def answer(question: Message) -> Message:
            message = gradients(question)
            answered.set()
            return message

        def hold(grad: torch.Tensor) -> None:
            """Of the embedding, which comes last."""
            seen.append(answered.wait(20))

        replica._handlers["gradients"] = answer
        replica.router.learner.trunk.get_input_embeddings().weight.register_hook(hold)
        group.router.begin_run(OPTIMIZER)
        group.router.train_step(BATCHES[0][:1], lr=1e-2, clip_norm=1.0)
        group.agree()
        assert seen == [True]


LEADERS_WAY = [
    # op, its number, on the way to whom, before or after it is sent
    ("accumulate", 3, "router-1", False),
    ("accumulate", 3, "router-1", True),
    ("accumulate", 3, "router-2", True),
    ("forward", 14, "expert", False),  # far below what five steps send, however fast this router was found to be
    ("prepare", 3, "expert", False),
    ("prepare", 3, "expert", True),
    ("prepare", 3, "router-1", False),
    ("prepare", 3, "router-1", True),
    ("prepare", 3, "router-2", False),
    ("prepare", 3, "router-2", True),
    ("commit", 3, "expert", False),
    ("commit", 3, "expert", True),
    ("commit", 3, "router-1", False),
    ("commit", 3, "router-1", True),
    ("commit", 3, "router-2", False),
    ("commit", 3, "router-2", True),
]


@pytest.mark.parametrize(
    ("op", "nth", "to", "after", "heir"),
    [
        (*way, heir)
        for way in LEADERS_WAY
        for heir in ("router-1", "router-2")
        if heir == "router-2" or way[0] == "commit"
    ],
)
def test_a_replica_takes_the_place_of_a_dead_leader(
    source: ModelSource, alone: Numbers, op: str, nth: int, to: str, after: bool, heir: str
) -> None:
    def strike() -> None:
        raise Killed

    armed = [False]

    def wrap(actor: int, link: Link) -> Link:
        if to == "expert" and actor == 0 and not armed[0]:  # the leader's first link is its training link
            armed[0] = True
            return DeadlyLink(link, op, nth, strike, after=after)
        return link

    def wrap_replica(name: str, link: Link) -> Link:
        if name == to and link.peer not in armed:
            armed.append(link.peer)  # type: ignore[arg-type]
            return DeadlyLink(link, op, nth, strike, after=after)
        return link

    with routers(source, 3, wrap=wrap, wrap_replica=wrap_replica) as group:
        group.router.begin_run(OPTIMIZER)
        reports: list[StepReport] = []
        while len(reports) < len(BATCHES):
            number = len(reports)
            try:
                reports.append(step(group, number))
            except Killed:
                group.seats["router-0"].kill()
                promotion = group.promote(heir)
                assert promotion.version in (number, number + 1)
                if promotion.version > number:
                    reports.append(promotion.report)
            group.agree()
        assert group.leader == heir, "the leader must have died"
        assert len(group.living) == 2
        same(group, reports, alone)


def test_one_heir_after_the_other(source: ModelSource, alone: Numbers) -> None:
    with routers(source, 3) as group:

        def next_one(heir: str) -> None:
            group.seats[group.leader].kill()
            assert group.promote(heir).report is not None

        reports = run(group, {1: lambda: next_one("router-1"), 2: group.add, 3: lambda: next_one("router-3")})
        assert list(group.living) == ["router-2", "router-3"]
        same(group, reports, alone)


def test_leader_and_expert_actor_die_together(source: ModelSource, alone: Numbers) -> None:
    with routers(source, 2, redundancy=2, heals=True) as group:

        def die() -> None:
            group.local.members["expert-1"].kill()
            group.seats["router-0"].kill()
            group.promote("router-1")

        reports = run(group, {2: die})
        assert group.local.placement.actors == ("expert-0",)
        same(group, reports, alone)


@pytest.mark.parametrize("victim", ["expert-0", "expert-1"])
def test_copies_take_over_under_two_routers(source: ModelSource, alone: Numbers, victim: str) -> None:
    killers: list[Callable[[], None]] = []

    def wrap(actor: int, link: Link) -> Link:
        return DeadlyLink(link, "forward", 9, lambda: killers[0](), after=True) if f"expert-{actor}" == victim else link

    with routers(source, 2, redundancy=2, heals=True, wrap=wrap) as group:
        killers.append(group.local.members[victim].kill)
        reports = run(group)
        assert victim not in group.local.placement.actors
        assert len(group.living) == 2
        same(group, reports, alone)


def test_a_dead_leaders_commit_that_comes_late_is_refused(source: ModelSource) -> None:
    """It was sent, nobody had read it, and another router has given the step up meanwhile."""
    with routers(source, 2, links="local") as group:
        group.router.begin_run(OPTIMIZER)

        def dies(attempt: Attempt, update: Update) -> None:
            raise Killed

        group.router.steps.commit = dies  # type: ignore[method-assign]
        with pytest.raises(Killed):
            step(group, 0)
        assert group.promote("router-1").version == 0
        late = Message("commit", {"step": 1, "attempt": 1, "lr": 1e-2, "scale": 1.0, "term": 0})
        handlers = [*(host.handle for host in group.local.hosts), group.seats["router-1"].replica.handle]
        for handler in handlers:
            answer = handler("late", late)
            assert answer.op == "error"
            assert "term 0" in str(answer.fields["text"])
        assert step(group, 0).step == 1
        assert [status["version"] for status in group.router.status()] == [1, 1]


def test_what_is_not_finite_changes_nothing_anywhere(source: ModelSource, alone: Numbers) -> None:
    with routers(source, 2) as group:
        reports = [run_one(group, 0)]
        embedding = group.seats["router-1"].router.learner.trunk.get_input_embeddings().weight
        kept = embedding.detach().clone()
        with torch.no_grad():
            embedding.fill_(float("nan"))
        with pytest.raises(NonFinite, match="version 1"):
            step(group, 1)
        with torch.no_grad():
            embedding.copy_(kept)
        for number in range(1, len(BATCHES)):
            reports.append(step(group, number))
            group.agree()
        same(group, reports, alone)


def run_one(group: Routers, number: int) -> StepReport:
    group.router.begin_run(OPTIMIZER)
    return step(group, number)


def test_every_router_serves_while_they_train(source: ModelSource, alone: Numbers) -> None:
    """Each answer is of one version: logits of any router, at any time, are those of a still run at some version."""
    known = []
    with routers(source, 1, links="local") as still:
        still.router.begin_run(OPTIMIZER)
        known.append(still.router.serving.logits(IDS))
        for number in range(len(BATCHES)):
            step(still, number)
            known.append(still.router.serving.logits(IDS))
    with routers(source, 3) as group:
        stop, seen, errors = threading.Event(), {name: [] for name in group.seats}, []

        def serve(name: str) -> None:
            try:
                while not stop.is_set():
                    seen[name].append(group.seats[name].router.serving.logits(IDS))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=serve, args=(name,)) for name in group.seats]
        for thread in threads:
            thread.start()
        try:
            reports = run(group, {2: lambda: group.local.adopt("1", "0", "1", "1")})
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
        assert not errors
        same(group, reports, alone)
        for name, found in seen.items():
            assert found, f"{name} must have served"
            for logits in found:
                assert any(torch.allclose(logits, each, rtol=1e-9, atol=1e-10) for each in known)


def test_a_stream_goes_on_at_another_router_with_the_same_tokens(source: ModelSource) -> None:
    sampling = Sampling(max_tokens=12, temperature=0.8, seed=3)
    with routers(source, 2) as group:
        run(group)
        first, second = group.living.values()
        whole = [event.token for event in first.serving.generate([5, 6, 7], sampling, timeout_s=10)]
        begun = whole[:5]
        rest = second.serving.generate([5, 6, 7, *begun], Sampling(max_tokens=7, temperature=0.8, seed=3), timeout_s=10)
        assert [*begun, *(event.token for event in rest)] == whole


def test_who_was_left_out_gives_no_answer_of_two_versions(source: ModelSource) -> None:
    with routers(source, 2) as group:
        run(group)
        outsider = group.seats["router-1"].router
        outsider.serving.logits(IDS)
        group.router.replicas.leave_out("router-1", "the test says so")
        step(group, 0)
        group.router.serving.logits(IDS)
        with pytest.raises(StepAborted, match="is at version"):
            outsider.serving.logits(IDS)


def test_a_replica_that_does_not_answer_is_cut_off(source: ModelSource, alone: Numbers) -> None:
    """Frozen, with open connections: whoever watches it says so."""
    deadline_s = 30.0
    with routers(source, 2, timeout_s=deadline_s) as group:
        lock = group.seats["router-1"].replica._lock

        def freeze() -> None:
            lock.acquire()
            timer = threading.Timer(0.3, group.router.cut, [["router-1"]])
            timer.start()

        started = time.monotonic()
        reports = run(group, {2: freeze})
        lock.release()
        assert time.monotonic() - started < deadline_s / 2, "a wait ran into its deadline"
        assert group.router.replicas.lost == ["router-1"]
        same(group, reports, alone)


def test_all_routers_go_back_to_what_was_saved(source: ModelSource, alone: Numbers) -> None:
    with routers(source, 2) as group:
        local = group.local
        group.router.begin_run(OPTIMIZER)
        reports = [step(group, number) for number in range(3)]
        group.router.take_snapshot()
        trunk = group.router.saving.snapshot
        experts = {name: member.host.saving.snapshot for name, member in local.members.items()}
        assert trunk is not None
        step(group, 3)  # lost
        for name, member in local.members.items():
            snapshot = experts[name]
            assert snapshot is not None
            member.host.saving.restore(local.placement.held_by(name), saved(snapshot), run=7)
        placement = replace(local.placement, epoch=local.placement.epoch + 1)
        group.router.restore(local.roster(placement), saved(trunk), run=7)
        group.router.continue_run(BalanceSettings())
        group.agree()
        assert group.router.version == 3
        for number in range(3, len(BATCHES)):
            reports.append(step(group, number))
            group.agree()
        same(group, reports, alone)
        assert len(group.living) == 2


def saved(snapshot: Snapshot[Key]) -> SavedState[Key]:
    def read(keys: Sequence[Key]) -> list[torch.Tensor]:
        return [snapshot.tensors[key] for key in keys]

    return SavedState(snapshot.version, snapshot.updates, snapshot.optimizer, frozenset(snapshot.tensors), read)


def test_new_weights_and_a_new_job_reach_every_router(source: ModelSource, alone: Numbers) -> None:
    with routers(source, 2) as group:
        run(group)
        group.router.replace_weights(str(source.path))
        group.agree()
        version = group.router.version
        group.router.begin_run(OPTIMIZER)
        losses = []
        for number in range(len(BATCHES)):
            losses.append(step(group, number).loss)
            group.agree()
        torch.testing.assert_close(losses, [r.loss for r in alone[0]], rtol=1e-9, atol=0)
        assert group.router.version == version + len(BATCHES)


def test_all_routers_have_the_experts_of_a_growth(source: ModelSource) -> None:
    with routers(source, 2, gate=None) as group:
        run(group)
        before = group.router.serving.evaluate(BATCHES[0])[0]
        num_experts = 2 * group.router.placement.num_experts
        group.local.placement = group.router.grow(Growth(num_experts)).placement
        group.agree()
        for router in group.living.values():
            assert router.grown_to == num_experts
            assert router.serving.evaluate(BATCHES[0])[0] == pytest.approx(before, rel=0.01)
        for batch in BATCHES[:2]:
            group.router.train_step(batch, lr=1e-3, clip_norm=1.0)
            group.agree()
        group.add()
        group.router.train_step(BATCHES[2], lr=1e-3, clip_norm=1.0)
        group.agree()
        assert len(group.living) == 3


class _LastPiece(FaultyLink):
    """Whoever sends the last piece of a trunk over it dies before that, once it is `armed`."""

    def __init__(self, inner: Link, armed: list[str]) -> None:
        super().__init__(inner, [])
        self._armed = armed

    def _send(self, question: Message) -> None:
        if question.op == "state" and question.fields["ticket"] and self.peer in self._armed:
            self._armed.remove(self.peer)
            raise Killed
        super()._send(question)


@pytest.mark.parametrize("heir", ["router-1", "router-2"])
@pytest.mark.parametrize("spared", ["router-1", "router-2"])
def test_a_leader_that_dies_in_a_growth_leaves_all_grown_or_nobody(source: ModelSource, heir: str, spared: str) -> None:
    """Only router-1 has the grown trunk, or neither has it: who leads next decides for all."""
    armed: list[str] = []
    with routers(source, 3, gate=None, wrap_replica=lambda name, link: _LastPiece(link, armed)) as group:
        run(group)
        before, num_experts = group.router.serving.evaluate(BATCHES[0])[0], group.router.placement.num_experts
        armed.append(spared)
        with pytest.raises(Killed):
            group.router.grow(Growth(2 * num_experts))
        group.seats["router-0"].kill()
        has_grown = heir == "router-1" and spared == "router-2"
        assert group.promote(heir).version == len(BATCHES)
        assert group.router.placement.num_experts == num_experts * (2 if has_grown else 1)
        group.local.placement = group.router.placement
        for router in group.living.values():
            assert router.placement == group.router.placement
            assert router.serving.evaluate(BATCHES[0])[0] == pytest.approx(before, rel=0.01)
        for host in group.local.hosts:
            assert set(host.groups) == set(group.router.placement.held_by(host.name))
        assert group.router.train_step(BATCHES[0], lr=1e-3, clip_norm=1.0).retries == 0
        group.agree()
        group.add()
        assert group.router.train_step(BATCHES[1], lr=1e-3, clip_norm=1.0).retries == 0
        group.agree()


@pytest.mark.parametrize("heir", ["router-1", "router-2"])
@pytest.mark.parametrize("spared", ["router-1", "router-2"])
def test_a_leader_that_dies_in_an_import_is_made_up_for_by_the_next(
    source: ModelSource, heir: str, spared: str
) -> None:
    """Expert actors have the new weights then: whose trunk is the old one answers nobody until it has the new one."""
    armed: list[str] = []
    with routers(source, 3, wrap_replica=lambda name, link: _LastPiece(link, armed)) as group:
        fresh = group.router.serving.logits(IDS)
        run(group)
        armed.append(spared)
        with pytest.raises(Killed):
            group.router.replace_weights(str(source.path))
        group.seats["router-0"].kill()
        group.promote(heir)
        is_old = {name: router.serving.is_shut for name, router in group.living.items()}
        assert is_old == {"router-1": spared == "router-1", "router-2": True}
        with ThreadPoolExecutor(2) as pool:
            asked = {name: pool.submit(router.serving.logits, IDS) for name, router in group.living.items()}
            early, _ = wait(asked.values(), 0.2)
            assert not any(asked[name] in early for name in asked if is_old[name])
            group.router.replace_weights(str(source.path))
            for answer in asked.values():
                torch.testing.assert_close(answer.result(WAIT_S), fresh, rtol=1e-12, atol=1e-12)
        group.agree()


def test_an_expert_actor_that_is_lost_in_an_import_leaves_nobody_with_weights_of_both(
    source: ModelSource, tmp_path: Path
) -> None:
    faults = [Fault("load", 1, "close")]

    def wrap(actor: int, link: Link) -> Link:
        return FaultyLink(link, faults if actor == 1 else [])

    with routers(source, 2, wrap=wrap) as group:
        fresh = group.router.serving.logits(IDS)
        run(group)
        with pytest.raises(PeerLost):
            group.router.replace_weights(str(source.path))
        faults.clear()  # of links that are opened from now on
        assert all(router.serving.is_shut for router in group.living.values())
        for refused in (
            lambda: group.router.begin_run(OPTIMIZER),
            lambda: step(group, 0),
            lambda: group.router.grow(Growth(2 * group.router.placement.num_experts)),
            lambda: group.router.pin("mixed"),
            lambda: group.router.take_snapshot(),
            lambda: group.router.export(tmp_path),
        ):
            with pytest.raises(StepAborted, match="weights are of two models"):
                refused()
        joined = group.add()
        assert group.living[joined].serving.is_shut
        group.router.replace_weights(str(source.path))
        for router in group.living.values():
            torch.testing.assert_close(router.serving.logits(IDS), fresh, rtol=1e-12, atol=1e-12)


def test_an_import_that_fails_before_a_weight_is_touched_keeps_nobody_waiting(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with routers(source, 2) as group:
        before = group.router.serving.logits(IDS)
        with pytest.raises(CheckpointError):
            group.router.replace_weights("/nowhere")
        for host in group.local.hosts:  # which cannot read what the router can
            monkeypatch.setattr(host.state.loader, "load", unreadable)
        run_before = group.router.state.run
        with pytest.raises(MoeClusterError, match="not on this node"):
            group.router.replace_weights(str(source.path))
        assert group.router.state.run == run_before
        for router in group.living.values():
            torch.testing.assert_close(router.serving.logits(IDS), before, rtol=1e-12, atol=1e-12)
        run(group)


def test_a_router_that_does_not_stop_to_answer_ends_an_import_before_it_begins(source: ModelSource) -> None:
    def deaf(name: str, link: Link) -> Link:
        return FaultyLink(link, [Fault("hold", 1, "close")])

    with routers(source, 2) as group:
        before = group.router.serving.logits(IDS)
        group.wrap = deaf
        group.router.replicas.add("router-1", group.open("router-1"))
        with pytest.raises(PeerLost, match="router-1"):
            group.router.replace_weights(str(source.path))
        assert not group.router.serving.is_shut
        torch.testing.assert_close(group.router.serving.logits(IDS), before, rtol=1e-12, atol=1e-12)
        group.router.replace_weights(str(source.path))


def unreadable(groups: Sequence[int], path: str) -> None:
    raise CheckpointError("not on this node", field="model.path", value=path)
