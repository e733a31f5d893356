"""Steps that are captured in several processes at once: a router on one GPU, expert actors on another, and tokens that
cross between their graphs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import Queue
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

from actors.expert.host import ExpertHost
from actors.moe.layer_bytes import LayerShape, from_bytes, to_bytes
from actors.optim import OptimizerSettings
from actors.router import captured
from actors.router.captured import CapturedForward
from actors.router.roster import Peer, Roster
from actors.router.router import Router
from actors.transport.payload.contract import PayloadSettings
from actors.transport.socket import SocketLink, SocketServer
from actors.trunk.model import ModelSource
from actors.values import Address, Placement, Sampling
from tests.families import FAMILIES
from tests.gpu.test_payload import MAX_BYTES, process, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

PROMPTS = [torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 30, 1, 12)]
SPLIT = [("a",), ("a",), ("b",), ("b",)]
BATCHES = [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(t)) for t in range(4)]


def serve_host(
    addresses: Queue[Address], source: ModelSource, name: str, groups: tuple[int, ...], settings: PayloadSettings
) -> None:
    host = ExpertHost(name, source, groups, group_size=2, device="cuda:1")
    server = SocketServer(name, host.handle, max_bytes=MAX_BYTES, idle=host.idle, payload=settings)
    server.start()
    addresses.put(server.address)
    time.sleep(300)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "SEEN_BEFORE", 0)
    monkeypatch.setattr(captured, "SETTLED_AFTER", 5)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[CapturedForward]:
    """Those that are made."""
    found: list[CapturedForward] = []
    before = CapturedForward.__init__

    def init(self: CapturedForward, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(CapturedForward, "__init__", init)
    return found


def source_of(family: str) -> ModelSource:
    return ModelSource(values={"model_type": family, **FAMILIES[family], "eos_token_id": None})


@contextmanager
def apart(source: ModelSource, held: Sequence[Sequence[str]]) -> Iterator[tuple[Router, dict[str, BaseProcess]]]:
    """`held[g]`: who holds group g."""
    names = sorted({name for names in held for name in names})
    with ExitStack() as stack:
        peers, children = {}, {}
        for name in names:
            groups = tuple(g for g, holders in enumerate(held) if name in holders)
            started = process(serve_host, source, name, groups, settings("nccl", "cuda:1"))
            children[name], address = stack.enter_context(started)
            link = partial(SocketLink, name, address, name="router", max_bytes=MAX_BYTES, timeout_s=60)
            peers[name] = Peer(partial(link, payload=settings("nccl", "cuda:0")))
        placement = Placement(1, tuple(tuple(names) for names in held), 2)
        router = Router(
            source,
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


def tokens(router: Router, num_tokens: int = 24, at: int = 0, then: Any = None) -> list[list[int]]:
    """Of each prompt. `then` is called once the first has `at` of them."""

    def one(number: int) -> list[int]:
        found = []
        for event in router.serving.generate(PROMPTS[number], Sampling(max_tokens=num_tokens), timeout_s=60):
            found.append(event.token)
            if then is not None and number == 0 and len(found) == at:
                then()
        return found

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(one, range(len(PROMPTS))))


def agree(router: Router, found: Sequence[Sequence[int]]) -> None:
    """Each token is, up to rounding, the likeliest by a forward over everything before it."""
    for prompt, text in zip(PROMPTS, found, strict=True):
        logits_SV = router.serving.logits(torch.tensor([[*prompt, *text]]))[0].float()
        for number, token in enumerate(text):
            logits_V = logits_SV[len(prompt) + number - 1]
            assert logits_V[token] >= logits_V.max() - 1e-3, (len(prompt), number)


def wholes(forward: CapturedForward) -> list[bool]:
    return [step.is_whole for step in forward._steps.values()]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_steps_in_three_graphs_give_the_tokens_of_whole_forwards(family: str, forwards: list[CapturedForward]) -> None:
    with apart(source_of(family), SPLIT) as (router, _):
        agree(router, tokens(router))
        agree(router, tokens(router))
        assert any(wholes(forwards[0]))
        assert forwards[0].num_replays >= 23


def test_training_is_seen_and_needs_no_other_graphs(forwards: list[CapturedForward]) -> None:
    with apart(source_of("deepseek_v3"), SPLIT) as (router, _):
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
    with apart(source_of("deepseek_v3"), SPLIT) as (router, _):
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
    with apart(source_of("deepseek_v3"), [("a", "b"), ("b", "a"), ("a", "b"), ("b", "a")]) as (router, who):
        tokens(router)
        assert any(wholes(forwards[0]))
        found = tokens(router, 80, 20, who["a"].kill)
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
