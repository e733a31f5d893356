"""Tensors that come on the device, behind whatever waits for them there: an actor that ends between its answer and them
leaves anything in their place, and nobody is given what came of that. Here by links that say so; NCCL's are such."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Event
from types import SimpleNamespace

import pytest
import torch

from actors.errors import PeerLost
from actors.router.batch import AHEAD
from actors.transport.contract import Link
from actors.transport.message import Message
from tests.captured import BATCHES, agree, source, tokens
from tests.local import LocalCluster, cluster


class Late(Link):
    """Ends with the answer to one forward, whose tensor never comes."""

    kind = "late"

    def __init__(self, inner: Link, ends_in: Callable[[Link], bool]) -> None:
        super().__init__(inner.peer)
        self._inner, self._ends_in = inner, ends_in
        self._over = Event()
        self._forwards = set[int]()

    @property
    def over(self) -> Event:
        return self._over

    def _send(self, question: Message) -> None:
        if question.op == "forward" and not question.fields["keep"]:
            self._forwards.add(question.id)
        self._inner._send(question)

    def _receive(self, deadline: float) -> Message:
        answer = self._inner._receive(deadline)
        if answer.id not in self._forwards or not self._ends_in(self):
            return answer
        self._over.set()
        self.cut()
        return replace(answer, tensors=tuple(torch.full_like(tensor, 1e3) for tensor in answer.tensors))

    def close(self) -> None:
        super().close()
        self._inner.close()


class Ends:
    """The first link that serves a forward once this is set ends with its answer, after so many others."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.peers: list[str] = []

    def __call__(self, link: Link) -> bool:
        if self.left is None:
            return False
        self.left -= 1
        if self.left >= 0:
            return False
        self.left = None
        self.peers.append(link.peer)
        return True


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    return Ends()


@contextmanager
def made(ends: Ends) -> Iterator[LocalCluster]:
    wrap = lambda actor, link: Late(link, ends)  # noqa: E731
    with cluster(source("deepseek_v3"), redundancy=2, decode_batch=4, wrap=wrap) as local:
        yield local


def num_answers(local: LocalCluster) -> int:
    """Of one forward."""
    links = local.router.state.requests.links.values()
    before = sum(link.traffic.messages_received for link in links)
    local.router.serving.logits(BATCHES[0])
    return sum(link.traffic.messages_received for link in links) - before


@pytest.mark.parametrize("is_last", [False, True])
def test_a_forward_in_which_an_actor_ends_gives_nothing(ends: Ends, is_last: bool) -> None:
    with made(ends) as local:
        logits_BSV = local.router.serving.logits(BATCHES[0])
        ends.left = num_answers(local) - 1 if is_last else 0
        with pytest.raises(PeerLost) as caught:
            local.router.serving.logits(BATCHES[0])
        assert [caught.value.peer] == ends.peers
        assert local.router.state.requests.links[caught.value.peer].closed
        again_BSV = local.router.serving.logits(BATCHES[0])
        torch.testing.assert_close(again_BSV, logits_BSV, rtol=1e-4, atol=1e-4)
        assert local.router.state.requests.links.lost == {caught.value.peer}


def test_streams_go_on(ends: Ends) -> None:
    def end() -> None:
        ends.left = 1

    with made(ends) as local:
        # So many that there are steps left when the first stream's reader is at its 16th, however late it reads.
        agree(local.router, tokens(local.router, 16 + 2 * AHEAD, at=16, then=end))
        assert len(ends.peers) == 1
