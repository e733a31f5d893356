"""Payloads between two processes on one GPU: there and back without the host's memory, in order, and past deaths."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import Queue
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from actors.errors import InvalidInput, PeerLost
from actors.expert.host import ExpertHost
from actors.optim import OptimizerSettings
from actors.router.dispatcher import Peer, Roster
from actors.router.router import Router
from actors.transport.message import Message
from actors.transport.payload.contract import PayloadSettings
from actors.transport.socket import SocketLink, SocketServer
from actors.trunk.model import ModelSource
from actors.values import Address, Placement
from tests.families import save
from tests.gpu.test_cuda import BATCHES, losses

pytestmark = pytest.mark.gpu

MAX_BYTES = 1 << 28
SETTINGS = PayloadSettings("cuda_ipc", "cuda", gpu_region_bytes=8 << 20, carry_from_bytes=1)
SLOW_CYCLES = 200_000_000
"""Of a kernel that does nothing: a tenth of a second."""


def serve_echo(addresses: Queue[Address], settings: PayloadSettings) -> None:
    def handle(peer: str, question: Message) -> Message:
        devices = [t.device.type for t in question.tensors]
        if question.op == "double":
            torch.cuda._sleep(SLOW_CYCLES)  # the answer goes out before it is computed
            return Message("ok", {"devices": devices}, tuple(t * 2 for t in question.tensors))
        return Message("ok", {"devices": devices}, question.tensors)

    server = SocketServer("echo", handle, max_bytes=MAX_BYTES, payload=settings)
    server.start()
    addresses.put(server.address)
    time.sleep(300)


@contextmanager
def process(run, *args: object) -> Iterator[tuple[BaseProcess, Address]]:
    context = multiprocessing.get_context("spawn")
    addresses = context.Queue()
    child = context.Process(target=run, args=(addresses, *args), daemon=True)
    child.start()
    try:
        yield child, addresses.get(timeout=120)
    finally:
        child.kill()
        child.join(10)


def opened(address: Address, settings: PayloadSettings = SETTINGS) -> SocketLink:
    return SocketLink("echo", address, name="router", max_bytes=MAX_BYTES, timeout_s=60, payload=settings)


@pytest.fixture(scope="module")
def echo() -> Iterator[Address]:
    with process(serve_echo, SETTINGS) as (_, address):
        yield address


@pytest.fixture
def link(echo: Address) -> Iterator[SocketLink]:
    link = opened(echo)
    yield link
    link.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (), (700, 64)])
def test_tensors_come_back_as_they_went(link: SocketLink, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert link.kind == "socket/ipc+cuda_ipc"
    tensor = (torch.randn(shape, device="cuda") * 100).to(dtype)
    (got,) = link.call(Message("echo", {}, (tensor,)), 60).tensors
    assert torch.equal(got.to("cuda"), tensor)
    assert tensor.numel() == 0 or got.is_cuda


def test_what_is_still_being_computed_arrives_whole(link: SocketLink) -> None:
    for number in range(10):
        torch.cuda._sleep(SLOW_CYCLES)
        tensor = torch.full((512, 1024), float(number), device="cuda")
        pending = link.start(Message("double", {}, (tensor,)))
        tensor.fill_(-1)  # the link has taken it already
        answer = pending.result(60)
        assert answer.fields["devices"] == ["cuda"]
        assert torch.equal(answer.tensors[0], torch.full((512, 1024), 2.0 * number, device="cuda"))


def test_a_full_region_falls_back_to_the_socket(link: SocketLink) -> None:
    tensors = tuple(torch.randn(1 << 19, device="cuda") for _ in range(12))  # 24 MB through 8 MB
    pending = [link.start(Message("echo", {}, (tensor,))) for tensor in tensors]
    answers = [each.result(60) for each in pending]
    devices = [answer.fields["devices"] for answer in answers]
    assert ["cuda"] in devices
    assert ["cpu"] in devices
    for answer, tensor in zip(answers, tensors, strict=True):
        assert torch.equal(answer.tensors[0].to("cuda"), tensor)
    for _ in range(8):  # and what was full is free again
        assert link.call(Message("echo", {}, (tensors[0],)), 60).op == "ok"
    assert link.call(Message("echo", {}, (tensors[0],)), 60).fields["devices"] == ["cuda"]


def test_tensors_of_the_host_cross_the_socket(link: SocketLink) -> None:
    mixed = (torch.arange(5000), torch.arange(5000, device="cuda"), torch.arange(3))
    answer = link.call(Message("echo", {}, mixed), 60)
    assert answer.fields["devices"] == ["cpu", "cuda", "cpu"]
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(answer.tensors, mixed, strict=True))


def test_a_closed_link_gives_its_memory_back(echo: Address) -> None:
    opened(echo).close()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(5):
        link = opened(echo)
        link.call(Message("echo", {}, (torch.ones(1 << 18, device="cuda"),)), 60)
        link.close()
    deadline = time.monotonic() + 20  # the peer gives back its half when it notices
    while torch.cuda.mem_get_info()[0] < free - SETTINGS.gpu_region_bytes and time.monotonic() < deadline:
        time.sleep(0.1)
    assert torch.cuda.mem_get_info()[0] >= free - SETTINGS.gpu_region_bytes


@pytest.mark.parametrize("computing", [False, True])
def test_a_killed_peer_is_named_and_another_takes_its_place(computing: bool) -> None:
    tensor = torch.ones(1 << 18, device="cuda")
    with process(serve_echo, SETTINGS) as (child, address):
        link = opened(address)
        link.call(Message("echo", {}, (tensor,)), 60)
        if computing:  # its answer is here, and what computes it is not done
            got = link.call(Message("double", {}, (tensor,)), 60)
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            got.tensors[0].sum().item()  # whatever came, this GPU waits for nobody who is dead
        child.kill()
        child.join(10)
        started = time.monotonic()
        with pytest.raises(PeerLost, match="echo"):
            link.call(Message("echo", {}, (tensor,)), 60)
        assert time.monotonic() - started < 5
        link.close()
    with process(serve_echo, SETTINGS) as (_, address):
        link = opened(address)
        assert torch.equal(link.call(Message("echo", {}, (tensor,)), 60).tensors[0], tensor)
        link.close()


def test_ends_that_do_not_share_a_gpu_cannot_be_made_to(echo: Address) -> None:
    with pytest.raises(InvalidInput, match="same GPU"):
        opened(echo, PayloadSettings("cuda_ipc"))


def serve_host(
    addresses: Queue[Address], source: ModelSource, name: str, groups: tuple[int, ...], settings: PayloadSettings
) -> None:
    host = ExpertHost(name, source, groups, group_size=2, device="cuda")
    server = SocketServer(name, host.handle, max_bytes=MAX_BYTES, idle=host.idle, payload=settings)
    server.start()
    addresses.put(server.address)
    time.sleep(300)


def test_losses_through_gpu_memory_equal_those_on_the_cpu(tmp_path: Path) -> None:
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    with (
        process(serve_host, source, "a", (0, 1), SETTINGS) as (_, a),
        process(serve_host, source, "b", (2, 3), SETTINGS) as (_, b),
    ):
        peers = {
            name: Peer(
                partial(SocketLink, name, at, name="router", max_bytes=MAX_BYTES, timeout_s=60, payload=SETTINGS)
            )
            for name, at in (("a", a), ("b", b))
        }
        placement = Placement(1, (("a",), ("a",), ("b",), ("b",)), 2)
        router = Router(source, Roster(placement, peers), device="cuda", timeout_s=60)
        router.begin_run(OptimizerSettings())
        got = [router.train_step(batch, lr=1e-3, clip_norm=1.0).loss for batch in BATCHES]
        assert {link.kind for link in router._training.links.values()} == {"socket/ipc+cuda_ipc"}
        router.close()
    torch.testing.assert_close(got, losses(source, "cpu"), rtol=1e-3, atol=0)
