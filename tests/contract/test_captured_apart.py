"""Steps that are captured in a router and its expert actors at once. Here with graphs that are none and ways through
queues; `tests.gpu.test_apart` has those of CUDA and NCCL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from actors.expert.host import ExpertHost
from actors.expert.playing import Playing
from actors.router.captured import CapturedForward
from actors.transport.contract import Link
from actors.transport.message import Message
from tests.captured import agree, source, tokens, training_pins_and_growth_are_seen, wholes
from tests.fakes.graphs import FakeWay, use_fake_graphs
from tests.local import LocalCluster, cluster


@dataclass
class Brought:
    """A carrier as far as an expert actor uses it."""

    end: FakeWay

    def way(self) -> FakeWay:
        return self.end


class Reaching(Link):
    """A link with a way beside it."""

    kind = "reaching"

    def __init__(self, inner: Link) -> None:
        super().__init__(inner.peer)
        self._inner = inner
        self._ours, theirs = FakeWay.pair()
        self._brought: Any = Brought(theirs)

    @property
    def way(self) -> FakeWay:
        return self._ours

    def _send(self, question: Message) -> None:
        self._inner._send(replace(question, via=self._brought))

    def _receive(self, deadline: float) -> Message:
        return self._inner._receive(deadline)

    def close(self) -> None:
        super().close()
        self._inner.close()


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_graphs(monkeypatch)


@contextmanager
def made(**more: Any) -> Iterator[LocalCluster]:
    with cluster(
        source("deepseek_v3"),
        device="cpu",
        decode_batch=4,
        captured="on",
        wrap=lambda actor, link: Reaching(link),
        **more,
    ) as local:
        yield local


def test_steps_in_three_graphs_see_training_pins_and_growth(forwards: list[CapturedForward]) -> None:
    with made() as local:
        agree(local.router, tokens(local.router))
        assert any(wholes(forwards[0]))
        training_pins_and_growth_are_seen(local, forwards)
        agree(local.router, tokens(local.router))
        assert any(any(wholes(forward)) for forward in forwards)


def test_a_group_that_moves_is_computed_where_it_is(forwards: list[CapturedForward]) -> None:
    with made(redundancy=2) as local:
        agree(local.router, tokens(local.router))
        local.adopt("0", "0", "0", "1")
        agree(local.router, tokens(local.router))
        agree(local.router, tokens(local.router))
        assert any(wholes(forwards[-1]))


def test_who_has_begun_with_others_who_do_not_is_played_to_the_end(
    forwards: list[CapturedForward], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Now and then the second actor refuses, also when a step before it is under way."""
    refused: list[Message] = []
    num_asked = 0
    before = Playing.play

    def play(self: Playing, question: Message) -> Message:
        nonlocal num_asked
        if self._state.name == "expert-1":
            num_asked += 1
            if num_asked in (1, 5, 11):
                refused.append(question)
                return Message("ok", {"played": False})
        return before(self, question)

    monkeypatch.setattr(Playing, "play", play)
    with made() as local:
        for _ in range(5):
            agree(local.router, tokens(local.router))
        assert len(refused) == 3
        assert any(wholes(forwards[0]))


def asked(host: ExpertHost, op: str, brought: Any, **fields: object) -> Message:
    return host.handle("router", Message(op, fields, via=brought))


def arranged(host: ExpertHost, brought: Any, **changes: object) -> Message:
    fields = {"rows": 1, "top_k": 2, "weight_dtype": "float32", "epoch": host.state.copies.placement.epoch}
    return asked(host, "arrange", brought, **{**fields, "experts": host.experts, **changes})


def played(host: ExpertHost, brought: Any, number: object) -> Message:
    fields = {"version": host.version, "epoch": host.state.copies.placement.epoch}
    return asked(host, "play", brought, **fields, **{"pass": number})


def test_who_uses_another_placement_captures_nothing() -> None:
    """As after a switch that failed: which experts are where, and how many there are, may be other than the router
    knows, and it goes on without."""
    with made() as local:
        host, brought = local.hosts[0], Brought(FakeWay.pair()[1])
        assert arranged(host, brought).fields == {"pass": 1}
        assert arranged(host, brought, epoch=local.placement.epoch - 1, experts=[99]).fields == {"pass": 0}
        assert arranged(host, brought, experts=[99]).fields["kind"] == "invalid_input"


WAIT_FOR_NO_PASS: dict[str, dict[str, object]] = {
    "pin": {"name": "kept", "version": 0},
    "keep_pins": {"names": []},
    "snapshot": {"version": 0, "run": 0},
    "abort": {"step": 1, "attempt": 0},
    "commit": {"step": 0},
    "begin_run": {"optimizer": {}},
}
"""A commit of the version that is here already is there for those who have not heard of it."""


@pytest.mark.parametrize("op", WAIT_FOR_NO_PASS)
def test_what_leaves_weights_alone_waits_for_no_pass(op: str) -> None:
    """Nor does a pass that is begun after it: two routers' passes would wait for each other where one actor has begun
    the one before it and another actor the other."""
    with made() as local:
        host, (ours, theirs) = local.hosts[0], FakeWay.pair()
        brought = Brought(theirs)
        arrangement = arranged(host, brought)
        assert played(host, brought, arrangement.fields["pass"]).fields == {"played": True}
        (player,) = host.playing._players.values()
        assert asked(host, op, None, **WAIT_FOR_NO_PASS[op]).op == "ok"
        assert not player.is_done(), "its tokens are still to come"
        room_N = player.passes[1].room_N
        for _ in host.holdings.stacks:
            ours.send(torch.zeros_like(room_N))
        Playing._wait(player)
        assert player.is_done()


def test_a_pass_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the host's lock may be waiting for it, and see no link end."""
    with made() as local:
        host, (ours, theirs), (others, left) = local.hosts[0], FakeWay.pair(), FakeWay.pair()
        monkeypatch.setattr(host.state.exchange, "timeout_s", 2.0)
        late, in_time = Brought(theirs), Brought(left)
        numbers = {end: arranged(host, brought).fields["pass"] for end, brought in ((ours, late), (others, in_time))}
        room_N = next(iter(host.playing._players.values())).passes[1].room_N
        for _ in host.holdings.stacks:
            others.send(torch.zeros_like(room_N))
        assert played(host, in_time, numbers[others]).fields == {"played": True}
        for player in host.playing._players.values():
            Playing._wait(player)
        assert played(host, late, numbers[ours]).fields == {"played": True}
        with host.state.lock:
            deadline = time.monotonic() + 20  # the late one waits for 30 s
            while not theirs.is_over and time.monotonic() < deadline:
                time.sleep(0.01)
        assert theirs.is_over
        assert not left.is_over
        assert played(host, late, numbers[ours]).fields == {"played": False}
        for _ in host.holdings.stacks:
            ours.send(torch.zeros_like(room_N))  # as an ended communicator lets go of the device


def test_an_actor_that_dies_is_rerouted_around(forwards: list[CapturedForward]) -> None:
    with made(redundancy=2) as local:
        agree(local.router, tokens(local.router))
        assert any(wholes(forwards[0]))
        local.members["expert-1"].kill()
        agree(local.router, tokens(local.router))
        assert local.router.state.requests.links.lost == {"expert-1"}
