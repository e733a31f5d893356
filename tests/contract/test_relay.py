"""Tokens over relays: the numbers of the direct way in fewer bytes, and who is lost is lost as on its own link."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.errors import InvalidInput, LinkTimeout, PeerLost, ProtocolError, RemoteError, StepAborted
from actors.moe.fp8 import Payload
from actors.optim import OptimizerSettings
from actors.relay.bundle import Bundle, Member, bundled, named, raise_if_failed
from actors.relay.relay import Relay, _Asker
from actors.router.dispatcher import Dispatcher
from actors.router.halves import routed
from actors.router.passes import Purpose
from actors.transport.contract import Link
from actors.transport.curve import LinkKeys
from actors.transport.faulty import FaultyLink
from actors.transport.message import Message, error_answer
from actors.transport.socket import SocketLink, SocketServer
from actors.trunk.model import ModelSource
from actors.values import Address
from tests.families import save
from tests.local import LocalCluster, cluster

NODES = "aabb"
BATCHES = [
    [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(3)
]
WIDTH, FLOAT64, FLOAT32, INT32 = 32, 8, 4, 4
CHOICES = {
    "all actors": [[0, 2], [4, 6], [0, 4], [1, 3], [7, 5], [2, 6]],
    "one of a node without a token": [[0, 1], [1, 0], [4, 6], [0, 1], [7, 5]],
    "uneven": [[0, 2]] * 30 + [[3, 7]],
    "all of a node by every token": [[4, 6], [5, 7], [4, 7]],
    "one actor alone": [[2, 3], [3, 2]],
    "one token": [[1, 2]],
    "none": [],
}
"""Experts 2a and 2a + 1 are with actor a."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = save("deepseek_v3", tmp_path_factory.mktemp("model") / "m", torch.float64)
    return ModelSource(path=str(directory), dtype="float64")


def numbers_of(local: LocalCluster) -> tuple[list[float], Tensor]:
    local.router.begin_run(OptimizerSettings())
    reports = [local.router.train_step(batch, lr=1e-2, clip_norm=1.0) for batch in BATCHES]
    assert not any(report.retries for report in reports)
    return [report.loss for report in reports], local.router.serving.logits(BATCHES[0][0])


@pytest.fixture(scope="module")
def direct(source: ModelSource) -> tuple[list[float], Tensor]:
    with cluster(source, 4) as local:
        return numbers_of(local)


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize(
    ("nodes", "over"), [("aabb", ["expert-0", "expert-2"]), ("abab", ["expert-0", "expert-1"]), ("abcd", [])]
)
def test_losses_and_logits_are_those_of_local_links(
    source: ModelSource, direct: tuple[list[float], Tensor], nodes: str, over: list[str], in_flight: int
) -> None:
    with cluster(source, 4, links="socket", nodes=nodes, in_flight=in_flight) as local:
        losses, logits = numbers_of(local)
        assert sorted(set(local.relayed_over)) == over
        assert ("via" in local.router.vitals()["links"]["expert-3"]) == bool(over)
    torch.testing.assert_close(losses, direct[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(logits, direct[1], rtol=1e-12, atol=1e-12)


# -- one layer, with choices that are given ----------------------------------------------------------------------------


def given(choices: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(choices))
    x_TD = torch.randn(len(choices), WIDTH, generator=generator, dtype=torch.float64)
    weights_TK = torch.rand(len(choices), 2, generator=generator, dtype=torch.float64)
    return x_TD, torch.tensor(choices, dtype=torch.int64).view(-1, 2), weights_TK


def begin_step(local: LocalCluster) -> Dispatcher:
    """In a step, and behind its first tokens, which go directly."""
    dispatcher = local.router.state.training
    dispatcher.begin(Purpose(step=1, attempt=local.router.state.attempt))
    x_TD, ids_TK, weights_TK = given([[0, 2], [4, 6]])
    dispatcher.receive(dispatcher.forward(0, x_TD, ids_TK, weights_TK))
    return dispatcher


def layer_of(local: LocalCluster, choices: list[list[int]]) -> tuple[Tensor, ...]:
    """Sums, and gradients of tokens and gate weights."""
    dispatcher = begin_step(local)
    x_TD, ids_TK, weights_TK = given(choices)
    x_TD.requires_grad_(), weights_TK.requires_grad_()
    y_TD = routed(dispatcher, 1, x_TD, ids_TK, weights_TK)
    (y_TD * torch.arange(1.0, WIDTH + 1)).sum().backward()
    assert x_TD.grad is not None
    assert weights_TK.grad is not None
    return y_TD.detach(), x_TD.grad, weights_TK.grad


@pytest.mark.parametrize("payload", ["trunk", "fp8"])
def test_a_layer_forward_and_backward_is_that_of_local_links(source: ModelSource, payload: Payload) -> None:
    with (
        cluster(source, 4, payload=payload) as local,
        cluster(source, 4, links="socket", nodes=NODES, payload=payload) as relayed,
    ):
        for name, choices in CHOICES.items():
            for ours, theirs in zip(layer_of(relayed, choices), layer_of(local, choices), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)
        assert set(relayed.relayed_over) == {"expert-0", "expert-2"}


def crossed(local: LocalCluster, choices: list[list[int]]) -> tuple[int, int]:
    """Bytes that a serving forward sends to other hosts, and gets back."""
    dispatcher = local.router.state.requests
    dispatcher.begin(Purpose())
    before = local.meter.totals()["socket/tcp"]
    dispatcher.receive(dispatcher.forward(1, *given(choices)))
    after = local.meter.totals()["socket/tcp"]
    return after.bytes_sent - before.bytes_sent, after.bytes_received - before.bytes_received


@pytest.mark.parametrize(("payload", "row_bytes"), [("trunk", WIDTH * FLOAT64), ("fp8", WIDTH + FLOAT32)])
def test_what_several_actors_of_a_node_need_crosses_once(source: ModelSource, payload: Payload, row_bytes: int) -> None:
    with (
        cluster(source, 4, links="socket", nodes=NODES, payload=payload, relays=False) as direct,
        cluster(source, 4, links="socket", nodes=NODES, payload=payload) as relayed,
    ):
        for choices in CHOICES.values():
            sent, received = (a - b for a, b in zip(crossed(direct, choices), crossed(relayed, choices), strict=True))
            saved = index = 0
            for node in ({0, 1}, {2, 3}):
                needs = [{expert // 2 for expert in token} & node for token in choices]
                if set().union(*needs) == node:
                    rows = sum(len(need) for need in needs)
                    saved += rows - sum(bool(need) for need in needs)
                    index += rows
            assert sent == saved * row_bytes - index * INT32
            assert received == saved * WIDTH * FLOAT64


def test_a_node_is_relayed_to_where_that_saves_enough(source: ModelSource) -> None:
    row_bytes = WIDTH * FLOAT64
    with cluster(source, 4, links="socket", nodes=NODES, worth_bytes=3 * row_bytes) as local:
        crossed(local, [[0, 2], [1, 3], [0, 1], [4, 6]])
        assert local.relayed_over == []
        crossed(local, [[0, 2], [1, 3], [0, 3], [4, 6]])
        assert local.relayed_over == ["expert-0"]


class Slow(FaultyLink):
    """A commit arrives with whatever follows it over this link."""

    def __init__(self, inner: Link) -> None:
        super().__init__(inner, [])
        self._held: list[Message] = []

    def _send(self, question: Message) -> None:
        self._held.append(question)
        if question.op != "commit":
            self._flush()

    def _receive(self, deadline: float) -> Message:
        self._flush()
        return super()._receive(deadline)

    def _flush(self) -> None:
        while self._held:
            super()._send(self._held.pop(0))


def test_a_commit_is_not_overtaken(source: ModelSource, direct: tuple[list[float], Tensor]) -> None:
    """Nobody waits for its answer, and a forward of the next step needs what it makes."""
    with cluster(source, 4, links="socket", nodes=NODES, wrap=lambda actor, link: Slow(link)) as local:
        losses, _ = numbers_of(local)
        assert set(local.relayed_over) == {"expert-0", "expert-2"}
    torch.testing.assert_close(losses, direct[0], rtol=1e-12, atol=0)


# -- losses ------------------------------------------------------------------------------------------------------------

SPREAD = [[0, 2], [4, 6], [0, 4], [1, 3], [7, 5], [2, 6]]


@pytest.mark.parametrize("dies", ["expert-0", "expert-1"], ids=["the relay", "its neighbour"])
def test_training_is_told_which_actor_was_lost(source: ModelSource, dies: str) -> None:
    with cluster(source, 4, links="socket", nodes=NODES) as local:
        layer_of(local, SPREAD)
        dispatcher = begin_step(local)
        local.members[dies].kill()
        with pytest.raises(PeerLost) as caught:
            dispatcher.receive(dispatcher.forward(1, *given(SPREAD)))
        assert caught.value.peer == dies
        assert {name for name, link in dispatcher.links.items() if link.closed} == {dies}
        assert dispatcher.reopen() == [dies]


@pytest.mark.parametrize("dies", ["expert-0", "expert-1"], ids=["the relay", "its neighbour"])
def test_serving_goes_on_at_the_copies(source: ModelSource, dies: str) -> None:
    with cluster(source, 4, links="socket", nodes=NODES, redundancy=2) as local:
        whole = forwarded(local)
        assert local.relayed_over
        local.members[dies].kill()
        torch.testing.assert_close(forwarded(local), whole, rtol=1e-12, atol=1e-12)
        assert local.router.state.requests.links.lost == {dies}


def forwarded(local: LocalCluster) -> Tensor:
    dispatcher = local.router.state.requests
    dispatcher.begin(Purpose())
    x_TD, ids_TK, weights_TK = given(SPREAD * 40)  # so many that copies share the work
    return dispatcher.receive(dispatcher.forward(1, x_TD, ids_TK, weights_TK))


@pytest.mark.parametrize("freezes", ["expert-0", "expert-1"], ids=["the relay", "its neighbour"])
def test_an_actor_that_is_cut_off_keeps_nobody_waiting(source: ModelSource, freezes: str) -> None:
    with cluster(source, 4, links="socket", nodes=NODES, redundancy=2, timeout_s=60.0) as local:
        whole = forwarded(local)
        local.members[freezes].freeze()
        done: list[Tensor] = []
        asking = threading.Thread(target=lambda: done.append(forwarded(local)))
        asking.start()
        time.sleep(0.2)  # it waits for the frozen one, most likely; if not, it is told of the cut before it asks
        local.cut(freezes)
        asking.join(30)
        local.members[freezes].thaw()
        torch.testing.assert_close(done[0], whole, rtol=1e-12, atol=1e-12)
        assert local.router.state.requests.links.lost == {freezes}


@pytest.mark.parametrize("freezes", ["expert-0", "expert-1"], ids=["the relay", "its neighbour"])
def test_an_actor_that_was_cut_off_before_is_not_tried_again(source: ModelSource, freezes: str) -> None:
    """A frozen process still takes connections: who opens a link to its relay waits in vain."""
    with cluster(source, 4, links="socket", nodes=NODES, redundancy=2) as local:
        whole = forwarded(local)
        num_opened = len(local.relayed_over)
        local.cut(freezes)
        torch.testing.assert_close(forwarded(local), whole, rtol=1e-12, atol=1e-12)
        assert freezes not in local.relayed_over[num_opened:]
        assert local.router.state.requests.links.lost == {freezes}


def test_a_run_in_which_an_actor_dies_has_the_losses_of_one_without(
    source: ModelSource, direct: tuple[list[float], Tensor]
) -> None:
    with cluster(source, 4, links="socket", nodes=NODES, redundancy=2, heals=True) as local:
        local.router.begin_run(OptimizerSettings())
        losses = []
        for number, batch in enumerate(BATCHES):
            if number == 1:
                dies_in_backward(local, "expert-1")
            losses.append(local.router.train_step(batch, lr=1e-2, clip_norm=1.0))
        assert [report.retries for report in losses] == [0, 1, 0]
        assert "via expert-2" in local.router.vitals()["links"]["expert-3"], "the other node is relayed to again"
    torch.testing.assert_close([report.loss for report in losses], direct[0], rtol=1e-9, atol=0)


def dies_in_backward(local: LocalCluster, name: str) -> None:
    member = local.members[name]
    backward = member.host._handlers["backward"]

    def die(question: Message) -> Message:
        if not member.dead:
            threading.Thread(target=member.kill).start()
            assert member.servers[0]._stop.wait(20), "this answer is its last"
        return backward(question)

    member.host._handlers["backward"] = die


def test_a_relay_that_cannot_be_reached_is_done_without(
    source: ModelSource, direct: tuple[list[float], Tensor]
) -> None:
    with cluster(source, 4, links="socket", nodes=NODES) as local:
        relay = local.members["expert-0"].relay
        assert relay is not None
        relay.stop()
        losses, _ = numbers_of(local)
        assert "via" not in local.router.vitals()["links"]["expert-1"]
        assert "via expert-2" in local.router.vitals()["links"]["expert-3"]
    torch.testing.assert_close(losses, direct[0], rtol=1e-12, atol=0)


# -- the relay by itself -----------------------------------------------------------------------------------------------

MAX_BYTES = 1 << 22


class Actor:
    """Answers a forward with its rows times ten, and its own number; waits as long as `held`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.held = threading.Lock()
        self.refuses = False
        self.num_rows_cut = 0
        self._server = SocketServer(name, self._handle, max_bytes=MAX_BYTES)
        self._server.start()

    @property
    def member(self) -> Member:
        return Member(self.name, self._server.address)

    def _handle(self, peer: str, question: Message) -> Message:
        with self.held:
            pass
        if self.refuses:
            return error_answer(StepAborted("not now"))
        (rows, *_) = question.tensors
        return Message("ok", {"name": self.name}, (rows[self.num_rows_cut :] * 10,))

    def stop(self) -> None:
        self._server.stop()


@contextmanager
def node(
    num_relays: int = 1, open_a1_s: float = 20.0, keys: LinkKeys | None = None
) -> Iterator[tuple[list[Relay], list[Actor]]]:
    """`open_a1_s`: for a link to the second actor to be opened."""

    def open_neighbour(name: str, address: Address) -> Link:
        timeout_s = open_a1_s if name == "a1" else 20.0
        return SocketLink(name, address, name="relay", max_bytes=MAX_BYTES, timeout_s=timeout_s)

    relays = [Relay(f"a{n}", open_neighbour, max_bytes=MAX_BYTES, timeout_s=20.0, keys=keys) for n in range(num_relays)]
    actors = [Actor(f"a{n}") for n in range(2)]
    for relay in relays:
        relay.start()
    try:
        yield relays, actors
    finally:
        for each in (*relays, *actors):
            each.stop()


@contextmanager
def asking(relay: Relay, keys: LinkKeys | None = None) -> Iterator[Link]:
    address = Address("another host", "", relay.address.tcp)
    link = SocketLink(relay.name, address, name="router", max_bytes=MAX_BYTES, timeout_s=20, keys=keys)
    try:
        yield link
    finally:
        link.close()


def question_for(members: Sequence[Member], value: float = 1.0) -> Message:
    """Two tokens; each of the actors needs both but the first, which needs the second."""
    rows = [torch.tensor([1] if number == 0 else [0, 1], dtype=torch.int32) for number in range(len(members))]
    pairs = sum(len(row) for row in rows)
    tensors = (torch.zeros(pairs, dtype=torch.int32), torch.ones(pairs))
    counts_M = [[len(row)] for row in rows]
    bundle = bundled("forward", {"layer": 0}, (torch.full((2, 3), value),), rows, counts_M=counts_M, pairs=tensors)
    return named(bundle, members)


def members_of(actors: Sequence[Actor]) -> list[Member]:
    return [actor.member for actor in actors]


def test_two_relays_that_ask_each_others_actors_do_not_wait_for_each_other() -> None:
    with node(num_relays=2) as (relays, actors), asking(relays[0]) as one, asking(relays[1]) as other:
        for round_ in range(20):
            value = float(round_)
            forth = [one.start(question_for(members_of(actors), value)) for _ in range(3)]
            back = [other.start(question_for(members_of(actors[::-1]), value)) for _ in range(3)]
            for pending in (*forth, *back):
                answer = pending.result(20)
                assert answer.tensors[0].tolist() == [[10 * value] * 3, [20 * value] * 3]


def test_who_asks_an_actor_that_hangs_waits_alone() -> None:
    with node() as ((relay,), (first, second)), asking(relay) as stuck, asking(relay) as other:
        stuck.call(question_for([first.member, second.member]), 20)
        with second.held:
            waiting = stuck.start(question_for([first.member, second.member]))
            for link in (other, stuck):
                answer = link.call(question_for([first.member]), 20)
                assert answer.fields["answers"] == [{"name": "a0"}]
            assert not stuck.look(waiting.id)
        assert [each["name"] for each in waiting.result(20).fields["answers"]] == ["a0", "a1"]  # type: ignore[union-attr]


def test_an_actor_that_cannot_be_reached_holds_up_nobody_else() -> None:
    """It takes connections, and says nothing: the link to it is being opened when others are asked."""
    with node(open_a1_s=0.5) as ((relay,), (first, second)), asking(relay) as link, second.held:
        second._server._inbox.introduce = lambda sender, question: None  # type: ignore[method-assign]
        waiting = link.start(question_for([second.member]))
        assert link.call(question_for([first.member]), 20).op == "ok"
        with pytest.raises(PeerLost) as caught:
            raise_if_failed(waiting.result(20))
        assert caught.value.peer == "a1"


def gone(actors: Sequence[Actor]) -> None:
    actors[1].stop()


def refuses(actors: Sequence[Actor]) -> None:
    actors[1].refuses = True


def answers_too_little(actors: Sequence[Actor]) -> None:
    actors[1].num_rows_cut = 1


@pytest.mark.parametrize("was_asked_before", [True, False])
@pytest.mark.parametrize(
    ("happens", "error", "text"),
    [
        (gone, PeerLost, "peer a1"),
        (refuses, StepAborted, "not now .said a1"),
        (answers_too_little, ProtocolError, "2 rows .peer a1"),
    ],
)
def test_what_a_neighbour_does_is_told_as_by_its_own_link(
    happens: Callable[[Sequence[Actor]], None], error: type[Exception], text: str, was_asked_before: bool
) -> None:
    with node() as ((relay,), actors), asking(relay) as link:
        if was_asked_before:
            link.call(question_for(members_of(actors)), 20)
        happens(actors)
        with pytest.raises(error, match=text):
            raise_if_failed(link.call(question_for(members_of(actors)), 20))
        assert link.call(question_for([actors[0].member]), 20).op == "ok"


def test_a_neighbour_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with node() as ((relay,), actors), asking(relay) as link:
        link.call(question_for(members_of(actors)), 20)
        (asker,) = relay._askers.values()
        with monkeypatch.context() as patch:
            patch.setattr(asker, "_timeout_s", 2.0)
            with actors[1].held, pytest.raises(LinkTimeout) as caught:
                raise_if_failed(link.call(question_for(members_of(actors)), 20))
        assert caught.value.peer == "a1"
        assert raise_if_failed(link.call(question_for(members_of(actors)), 20)).op == "ok"


MALFORMED: dict[str, Callable[[Message], Message]] = {
    "unknown operation": lambda q: Message("forward", q.fields, q.tensors),
    "rows of one actor that come twice": lambda q: Message(
        q.op,
        {**q.fields, "sizes": [1, 3]},
        (q.tensors[0], torch.tensor([1, 0, 1, 1], dtype=torch.int32), *q.tensors[2:]),
    ),
    "too many rows": lambda q: Message(q.op, {**q.fields, "sizes": [1, 9]}, q.tensors),
    "a row that is not there": lambda q: Message(q.op, q.fields, (q.tensors[0], q.tensors[1] + 7, *q.tensors[2:])),
    "a row below the first": lambda q: Message(q.op, q.fields, (q.tensors[0], q.tensors[1] - 2, *q.tensors[2:])),
    "no members": lambda q: Message(q.op, {**q.fields, "members": []}, q.tensors),
    "half an address": lambda q: Message(q.op, {**q.fields, "members": [["a0", "x"], ["a1", "y"]]}, q.tensors),
    "another inner operation": lambda q: Message(q.op, {**q.fields, "op": "commit"}, q.tensors),
    "too few tensors": lambda q: Message(q.op, q.fields, q.tensors[:2]),
    "no fields": lambda q: Message(q.op, {}, q.tensors),
}


@pytest.mark.parametrize("malform", MALFORMED.values(), ids=list(MALFORMED))
def test_what_does_not_fit_together_is_refused(malform: Callable[[Message], Message]) -> None:
    with node() as ((relay,), actors), asking(relay) as link:
        with pytest.raises(InvalidInput):
            link.call(malform(question_for(members_of(actors))), 20)
        assert link.call(question_for(members_of(actors)), 20).op == "ok"


def test_an_error_of_its_own_ends_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    with node() as ((relay,), actors), asking(relay) as link:
        link.call(question_for(members_of(actors)), 20)
        (asker,) = relay._askers.values()
        broken = asker._neighbours[actors[1].member].link
        with monkeypatch.context() as patch:
            patch.setattr(broken, "_send", lambda question: 1 / 0)
            with pytest.raises(RemoteError, match="ZeroDivisionError in its node's relay"):
                raise_if_failed(link.call(question_for(members_of(actors)), 20))
        assert link.call(question_for(members_of(actors)), 20).op == "ok"


def test_it_leads_to_its_own_node_alone() -> None:
    with node() as ((relay,), actors), asking(relay) as link:
        away = Member("a1", Address("another host", "", actors[1].member.address.tcp))
        with pytest.raises(InvalidInput, match="not on the node of this relay"):
            link.call(question_for([actors[0].member, away]), 20)


def test_it_is_for_those_who_hold_the_keys() -> None:
    keys = LinkKeys.generate()
    with node(keys=keys) as ((relay,), actors):
        with asking(relay, keys) as link:
            assert link.kind == "socket/tcp+curve"
            assert link.call(question_for(members_of(actors)), 20).op == "ok"
        with pytest.raises(PeerLost, match="handshake"), asking(relay):
            pass


def by_hand(relay: Relay) -> None:
    """From now on its rounds are the caller's."""
    relay._stop.set()
    relay._thread.join(10)
    assert not relay._thread.is_alive()


def rounds_until(relay: Relay, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        relay._round()


@pytest.mark.parametrize("other_is_asked", [False, True])
def test_an_actor_that_ends_when_nothing_is_wanted_of_it_is_forgotten(other_is_asked: bool) -> None:
    """Whoever is gone for good is not asked again, and its end would wake the relay in every round."""
    with node() as ((relay,), (first, second)), asking(relay) as link:
        link.call(question_for([first.member, second.member]), 20)
        by_hand(relay)
        (asker,) = relay._askers.values()
        with first.held:
            if other_is_asked:
                asker.ask(99, Bundle.of(question_for([first.member, second.member])))
                rounds_until(relay, lambda: bool(asker._open and asker._open[0].answers))
            second.stop()
            rounds_until(relay, lambda: list(asker._neighbours) == [first.member])
            assert len(asker._open) == other_is_asked
            assert not relay._inbox.wait(0)


def test_a_late_answer_that_nobody_wants_is_read() -> None:
    """Of one actor, after another has refused."""
    with node() as ((relay,), (first, second)), asking(relay) as link:
        link.call(question_for([first.member, second.member]), 20)
        (asker,) = relay._askers.values()
        late = asker._neighbours[second.member].link
        num_before = late.traffic.messages_received
        first.refuses = True
        with second.held:
            with pytest.raises(StepAborted):
                raise_if_failed(link.call(question_for([first.member, second.member]), 20))
            by_hand(relay)
        rounds_until(relay, lambda: late.traffic.messages_received > num_before)
        assert not relay._inbox.wait(0)


class Scripted(Link):
    """Says what is next at each look: an answer to the question of this id, or nothing."""

    def __init__(self, says: list[int | None]) -> None:
        super().__init__("a0")
        self._says = says

    def _send(self, question: Message) -> None:
        pass

    def _receive(self, deadline: float) -> Message:
        number = self._says.pop(0) if self._says else None
        if number is None:
            raise LinkTimeout("nothing", peer=self.peer)
        return Message("ok", {}, (torch.ones(1, 3),), number)


def test_an_answer_that_came_after_its_question_was_looked_at_is_not_slept_over() -> None:
    """The look at the second question takes it in, and no poller knows of it any more."""
    link = Scripted([None, 1, None])
    inbox: Any = SimpleNamespace(watch=lambda pollables: None, unwatch=lambda pollables: None)
    asker = _Asker("a0", lambda name, address: link, inbox, 20.0)
    member = Member("a0", Address("here", "", ""))
    for number in (98, 99):
        asker.ask(number, Bundle.of(question_for([member])))
    deadline = time.monotonic() + 10
    while asker.is_opening and time.monotonic() < deadline:
        assert asker.answers() == []
    assert asker.has_news
    assert [answer.id for answer in asker.answers()] == [98]
    assert not asker.has_news


def test_links_that_nobody_uses_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.relay.relay.IDLE_S", 0.0)
    with node() as ((relay,), actors), asking(relay) as link:
        for _ in range(2):
            link.call(question_for(members_of(actors)), 20)
            deadline = time.monotonic() + 10
            while relay._askers and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not relay._askers
