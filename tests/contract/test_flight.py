"""Several micro-batches in flight: the numbers are those of one after the other, whatever fails in the middle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from actors.errors import InvalidInput, LinkError, NonFinite, StepAborted
from actors.expert.updates import Brake
from actors.moe.settings import BalanceSettings, GateSettings
from actors.optim import OptimizerSettings
from actors.transport.contract import Link
from actors.transport.faulty import Fault, FaultyLink
from actors.transport.message import Message
from actors.trunk.model import ModelSource
from actors.values import MAX_IN_FLIGHT, StepReport
from tests.families import save
from tests.local import LinkWrap, LocalCluster, cluster
from tests.routers import routers_of

STEPS = 3
SIZES = (2, 1, 3, 2, 1)
"""Sequences of the micro-batches of a step."""
LENGTHS = (16, 24, 8, 16, 12)
BATCHES = [
    [
        torch.randint(0, 256, (size, length), generator=torch.Generator().manual_seed(10 * t + m))
        for m, (size, length) in enumerate(zip(SIZES, LENGTHS, strict=True))
    ]
    for t in range(STEPS)
]
IDS = BATCHES[0][0]
WAIT_S = 30.0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


def run(
    local: LocalCluster, settings: OptimizerSettings | None = None, balance: BalanceSettings | None = None
) -> list[StepReport]:
    local.router.begin_run(settings or OptimizerSettings(), balance)
    reports = [local.router.train_step(b, lr=1e-2, clip_norm=1.0, bias_speed=1e-3) for b in BATCHES]
    every_slot_has_ended(local)
    return reports


def every_slot_has_ended(local: LocalCluster) -> None:
    """All threads of the router's slots are free at once."""
    threads, meeting = local.router.steps.accumulation._threads, threading.Barrier(MAX_IN_FLIGHT - 1)
    for met in [threads.submit(meeting.wait, WAIT_S) for _ in range(MAX_IN_FLIGHT - 1)]:
        met.result(WAIT_S)


def numbers(reports: Sequence[StepReport]) -> list[StepReport]:
    """All but how long it took and what was tried."""
    return [replace(report, seconds=0.0, retries=0) for report in reports]


def state_of(local: LocalCluster) -> dict[str, Tensor]:
    """The trunk with its moments, and every group of every layer."""
    learner = local.router.learner
    state = {**learner.state(), **learner.moments()}
    local.router.status()  # waits for the commit
    for member in local.members.values():
        for group in member.host.groups:
            for layer in range(len(member.host.holdings.stacks)):
                tensors, _ = member.host.holdings.read(group, layer)
                state |= {f"{member.name}.{group}.{layer}.{n}": tensor for n, tensor in enumerate(tensors)}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def one_by_one(source: ModelSource) -> tuple[list[StepReport], dict[str, Tensor]]:
    with cluster(source, 2) as local:
        return numbers(run(local)), state_of(local)


@pytest.mark.parametrize(("in_flight", "links"), [(2, "local"), (2, "socket"), (3, "socket"), (8, "local")])
def test_numbers_are_those_of_one_after_the_other_bit_for_bit(
    source: ModelSource, one_by_one: tuple[list[StepReport], dict[str, Tensor]], in_flight: int, links: str
) -> None:
    with cluster(source, 2, in_flight=in_flight, links=links) as local:
        assert numbers(run(local)) == one_by_one[0]
        state = state_of(local)
        assert set(state) == set(one_by_one[1])
        assert all(torch.equal(state[name], tensor) for name, tensor in one_by_one[1].items())


def watching(asked: list[tuple[str, int, int]]) -> LinkWrap:
    """Notes (op, micro-batch, layer) of what actor 0 is asked."""

    def wrap(actor: int, link: Link) -> Link:
        start = link.start

        def watched(question: Message) -> object:
            if actor == 0 and question.fields.get("keep"):
                fields = question.fields
                asked.append((question.op, int(fields["microbatch"]), int(fields["layer"])))  # type: ignore[arg-type]
            return start(question)

        link.start = watched  # type: ignore[method-assign, assignment]
        return link

    return wrap


def test_the_others_go_on_while_the_tokens_of_one_are_away(source: ModelSource) -> None:
    asked: list[tuple[str, int, int]] = []
    with cluster(source, 2, in_flight=2, wrap=watching(asked)) as local:
        local.router.begin_run(OptimizerSettings())
        local.router.train_step(BATCHES[0][:3], lr=1e-2, clip_norm=1.0)
    forth, back = "forward", "backward"
    assert asked[:8] == [
        *((forth, 0, 0), (forth, 1, 0), (forth, 0, 1), (forth, 1, 1)),
        *((back, 0, 1), (back, 1, 1), (back, 0, 0), (back, 1, 0)),
    ]
    assert asked[8:] == [(forth, 2, 0), (forth, 2, 1), (back, 2, 1), (back, 2, 0)], "the third takes the first's place"


def test_gates_with_noise_and_balance_rules_see_their_own_micro_batch(source: ModelSource) -> None:
    gate = GateSettings(kind="deepseek", noise_std=1.0, expert_dropout=0.2)
    balance = BalanceSettings(sequence=0.01, entropy=0.01)
    reports = []
    for in_flight in (1, 3):
        with cluster(source, 2, gate=gate, in_flight=in_flight) as local:
            reports.append(numbers(run(local, balance=balance)))
    assert reports[1] == reports[0]
    assert all(report.balance_loss > 0 for report in reports[0])


@pytest.mark.parametrize(
    ("op", "nth", "kind", "in_flight"),
    [
        ("forward", 2, "close", 2),
        ("forward", 6, "drop_answer", 3),
        ("forward", 13, "drop_question", 2),
        ("backward", 1, "close", 3),
        ("backward", 4, "drop_answer", 2),
        ("backward", 8, "duplicate", 3),
        ("prepare", 2, "drop_answer", 2),
        ("commit", 1, "drop_question", 2),
    ],
)
def test_a_fault_in_the_middle_changes_no_number(
    source: ModelSource,
    one_by_one: tuple[list[StepReport], dict[str, Tensor]],
    op: str,
    nth: int,
    kind: str,
    in_flight: int,
) -> None:
    scripted: list[FaultyLink] = []

    def wrap(actor: int, link: Link) -> Link:
        if actor == 1 and not scripted:
            scripted.append(FaultyLink(link, [Fault(op, nth, kind)]))  # type: ignore[arg-type]
            return scripted[0]
        return link

    with cluster(source, 2, links="socket", wrap=wrap, in_flight=in_flight) as local:
        reports = run(local)
        assert len(scripted[0].struck) == 1
        assert sum(report.retries for report in reports) == (kind != "duplicate")
        assert numbers(reports) == one_by_one[0]


def test_every_slot_ends_when_a_step_cannot_be_made(source: ModelSource) -> None:
    def wrap(actor: int, link: Link) -> Link:
        faults = [Fault("backward", n, "drop_answer") for n in range(1, 99)] if actor == 1 else []
        return FaultyLink(link, faults)

    with cluster(source, 2, links="socket", wrap=wrap, max_step_retries=1, in_flight=3) as local:
        local.router.begin_run(OptimizerSettings())
        before = local.router.serving.logits(IDS)
        with pytest.raises((LinkError, StepAborted)):
            local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0)
        every_slot_has_ended(local)
        assert local.router.version == 0
        assert torch.equal(local.router.serving.logits(IDS), before)


def test_a_non_finite_loss_of_one_ends_all(
    source: ModelSource, one_by_one: tuple[list[StepReport], dict[str, Tensor]]
) -> None:
    with cluster(source, 2, in_flight=3) as local:
        local.router.begin_run(OptimizerSettings())
        embedding = local.router.learner.trunk.get_input_embeddings().weight
        token = next(t for t in BATCHES[0][1].unique().tolist() if all(t not in ids for ids in BATCHES[0][::2]))
        kept = embedding.detach().clone()
        with torch.no_grad():
            embedding[token] = float("nan")
        with pytest.raises(NonFinite, match="version 0"):
            local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0)
        every_slot_has_ended(local)
        with torch.no_grad():
            embedding.copy_(kept)
        assert numbers(run(local)) == one_by_one[0]


def test_copies_share_the_work_of_several(
    source: ModelSource, one_by_one: tuple[list[StepReport], dict[str, Tensor]]
) -> None:
    with cluster(source, 3, redundancy=2, links="socket", in_flight=2) as local:
        reports = run(local)
        torch.testing.assert_close([r.loss for r in reports], [r.loss for r in one_by_one[0]], rtol=1e-9, atol=0)
        assert [r.load_LE for r in reports] == [r.load_LE for r in one_by_one[0]]
        state = state_of(local)
        for name, tensor in state.items():
            actor, _, place = name.partition(".")
            others = [n for n in state if actor.startswith("expert-") and n.endswith(f".{place}")]
            assert all(torch.equal(state[other], tensor) for other in others)


def test_several_routers_with_several_in_flight_each(source: ModelSource) -> None:
    """In float64 a gate of our own, as where routers are tested; pieces of gradients are sent before all are there."""
    gate, settings = GateSettings(kind="top_k"), OptimizerSettings(eps=1e-4)
    losses = []
    for count, in_flight in ((1, 1), (2, 2)):
        with routers_of(source, count, links="socket", gate=gate, in_flight=in_flight) as group:
            losses.append([report.loss for report in run(group.local, settings)])
            group.agree()
            assert len(group.living) == count
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)


def test_experts_that_are_behind_by_the_bound_give_the_same_numbers(source: ModelSource) -> None:
    reports = []
    for in_flight in (1, 3):
        with cluster(source, 2, in_flight=in_flight) as local:
            for host in local.hosts:
                host.updates.brake = Brake(hold=1)
            reports.append(numbers(run(local, OptimizerSettings(staleness=1))))
    assert reports[1] == reports[0]
    assert [report.staleness_max for report in reports[1]] == [0, 1, 1]


@pytest.mark.parametrize("in_flight", [0, 9])
def test_how_many_there_can_be(source: ModelSource, in_flight: int) -> None:
    with pytest.raises(InvalidInput, match="in_flight"), cluster(source, 2, in_flight=in_flight):
        pass


def held(op: str, entered: threading.Event, go_on: threading.Event) -> Callable[[LocalCluster], None]:
    """Actor 1 stops in its next `op` until it may go on."""

    def hold(local: LocalCluster) -> None:
        handler = local.hosts[1]._handlers[op]

        def slowed(question: Message) -> Message:
            entered.set()
            assert go_on.wait(WAIT_S)
            return handler(question)

        local.hosts[1]._handlers[op] = slowed

    return hold


def test_an_update_of_experts_does_not_hold_up_the_first_layers_of_the_next_forward(source: ModelSource) -> None:
    """At s = 0: the commit is sent without waiting, and only tokens that come to the actor wait for its update."""
    updating, go_on, in_first_layer, at_experts = (threading.Event() for _ in range(4))
    losses: list[list[float]] = []

    def step(local: LocalCluster, number: int) -> None:
        losses[-1].append(local.router.train_step(BATCHES[number][:2], lr=1e-2, clip_norm=1.0).loss)

    with cluster(source, 2, links="socket") as local:
        local.router.begin_run(OptimizerSettings())
        losses.append([])
        for number in range(2):
            step(local, number)
    with cluster(source, 2, links="socket") as local:
        local.router.begin_run(OptimizerSettings())
        losses.append([])
        held("commit", updating, go_on)(local)
        step(local, 0)
        assert updating.wait(WAIT_S)
        first, second = local.router.learner.trunk.model.layers[:2]
        first.register_forward_hook(lambda *args: in_first_layer.set())
        second.mlp.gate.register_forward_hook(lambda *args: at_experts.set())
        worker = threading.Thread(target=step, args=(local, 1), daemon=True)
        worker.start()
        try:
            assert in_first_layer.wait(WAIT_S)
            assert at_experts.wait(WAIT_S), "the router gets as far as to where it needs experts"
            assert local.hosts[1].version == 0
            assert len(losses[-1]) == 1
        finally:
            go_on.set()
            worker.join(WAIT_S)
        assert not worker.is_alive()
    assert losses[1] == losses[0]
