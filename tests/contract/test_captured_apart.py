"""Steps that are captured in a router and its expert actors at once. Here with graphs that are none and ways through
queues; `tests.gpu.test_apart` has those of CUDA and NCCL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from actors.expert.playing import Playing
from actors.optim import OptimizerSettings
from actors.router.captured import CapturedForward
from actors.transport.contract import Link
from actors.transport.message import Message
from actors.values import Growth, VersionChoice
from tests.contract.test_captured_decode import BATCHES, agree, device, forwards, soon, source, tokens  # noqa: F401
from tests.fakes.graphs import FakeWay
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


@contextmanager
def made(at: str, **more: Any) -> Iterator[LocalCluster]:
    with cluster(
        source("deepseek_v3"),
        device=at,
        decode_batch=4,
        captured="on",
        wrap=lambda actor, link: Reaching(link),
        **more,
    ) as local:
        yield local


def has_whole(forward: CapturedForward) -> bool:
    return any(step.is_whole for step in forward._steps.values())


def test_steps_in_three_graphs_see_training_pins_and_growth(device: str, forwards: list[CapturedForward]) -> None:  # noqa: F811
    with made(device) as local:
        local.router.begin_run(OptimizerSettings())
        agree(local, tokens(local))
        assert has_whole(forwards[0])
        captures = forwards[0].num_captures
        local.router.train_step([BATCHES[0]], lr=1e-2, clip_norm=1.0)
        agree(local, tokens(local))
        assert forwards[0].num_captures == captures, "updates are made in place"
        local.router.pin("kept")
        kept = tokens(local, choice=VersionChoice(pin="kept"))
        local.router.train_step([BATCHES[1]], lr=1e-2, clip_norm=1.0)  # on copies: the pin keeps the others
        agree(local, tokens(local))
        assert tokens(local, choice=VersionChoice(pin="kept")) == kept
        local.grow(Growth(16))
        agree(local, tokens(local))
        agree(local, tokens(local))
        assert any(has_whole(forward) for forward in forwards)


def test_a_group_that_moves_is_computed_where_it_is(device: str, forwards: list[CapturedForward]) -> None:  # noqa: F811
    with made(device, redundancy=2) as local:
        agree(local, tokens(local))
        local.adopt("0", "0", "0", "1")
        agree(local, tokens(local))
        agree(local, tokens(local))
        assert has_whole(forwards[-1])


def test_who_has_begun_with_others_who_do_not_is_played_to_the_end(
    device: str,  # noqa: F811
    forwards: list[CapturedForward],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Now and then the second actor refuses."""
    refused: list[Message] = []
    before = Playing.play

    def play(self: Playing, question: Message) -> Message:
        if self._state.name == "expert-1" and len(refused) < 3:
            refused.append(question)
            return Message("ok", {"played": False})
        return before(self, question)

    monkeypatch.setattr(Playing, "play", play)
    with made(device) as local:
        for _ in range(5):
            agree(local, tokens(local))
        assert len(refused) == 3
        assert has_whole(forwards[0])


def test_an_actor_that_dies_is_rerouted_around(device: str, forwards: list[CapturedForward]) -> None:  # noqa: F811
    with made(device, redundancy=2) as local:
        agree(local, tokens(local))
        assert has_whole(forwards[0])
        local.members["expert-1"].kill()
        agree(local, tokens(local))
        assert local.router.state.requests.links.lost == {"expert-1"}
