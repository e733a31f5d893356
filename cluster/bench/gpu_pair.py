"""A layer's tokens to an expert actor on another GPU and back, without the experts' computation: as question and answer
over a link as its ends choose it (`nccl_pair_128x7168`) and over an `nccl` link (`nccl_link_128x7168`), and inside the
graphs of a captured step (`captured_layer`).

The measure is NCCL's own: two `all_to_all_single` between the same two GPUs, with as many bytes to the other each way.
`ray_call_128x7168`: the same question as a Ray actor call, through the host's memory as there is no other way for it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from actors.moe.layer_bytes import LayerShape, from_bytes, to_bytes
from actors.transport.message import Message
from actors.transport.payload.contract import PayloadSettings, Way
from actors.transport.socket import SocketLink, SocketServer
from actors.values import Address
from cluster.bench.payload import other_process, started
from cluster.bench.result import Row, interleaved, time_row

_dist: Any = torch.distributed
SHAPE = LayerShape(128, 7168, 8, torch.bfloat16, torch.float32)
LAYERS = 58
"""Of a captured step, as DeepSeek-V3 has."""
CALLS_A_ROUND = 50
MAX_BYTES = 1 << 26
TIMEOUT_S = 60.0
MIN_ROUNDS = 5


def gpu_pair_rows(rounds: int, ray_call: Callable[[Message], Message]) -> list[Row]:
    """None with less than two GPUs."""
    if torch.cuda.device_count() < 2:
        return []
    rounds = max(rounds, MIN_ROUNDS)
    with tempfile.TemporaryDirectory() as directory, other_process(_serve, directory) as parent:
        address = started(parent)
        with ExitStack() as stack:
            link = _opened(address, PayloadSettings("auto", "cuda:0"), stack)
            nccl_link = _opened(address, PayloadSettings("nccl", "cuda:0"), stack)
            with torch.cuda.device(0), torch.no_grad():
                return _rows(rounds, link, nccl_link, _Pair(directory, 0), ray_call)


def _opened(address: Address, payload: PayloadSettings, stack: ExitStack) -> SocketLink:
    link = SocketLink("echo", address, name="bench", max_bytes=MAX_BYTES, timeout_s=TIMEOUT_S, payload=payload)
    stack.callback(link.close)
    return link


def _rows(
    rounds: int, link: SocketLink, nccl_link: SocketLink, pair: _Pair, ray_call: Callable[[Message], Message]
) -> list[Row]:
    question = Message("echo", {}, _tensors())
    on_host = Message("echo", {}, tuple(tensor.cpu() for tensor in question.tensors))

    def over(link: SocketLink) -> None:
        for _ in range(CALLS_A_ROUND):
            link.call(question, TIMEOUT_S)
            torch.cuda.synchronize()

    def by_ray() -> None:
        for _ in range(CALLS_A_ROUND // 10):
            tensors = tuple(tensor.cpu() for tensor in question.tensors)
            answer = ray_call(Message("echo", {}, tensors))
            answer.tensors[0].to("cuda:0")
            torch.cuda.synchronize()

    def all_to_all() -> None:
        pending = link.start(Message("all_to_all", {"pairs": CALLS_A_ROUND}))
        for _ in range(CALLS_A_ROUND):
            pair.run()
            torch.cuda.synchronize()
        pending.result(TIMEOUT_S)

    ray_call(on_host)
    candidates: dict[str, Callable[[], None]] = {
        "link": partial(over, link),
        "nccl link": partial(over, nccl_link),
        "nccl": all_to_all,
        "ray": by_ray,
    }
    seconds = interleaved(candidates, rounds, 2)
    each = {name: [s / CALLS_A_ROUND for s in values] for name, values in seconds.items()}
    ray = [s / (CALLS_A_ROUND // 10) for s in seconds["ray"]]
    peer = "all_to_all_single there and back"
    rows = [
        time_row("nccl_pair_128x7168", "us", 1e6, each["link"], peer, each["nccl"]),
        time_row("nccl_link_128x7168", "us", 1e6, each["nccl link"], peer, each["nccl"]),
        time_row("ray_call_128x7168", "us", 1e6, each["link"], "Ray actor call", ray),
    ]
    with _captured(nccl_link) as replay:
        seconds = interleaved({"captured": replay, "nccl": all_to_all}, rounds, 2)
    captured = [s / LAYERS for s in seconds["captured"]]
    nccl = [s / CALLS_A_ROUND for s in seconds["nccl"]]
    return [*rows, time_row("captured_layer", "us", 1e6, captured, peer, nccl)]


def _tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x_TD = torch.randn(SHAPE.num_tokens, SHAPE.width, device="cuda:0").to(SHAPE.dtype)
    ids_TK = torch.randint(0, 256, (SHAPE.num_tokens, SHAPE.top_k), device="cuda:0")
    return x_TD, ids_TK, torch.rand(ids_TK.shape, device="cuda:0")


@contextmanager
def _captured(link: SocketLink) -> Iterator[Callable[[], None]]:
    """A step of so many layers, as `actors.router.apart` captures each: the tokens of one are the sums of the last."""
    way = link.way
    assert way is not None
    link.call(Message("arrange"), TIMEOUT_S)
    x_TD, ids_TK, weights_TK = _tensors()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        to_bytes(x_TD, ids_TK, weights_TK)
        graph.capture_begin(capture_error_mode="thread_local")
        y_TD = x_TD
        for _ in range(LAYERS):
            sent = way.send(to_bytes(y_TD, ids_TK, weights_TK))
            y_TD = torch.empty_like(x_TD)
            way.receive(y_TD).wait()
            sent.wait()
        graph.capture_end()
    torch.cuda.synchronize()

    def replay() -> None:
        link.call(Message("play"), TIMEOUT_S)
        graph.replay()
        torch.cuda.synchronize()

    replay()
    torch.testing.assert_close(y_TD, x_TD, rtol=0, atol=0)
    yield replay
    graph.reset()
    link.call(Message("drop"), TIMEOUT_S)


class _Pair:
    """`all_to_all_single` of two ranks, there and back."""

    def __init__(self, directory: str, rank: int) -> None:
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=TIMEOUT_S)
        store = _dist.FileStore(f"{directory}/pair", 2)
        self._group = _dist.ProcessGroupNCCL(store, rank, 2, options)
        size = (2 * SHAPE.num_tokens, SHAPE.width)
        self._there = torch.zeros(size, dtype=SHAPE.dtype, device=f"cuda:{rank}")
        self._back = torch.zeros_like(self._there)

    def run(self) -> None:
        for into, given in ((self._back, self._there), (self._there, self._back)):
            self._group.alltoall_base(into, given, [], [], _dist.AllToAllOptions()).wait()


class _Echo:
    """The other process."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._pair: _Pair | None = None
        self._graph: Any = None
        self._stream = torch.cuda.Stream()

    def handle(self, peer: str, question: Message) -> Message:
        fields: Any = question.fields
        match question.op:
            case "echo":
                return Message("ok", {}, question.tensors[:1])
            case "all_to_all":
                self._pair = self._pair or _Pair(self._directory, 1)
                for _ in range(fields["pairs"]):
                    self._pair.run()
            case "arrange":
                assert question.via is not None
                way = question.via.way()
                assert way is not None
                self._capture(way)
            case "play":
                with torch.cuda.stream(self._stream):
                    self._graph.replay()
            case "drop":
                torch.cuda.synchronize()
                self._graph = None
        return Message("ok")

    def _capture(self, way: Way) -> None:
        self._room_N = room_N = SHAPE.room(torch.device("cuda:1"))  # which the graph does not keep
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            self._graph.capture_begin(capture_error_mode="thread_local")
            for _ in range(LAYERS):
                way.receive(room_N).wait()
                way.send(from_bytes(room_N, SHAPE)[0]).wait()
            self._graph.capture_end()
        torch.cuda.synchronize()


def _serve(parent: Connection, directory: str) -> None:
    torch.cuda.set_device(1)
    echo = _Echo(directory)
    server = SocketServer("echo", echo.handle, max_bytes=MAX_BYTES, payload=PayloadSettings("auto", "cuda:1"))
    server.start()
    parent.send(server.address)
    parent.poll(None)  # until the parent closes it, or ends
    server.stop()
