"""Payloads between two processes on one GPU, and on two: there and back without the host's memory, in order, and past
deaths. What the other process imports is kept small: it starts for many of these tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Queue
from multiprocessing.process import BaseProcess

import pytest
import torch

from actors.errors import InvalidInput, PeerLost
from actors.transport.message import Message
from actors.transport.payload.contract import PayloadSettings
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address

pytestmark = pytest.mark.gpu

MAX_BYTES = 1 << 28
REGION_BYTES = 8 << 20
WAYS = {
    "one_gpu": ("cuda_ipc", "cuda:0", "cuda:0"),
    "two_gpus": ("cuda_ipc", "cuda:0", "cuda:1"),
    "nccl": ("nccl", "cuda:0", "cuda:1"),
}
"""Kind of the carrier; where the link's end computes, and the server's."""
SLOW_CYCLES = 200_000_000
"""Of a kernel that does nothing: a tenth of a second."""


def settings(kind: str, device: str) -> PayloadSettings:
    return PayloadSettings(kind, device, gpu_region_bytes=REGION_BYTES, carry_from_bytes=1)  # type: ignore[arg-type]


def serve_echo(addresses: Queue[Address], settings: PayloadSettings) -> None:
    torch.cuda.init()

    def handle(peer: str, question: Message) -> Message:
        devices = [t.device.type for t in question.tensors]
        if question.op == "double":
            with torch.cuda.device(question.tensors[0].device):
                torch.cuda._sleep(SLOW_CYCLES)  # the answer goes out before it is computed
                return Message("ok", {"devices": devices}, tuple(t * 2 for t in question.tensors))
        return Message("ok", {"devices": devices}, question.tensors)

    server = SocketServer("echo", handle, max_bytes=MAX_BYTES, payload=settings)
    server.start()
    addresses.put(server.address)
    time.sleep(300)


@contextmanager
def process(run: Callable[..., None], *args: object) -> Iterator[tuple[BaseProcess, Address]]:
    context = multiprocessing.get_context("spawn")
    addresses = context.Queue()
    child = context.Process(target=run, args=(addresses, *args), daemon=True)
    child.start()
    try:
        yield child, addresses.get(timeout=120)
    finally:
        child.kill()
        child.join(10)


def opened(address: Address, payload: PayloadSettings) -> SocketLink:
    return SocketLink("echo", address, name="router", max_bytes=MAX_BYTES, timeout_s=60, payload=payload)


@contextmanager
def echoing(way: str) -> Iterator[tuple[BaseProcess, Callable[[], SocketLink]]]:
    """A process, and what opens a link to it."""
    kind, here, there = WAYS[way]
    with process(serve_echo, settings(kind, there)) as (child, address):
        yield child, lambda: opened(address, settings(kind, here))


@pytest.fixture(params=list(WAYS), scope="module")
def way(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    if torch.cuda.device_count() < 2 and "cuda:1" in WAYS[found]:
        pytest.skip("needs a second GPU")
    return found


@pytest.fixture(scope="module")
def open_link(way: str) -> Iterator[Callable[[], SocketLink]]:
    with echoing(way) as (_, open_link):
        yield open_link


@pytest.fixture(scope="module")
def link(open_link: Callable[[], SocketLink]) -> Iterator[SocketLink]:
    link = open_link()
    yield link
    link.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (), (700, 64)])
def test_tensors_come_back_as_they_went(link: SocketLink, way: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert link.kind == f"socket/ipc+{WAYS[way][0]}"
    tensor = (torch.randn(shape, device="cuda") * 100).to(dtype)
    (got,) = link.call(Message("echo", {}, (tensor,)), 60).tensors
    assert torch.equal(got.to("cuda"), tensor)
    assert tensor.numel() == 0 or got.is_cuda


def test_what_is_still_being_computed_arrives_whole(link: SocketLink) -> None:
    for number in range(10):
        torch.cuda._sleep(SLOW_CYCLES)
        tensor = torch.full((512, 1024), float(number), device="cuda")
        pending = link.start(Message("double", {}, (tensor,)))
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


def test_closed_links_give_their_memory_back(open_link: Callable[[], SocketLink]) -> None:
    def use() -> None:
        link = open_link()
        link.call(Message("echo", {}, (torch.ones(1 << 18, device="cuda"),)), 60)
        link.close()

    def free() -> int:
        return min(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))

    use()
    time.sleep(1)  # the other end gives back its half when it notices, and NCCL beside it
    before = free()
    for _ in range(4):
        use()
    deadline = time.monotonic() + 20
    while free() < before - REGION_BYTES and time.monotonic() < deadline:
        time.sleep(0.1)
    assert free() >= before - REGION_BYTES


@pytest.mark.parametrize("computing", [False, True])
def test_a_killed_peer_is_named_and_another_takes_its_place(way: str, computing: bool) -> None:
    tensor = torch.ones(1 << 18, device="cuda")
    with echoing(way) as (child, open_link):
        link = open_link()
        link.call(Message("echo", {}, (tensor,)), 60)
        if computing:  # its answer is here, and what computes it is not done
            link.call(Message("double", {}, (tensor,)), 60)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(PeerLost, match="echo"):
            link.call(Message("echo", {}, (tensor,)), 60)
        assert time.monotonic() - started < 5
        link.close()
    torch.cuda.synchronize()  # whatever came, this GPU waits for nobody who is dead
    with echoing(way) as (_, open_link):
        link = open_link()
        assert torch.equal(link.call(Message("echo", {}, (tensor,)), 60).tensors[0].cuda(), tensor)
        link.close()


def test_ends_without_a_gpu_cannot_be_made_to() -> None:
    with (
        process(serve_echo, PayloadSettings("cuda_ipc", "cpu")) as (_, address),
        pytest.raises(InvalidInput, match="compute on GPUs"),
    ):
        opened(address, PayloadSettings("cuda_ipc", "cuda:0"))


def test_what_a_process_has_sent_outlives_it() -> None:
    """Its memory is mapped here; nothing of it may go, or change, before it was copied out."""
    with echoing("two_gpus" if torch.cuda.device_count() > 1 else "one_gpu") as (child, open_link):
        link = open_link()
        tensor = torch.arange(1 << 18, device="cuda")
        pending = [link.start(Message("echo", {}, (tensor + number,))) for number in range(8)]
        assert pending[-1].result(60).fields["devices"]
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(10)
        for number, each in enumerate(pending[:-1]):  # all have come to this end before the last one
            assert torch.equal(each.result(60).tensors[0].cuda(), tensor + number)
        link.close()
    torch.cuda.synchronize()


def test_by_itself_a_link_goes_through_the_gpus_memory() -> None:
    device = f"cuda:{torch.cuda.device_count() - 1}"
    with process(serve_echo, PayloadSettings("auto", device)) as (_, address):
        link = opened(address, PayloadSettings("auto", "cuda:0"))
        assert link.kind == "socket/ipc+cuda_ipc"
        tensor = torch.randn(3 << 20, device="cuda")  # more than its first region
        for _ in range(3):
            answer = link.call(Message("echo", {}, (tensor, tensor[:7])), 60)
            assert answer.fields["devices"] == ["cuda", "cuda"]
            assert torch.equal(answer.tensors[0].to("cuda:0"), tensor)
        link.close()
