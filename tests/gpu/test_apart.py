"""Steps that are captured in several processes at once: a router on one GPU, expert actors on another, and tokens that
cross between their graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.process import BaseProcess

import pytest
import torch

from actors.moe.layer_bytes import LayerShape, from_bytes, to_bytes
from actors.optim import OptimizerSettings
from actors.router.captured import CapturedForward
from actors.router.roster import Peer, Roster
from actors.router.router import Router
from actors.transport.socket import SocketLink
from actors.trunk.model import ModelSource
from actors.values import Placement
from tests.captured import BATCHES, agree, source, tokens, wholes
from tests.gpu.hosts import serve_host
from tests.gpu.test_payload import MAX_BYTES, process, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

SPLIT = [("a",), ("a",), ("b",), ("b",)]


@contextmanager
def apart(model: ModelSource, held: Sequence[Sequence[str]]) -> Iterator[tuple[Router, dict[str, BaseProcess]]]:
    """`held[g]`: who holds group g."""
    names = sorted({name for names in held for name in names})
    with ExitStack() as stack:
        peers, children = {}, {}
        for name in names:
            groups = tuple(g for g, holders in enumerate(held) if name in holders)
            started = process(serve_host, model, name, groups, settings("nccl", "cuda:1"), "cuda:1")
            children[name], address = stack.enter_context(started)
            link = partial(SocketLink, name, address, name="router", max_bytes=MAX_BYTES, timeout_s=60)
            peers[name] = Peer(partial(link, payload=settings("nccl", "cuda:0")))
        placement = Placement(1, tuple(tuple(names) for names in held), 2)
        router = Router(
            model,
            Roster(placement, peers),
            device="cuda:0",
            timeout_s=60,
            decode_batch=4,
            max_sessions=4,
            captured="on",
        )
        try:
            yield router, children
        finally:
            router.close()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_steps_in_three_graphs_give_the_tokens_of_whole_forwards(family: str, forwards: list[CapturedForward]) -> None:
    with apart(source(family), SPLIT) as (router, _):
        agree(router, tokens(router))
        agree(router, tokens(router))
        assert any(wholes(forwards[0]))
        assert forwards[0].num_replays >= 23


def test_training_is_seen_and_needs_no_other_graphs(forwards: list[CapturedForward]) -> None:
    with apart(source("deepseek_v3"), SPLIT) as (router, _):
        router.begin_run(OptimizerSettings())
        before = tokens(router)
        captures = forwards[0].num_captures
        assert any(wholes(forwards[0]))
        for batch in BATCHES:
            router.train_step([batch], lr=1e-2, clip_norm=1.0)
        after = tokens(router)
        agree(router, after)
        assert after != before
        assert forwards[0].num_captures <= captures + 1, "for another number of rows at most"


def test_training_goes_on_beside_streams(forwards: list[CapturedForward]) -> None:
    with apart(source("deepseek_v3"), SPLIT) as (router, _):
        router.begin_run(OptimizerSettings())
        tokens(router)
        ended = threading.Event()
        steps: list[float] = []

        def train() -> None:
            while not ended.is_set():
                steps.append(router.train_step([BATCHES[0]], lr=1e-3, clip_norm=1.0).loss)

        trainer = threading.Thread(target=train)
        trainer.start()
        for _ in range(3):
            assert all(len(text) == 60 for text in tokens(router, 60))
        ended.set()
        trainer.join(60)
        assert not trainer.is_alive()
        assert len(steps) > 3
        assert forwards[0].num_replays > 60


def test_streams_go_on_when_an_actor_dies_in_the_middle(forwards: list[CapturedForward]) -> None:
    with apart(source("deepseek_v3"), [("a", "b"), ("b", "a"), ("a", "b"), ("b", "a")]) as (router, who):
        tokens(router)
        assert any(wholes(forwards[0]))
        found = tokens(router, 80, at=20, then=who["a"].kill)
        assert all(len(text) == 80 for text in found)
        agree(router, found)
        again = tokens(router, 40)
        agree(router, again)
        assert any(wholes(forwards[0])) or forwards[-1].num_replays > 0


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_layer(weight_dtype: torch.dtype) -> None:
    shape = LayerShape(3, 8, 2, torch.bfloat16, weight_dtype)
    x, ids, weights = torch.randn(3, 8).bfloat16(), torch.randint(0, 9, (3, 2)), torch.rand(3, 2).to(weight_dtype)
    there = to_bytes(x.cuda(), ids.cuda(), weights.cuda())
    for got, given in zip(from_bytes(there, shape), (x, ids, weights), strict=True):
        assert torch.equal(got.cpu(), given)
